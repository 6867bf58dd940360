"""The rivals and the yardstick; each says how it was patched, and why it can't run where it can't."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from floor import ZERO, Work, adafactor_work, adam_work, apollo_work, galore_work, orient, products_work
from harness import Entry, Implementation, UnavailableError
from problem import ADAFACTOR, ADAFACTOR_OPTIONS, APOLLO, BETAS, LR, NEVER, SCALE, Problem

from galore_kernels.pretrain.rivals import patched_galore_torch_adamw8bit

TWO_PRODUCTS = "two products alone (torch)"
GALORE_8BIT = "galore_torch AdamW8bit, patched"
GALORE_ADAMW = "galore_torch AdamW"
APOLLO_ADAMW = "apollo_torch APOLLOAdamW"
GALORE_ADAFACTOR = "galore_torch GaLoreAdafactor"
FULL_ADAFACTOR = "transformers Adafactor"
BNB_8BIT = "bitsandbytes AdamW8bit"
TORCH_FUSED = "torch AdamW fused"
TORCH_FOREACH = "torch AdamW foreach"

LOW_RANK = ("galore_update",)
BOTH = ("galore_update", "adam8bit_update")


def entries() -> list[Entry]:
    """Full-rank optimizers stand in the low-rank rows too: a GaLore step should cost less than they do."""
    return [
        Entry(TWO_PRODUCTS, "yardstick", (*LOW_RANK, ADAFACTOR), _products),
        Entry("one product alone (torch)", "yardstick", ("lowrank_update",), _products),
        Entry(GALORE_8BIT, "rival", LOW_RANK, _galore_8bit),
        Entry(GALORE_ADAMW, "rival", LOW_RANK, _galore_adamw),
        Entry(BNB_8BIT, "rival", BOTH, _bitsandbytes),
        Entry(APOLLO_ADAMW, "rival", tuple(APOLLO), _apollo_adamw),
        Entry(GALORE_ADAFACTOR, "rival", (ADAFACTOR,), _galore_adafactor),
        Entry(FULL_ADAFACTOR, "rival", (ADAFACTOR,), _full_adafactor),
        Entry(TORCH_FUSED, "rival", (*BOTH, ADAFACTOR, *APOLLO), _torch_adamw("fused")),
        Entry(TORCH_FOREACH, "rival", BOTH, _torch_adamw("foreach")),
    ]


def _import(module: str, package: str) -> ModuleType:
    try:
        return import_module(module)
    except ImportError as error:
        raise UnavailableError(f"{module} can't be imported ({error}); pip install {package}") from error


def _parameters(problem: Problem) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(weight) for weight in problem.weights()]


def _give_gradients(params: list[torch.nn.Parameter], problem: Problem) -> Callable[[], None]:
    # galore_torch's 8-bit step leaves the projected gradient in p.grad, so every call needs them anew.
    def give() -> None:
        for param, grad in zip(params, problem.grads, strict=True):
            param.grad = grad

    return give


def _adam(
    problem: Problem, params: list[torch.nn.Parameter], step: Callable[[], Any], state: str, notes: str
) -> Implementation:
    work = ZERO
    for shape in problem.case.shapes:
        work += adam_work(shape, problem.case.dtype.itemsize, state)
    give = _give_gradients(params, problem)
    return Implementation(step, work, list(params), give, full_rank=True, notes=notes)


def _galore(
    problem: Problem, params: list[torch.nn.Parameter], step: Callable[[], Any], state: str, notes: str
) -> Implementation:
    work = ZERO
    for shape in problem.case.shapes:
        work += galore_work(shape, problem.low_rank(), problem.case.dtype.itemsize, state)
    return Implementation(step, work, list(params), _give_gradients(params, problem), notes=notes)


def _products(problem: Problem) -> Implementation:
    """``R = G @ P`` and ``R @ P.T`` (or the second alone) into buffers made beforehand."""
    dtype, device = problem.case.dtype, problem.device
    count = 1 if problem.operation == "lowrank_update" else 2
    work, calls = ZERO, []
    for shape, grad, basis, lowrank in zip(
        problem.case.shapes, problem.grads, problem.bases, problem.lowrank_grads, strict=True
    ):
        side = orient(shape)[2]
        thin = lowrank.to(dtype)
        full = torch.empty(shape, dtype=dtype, device=device)
        work += products_work(shape, problem.low_rank(), dtype.itemsize, count)
        oriented = grad if side == "right" else grad.T
        if count == 2:
            calls.append((oriented, basis, thin))
        calls.append((thin, basis.T, full) if side == "right" else (basis, thin.T, full))

    def call() -> None:
        for a, b, out in calls:
            torch.matmul(a, b, out=out)

    return Implementation(call, work, None, notes="updates nothing; result buffers allocated beforehand")


def _inject_bases(
    optimizer: Any, params: list[torch.nn.Parameter], problem: Problem, dtype: torch.dtype | None = None
) -> None:
    """Gives galore_torch its bases, so that its first step does not take its SVD (1.5 s at 1024 x 4096).

    ``dtype``: that it would keep them in; None for the gradient's.
    """
    projector_class = import_module("galore_torch.galore_projector").GaLoreProjector
    for shape, param, basis in zip(problem.case.shapes, params, problem.bases, strict=True):
        side = orient(shape)[2]
        projector = projector_class(problem.rank, update_proj_gap=NEVER, scale=SCALE, proj_type="std")
        matrix = (basis.T.contiguous() if side == "right" else basis).to(dtype or basis.dtype)
        projector.get_orthogonal_matrix = _constant(matrix)
        optimizer.state[param].update(step=0, projector=projector)


def _constant(value: torch.Tensor) -> Callable[..., torch.Tensor]:
    return lambda *args, **kwargs: value


def _galore_groups(params: list[torch.nn.Parameter], problem: Problem) -> list[dict[str, Any]]:
    return [{"params": params, "rank": problem.rank, "update_proj_gap": NEVER, "scale": SCALE, "proj_type": "std"}]


def _galore_8bit(problem: Problem) -> Implementation:
    _import("bitsandbytes", "bitsandbytes")
    _import("galore_torch", "galore-torch")
    params = _parameters(problem)
    optimizer = patched_galore_torch_adamw8bit()(  # type: ignore[call-arg]  # made at run time
        _galore_groups(params, problem), lr=LR, betas=BETAS, weight_decay=0.0
    )
    _inject_bases(optimizer, params, problem)
    notes = "8-bit moments; settings passed to bitsandbytes by name, no CUDA sync on a CPU"
    return _galore(problem, params, optimizer.step, "8bit", notes)


def _galore_adamw(problem: Problem) -> Implementation:
    galore_torch = _import("galore_torch", "galore-torch")
    params = _parameters(problem)
    optimizer = galore_torch.GaLoreAdamW(
        _galore_groups(params, problem), lr=LR, betas=BETAS, no_deprecation_warning=True
    )
    _inject_bases(optimizer, params, problem)
    return _galore(problem, params, optimizer.step, "param", "moments in the gradient's dtype")


def _galore_adafactor(problem: Problem) -> Implementation:
    galore_torch = _import("galore_torch", "galore-torch")
    params, rank = _parameters(problem), problem.low_rank()
    optimizer = galore_torch.GaLoreAdafactor(_galore_groups(params, problem), lr=LR, **ADAFACTOR_OPTIONS)
    _inject_bases(optimizer, params, problem, torch.float32)
    work, itemsize = ZERO, problem.case.dtype.itemsize
    for shape in problem.case.shapes:
        wider = Work(orient(shape)[1] * rank * (torch.float32.itemsize - itemsize), 0, 0)  # its basis
        work += adafactor_work(shape, rank, itemsize) + wider
    notes = "factored moments; computes in float32, with float32 bases"
    return Implementation(optimizer.step, work, list(params), _give_gradients(params, problem), notes=notes)


def _full_adafactor(problem: Problem) -> Implementation:
    params = _parameters(problem)
    optimizer = _import("transformers", "transformers").Adafactor(params, lr=LR, **ADAFACTOR_OPTIONS)
    work = ZERO
    for shape in problem.case.shapes:
        work += adafactor_work(shape, None, problem.case.dtype.itemsize)
    give = _give_gradients(params, problem)
    return Implementation(optimizer.step, work, list(params), give, full_rank=True, notes="full rank, factored moments")


def _apollo_adamw(problem: Problem) -> Implementation:
    apollo_torch = _import("apollo_torch", "apollo-torch")
    params, (scaling, scale) = _parameters(problem), APOLLO[problem.operation]
    (group,) = _galore_groups(params, problem)
    group |= {"proj": "random", "scale_type": scaling, "scale": scale}
    optimizer = apollo_torch.APOLLOAdamW([group], lr=LR, betas=BETAS)
    work, itemsize, rank = ZERO, problem.case.dtype.itemsize, problem.low_rank()
    for shape in problem.case.shapes:
        work += apollo_work(shape, rank, itemsize, "param") + Work(orient(shape)[1] * rank * itemsize, 0, 0)
    notes = "moments in the gradient's dtype; its basis, kept, was drawn at its first step, before timing"
    return Implementation(optimizer.step, work, list(params), _give_gradients(params, problem), notes=notes)


def _bitsandbytes(problem: Problem) -> Implementation:
    bitsandbytes = _import("bitsandbytes", "bitsandbytes")
    params = _parameters(problem)
    optimizer = bitsandbytes.optim.AdamW8bit(params, lr=LR, betas=BETAS, weight_decay=0.0)
    return _adam(problem, params, optimizer.step, "8bit", "full rank, 8-bit moments")


def _torch_adamw(kind: str) -> Callable[[Problem], Implementation]:
    def build(problem: Problem) -> Implementation:
        params = _parameters(problem)
        optimizer = torch.optim.AdamW(params, lr=LR, betas=BETAS, weight_decay=0.0, **{kind: True})
        return _adam(problem, params, optimizer.step, "param", "full rank, moments in the weight's dtype")

    return build
