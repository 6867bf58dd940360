"""This library's entries: each operation on each backend of the build, and the optimizers that call them."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
from floor import ZERO, Work, adafactor_work, adam_work, apollo_work, galore_work, lowrank_work, orient
from harness import Entry, Implementation, UnavailableError
from problem import (
    ADAFACTOR,
    ADAFACTOR_OPTIONS,
    APOLLO,
    BETAS,
    FULL_RANK,
    LR,
    NEVER,
    NORM_GROWTH_LIMIT,
    OPERATIONS,
    SCALE,
    Problem,
)
from torch import Tensor

import galore_kernels
from galore_kernels import ops
from galore_kernels.ops import registry

EPS = 1e-8

#: The optimizer that stands for ours in the goals, of each family.
GALORE_OPTIMIZER = "ours: GaLoreFusedAdam8bit.step"
APOLLO_OPTIMIZER = "ours: APOLLOFusedAdam8bit.step"
ADAFACTOR_OPTIMIZER = "ours: GaLoreFusedAdafactor.step"


def entries() -> list[Entry]:
    """Every backend that ``backend_info()`` names, available or not, then the optimizers."""
    info = ops.backend_info()
    found = [
        Entry(_backend_name(name), "ours", OPERATIONS, _backend_builder(name, facts)) for name, facts in info.items()
    ]
    galore, apollo = ("galore_update", "adam8bit_update"), tuple(APOLLO)
    return [
        *found,
        Entry(GALORE_OPTIMIZER, "ours", galore, _optimizer_builder("GaLoreFusedAdam8bit", "8bit")),
        Entry("ours: GaLoreFusedAdamW.step", "ours", galore, _optimizer_builder("GaLoreFusedAdamW", "fp32")),
        Entry(APOLLO_OPTIMIZER, "ours", apollo, _optimizer_builder("APOLLOFusedAdam8bit", "8bit")),
        Entry("ours: APOLLOFusedAdamW.step", "ours", apollo, _optimizer_builder("APOLLOFusedAdamW", "fp32")),
        Entry(ADAFACTOR_OPTIMIZER, "ours", (ADAFACTOR,), _optimizer_builder("GaLoreFusedAdafactor", "factored")),
    ]


def backends() -> dict[str, Any]:
    """What ``backend_info()`` says of this build: plain data for the JSON."""
    return json.loads(json.dumps(ops.backend_info(), default=str))


def _backend_name(backend: str) -> str:
    return "ours: reference (unfused torch)" if backend == "reference" else f"ours: {backend}"


def native_names() -> list[str]:
    """Names of our entries that are kernels, not the reference, in the order in which "auto" asks them."""
    return [_backend_name(name) for name in ops.backend_info() if name != "reference"]


def work_of(problem: Problem, state: str) -> Work:
    """The bytes and operations of the problem's operation with moments in ``state`` format; Adafactor's have one."""
    itemsize = problem.case.dtype.itemsize
    total = ZERO
    for shape in problem.case.shapes:
        if problem.rank is None:
            total += adam_work(shape, itemsize, state)
        elif problem.operation in APOLLO:
            total += apollo_work(shape, problem.rank, itemsize, state)
        elif problem.operation == ADAFACTOR:
            total += adafactor_work(shape, problem.rank, itemsize)
        elif problem.operation == "galore_update":
            total += galore_work(shape, problem.rank, itemsize, state)
        else:
            total += lowrank_work(shape, problem.rank, itemsize, state)
    return total


def _state(problem: Problem, numel: int) -> ops.AdamState:
    return ops.AdamState.zeros((numel,), eight_bit=True, device=problem.device)


def _options(device: torch.device) -> ops.AdamOptions:
    return ops.AdamOptions(
        lr=torch.tensor(LR, dtype=torch.float32, device=device),
        beta1=BETAS[0],
        beta2=BETAS[1],
        eps=EPS,
        weight_decay=0.0,
        maximize=False,
        grad_scale=None,
        found_inf=None,
        rounding_seed=None,
    )


def _backend_builder(backend: str, facts: dict[str, object]) -> Callable[[Problem], Implementation]:
    def build(problem: Problem) -> Implementation:
        if not facts.get("available"):
            raise UnavailableError(str(facts.get("reason", "backend_info() says it is not available")))
        try:
            operation = "apollo_update" if problem.operation in APOLLO else problem.operation
            registry.select(operation, backend, problem.device)
        except RuntimeError as error:
            raise UnavailableError(str(error)) from error
        weights, options = problem.weights(), _options(problem.device)
        steps = [_one(problem, index, weight, options, backend) for index, weight in enumerate(weights)]

        def call() -> None:
            for step in steps:
                step()

        moments = "factored" if problem.operation == ADAFACTOR else "8-bit"
        notes = f"the operation itself, {moments} moments"
        return Implementation(call, work_of(problem, "8bit"), weights, notes=notes)

    return build


def _one(problem: Problem, index: int, weight: Tensor, options: ops.AdamOptions, backend: str) -> Callable[[], None]:
    if problem.operation in FULL_RANK:
        state, grad = _state(problem, weight.numel()), problem.grads[index]
        return lambda: ops.adam8bit_update(weight, grad, state, options, backend=backend)
    long, _, side = orient(problem.case.shapes[index])
    if problem.operation == ADAFACTOR:
        return _adafactor(problem, index, weight, long, side, backend)
    state = _state(problem, long * problem.low_rank())
    if problem.operation in APOLLO:
        return _apollo(problem, index, weight, state, options, side, backend)
    basis = problem.bases[index]
    if problem.operation == "galore_update":
        grad = problem.grads[index]
        return lambda: ops.galore_update(weight, grad, basis, state, options, side=side, scale=SCALE, backend=backend)
    lowrank = problem.lowrank_grads[index]
    return lambda: ops.lowrank_update(weight, lowrank, basis, state, options, side=side, scale=SCALE, backend=backend)


def _adafactor(problem: Problem, index: int, weight: Tensor, long: int, side: str, backend: str) -> Callable[[], None]:
    state = ops.AdafactorState.zeros((long, problem.low_rank()), first_moment=False, device=problem.device)
    options = ops.AdafactorOptions(torch.tensor(LR, device=problem.device), **ADAFACTOR_OPTIONS)
    grad, basis = problem.grads[index], problem.bases[index]
    return lambda: ops.galore_adafactor_update(
        weight, grad, basis, state, options, side=side, scale=SCALE, backend=backend
    )


def _apollo(
    problem: Problem,
    index: int,
    weight: Tensor,
    state: ops.AdamState,
    options: ops.AdamOptions,
    side: str,
    backend: str,
) -> Callable[[], None]:
    scaling, scale = APOLLO[problem.operation]
    apollo = ops.ApolloOptions(scale, scaling, norm_growth_limit=NORM_GROWTH_LIMIT)
    basis, grad = ops.RandomBasis(problem.low_rank(), seed=index), problem.grads[index]
    norm = torch.zeros((), device=problem.device)
    return lambda: ops.apollo_update(weight, grad, basis, state, norm, options, apollo, side=side, backend=backend)


def _optimizer_builder(cls: str, state: str) -> Callable[[Problem], Implementation]:
    def build(problem: Problem) -> Implementation:
        params = [torch.nn.Parameter(weight) for weight in problem.weights()]
        for param, grad in zip(params, problem.grads, strict=True):
            param.grad = grad
        group: dict[str, Any] = {"params": params, "rank": problem.rank, "update_proj_gap": NEVER, "scale": SCALE}
        if problem.operation in APOLLO:
            scaling, scale = APOLLO[problem.operation]
            group |= {"scale": scale, "scale_type": scaling, "norm_growth_limit": NORM_GROWTH_LIMIT}
        own = ADAFACTOR_OPTIONS if problem.operation == ADAFACTOR else {"betas": BETAS, "eps": EPS}
        optimizer = getattr(galore_kernels, cls)([group], lr=LR, **own)
        moments = "8-bit" if state == "8bit" else state
        notes = f"{moments} moments; Python overhead of the optimizer included"
        return Implementation(optimizer.step, work_of(problem, state), list(params), notes=notes)

    return build
