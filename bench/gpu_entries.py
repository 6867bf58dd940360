"""What a row on the GPU compares: our updates by groups and singly, and the chain of plain torch calls, compiled."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from floor import Work, orient
from gpu_chain import Chain
from gpu_plan import Plan
from harness import Call, Entry, Implementation, UnavailableError
from ours import work_of
from problem import LR, SCALE, Problem
from torch import Tensor

from galore_kernels import _native, ops
from galore_kernels.backends.batch import Batch
from galore_kernels.backends.cuda import CudaStages
from galore_kernels.backends.pipeline import Pipeline
from galore_kernels.ops import registry
from galore_kernels.ops.group import GroupUpdate, UpdateGroup
from galore_kernels.quantizers import quantize_weight, weight_scale_shape

LOW_RANK, FULL_RANK = ("galore_update",), ("adam8bit_update",)
UNFUSED = "unfused chain, torch.compile"
STRONGEST = "unfused chain, torch.compile, addmm, CUDA graph"
ONE_PASS, FOUR_LAUNCHES = "ours: cuda, one pass", "ours: cuda, four launches"


def grouped_name(backend: str) -> str:
    """Of the entry that updates by groups."""
    return f"ours: {backend}"


def int8_name(backend: str) -> str:
    """Of the entry that updates int8 weights by groups."""
    return f"ours: {backend}, int8 weights"


def single_name(backend: str, graph: bool) -> str:
    """Of the entry that updates one matrix at a time."""
    return f"ours: {backend}, {'CUDA graph' if graph else 'eager'}"


def _selected(backend: str, problem: Problem) -> registry.Backend:
    try:
        return registry.select(problem.operation, backend, problem.device)
    except (ValueError, RuntimeError) as error:
        raise UnavailableError(str(error)) from error


def _options(problem: Problem) -> ops.AdamOptions:
    return ops.AdamOptions(torch.tensor(LR, device=problem.device))


def _groups(problem: Problem, weights: list[Tensor], *, int8: bool) -> list[tuple[UpdateGroup, list[Tensor]]]:
    """The matrices by shape, each group with its gradients. ``int8``: copies of the weights, quantized."""
    found = []
    for shape in dict.fromkeys(problem.case.shapes):
        which = [i for i, other in enumerate(problem.case.shapes) if other == shape]
        long, _, side = orient(shape)
        moments = shape if problem.rank is None else (long, problem.rank)
        params, scales = tuple(weights[i] for i in which), tuple[Tensor, ...]()
        if int8:
            params, scales = zip(*map(quantize_weight, params), strict=True)
        group = UpdateGroup(
            problem.operation,
            params,
            tuple(ops.AdamState.zeros(moments, eight_bit=True, device=problem.device) for _ in which),
            () if problem.rank is None else tuple(problem.bases[i] for i in which),
            side,
            SCALE if problem.rank is not None else 1.0,
            rounding_seeds=tuple(which) if int8 else None,
            weight_scales=scales,
        )
        found.append((group, [problem.grads[i] for i in which]))
    return found


def _one_by_one(backend: registry.Backend, group: UpdateGroup) -> GroupUpdate:
    """A group's update by a backend that takes tensors singly."""
    kernel = backend.kernels[group.operation]

    def update(grads: Sequence[Tensor], options: ops.AdamOptions) -> None:
        for i, (param, grad, state) in enumerate(zip(group.params, grads, group.states, strict=True)):
            if not group.bases:
                kernel(param, grad, state, options)
                continue
            seed = None if group.rounding_seeds is None else group.rounding_seeds[i]
            scale = group.weight_scales[i] if group.weight_scales else None
            own = replace(options, rounding_seed=seed)
            kernel(param, grad, group.bases[i], None, None, state, own, group.side, group.scale, scale)

    return update


def _all_groups(
    problem: Problem, make: Callable[[UpdateGroup], GroupUpdate], notes: str, *, int8: bool = False
) -> Implementation:
    weights, options = problem.weights(), _options(problem)
    updates = [(make(group), grads) for group, grads in _groups(problem, weights, int8=int8)]

    def call() -> None:
        for update, grads in updates:
            update(grads, options)

    work = work_of(problem, "8bit")
    if not int8:
        return Implementation(call, work, weights, notes=notes)
    saved = sum(rows * cols * (problem.case.dtype.itemsize - 1) for rows, cols in problem.case.shapes)
    saved -= sum(torch.float32.itemsize * math.prod(weight_scale_shape(shape)) for shape in problem.case.shapes)
    work = Work(work.bytes_read - saved, work.bytes_written - saved, work.operations)
    # Codes are not the weights whose movement is checked; "correctness" compares them with the reference's.
    return Implementation(call, work, None, notes=notes)


def grouped(name: str, *, int8: bool = False) -> Entry:
    """Our backend, all matrices of a shape at a time. ``int8``: on int8 weights instead."""

    def build(problem: Problem) -> Implementation:
        backend = _selected(name, problem)
        if backend.group is None:
            notes = "one at a time: it has no groups"
            return _all_groups(problem, lambda group: _one_by_one(backend, group), notes, int8=int8)
        return _all_groups(problem, backend.group, "all matrices of a shape together", int8=int8)

    if int8:
        return Entry(int8_name(name), "ours", LOW_RANK, build)
    return Entry(grouped_name(name), "ours", LOW_RANK + FULL_RANK, build)


def single(name: str, *, graph: bool) -> Entry:
    """Our backend through the public operation, one matrix after another."""

    def build(problem: Problem) -> Implementation:
        _selected(name, problem)
        weights, options = problem.weights(), _options(problem)
        rank, steps = problem.low_rank(), []
        for shape, weight, grad, basis in zip(problem.case.shapes, weights, problem.grads, problem.bases, strict=True):
            long, _, side = orient(shape)
            state = ops.AdamState.zeros((long, rank), eight_bit=True, device=problem.device)
            steps.append((weight, grad, basis, state, side))

        def call() -> None:
            for weight, grad, basis, state, side in steps:
                ops.galore_update(weight, grad, basis, state, options, side=side, scale=SCALE, backend=name)

        timed = captured(call, problem.device) if graph else call
        notes = f"{len(steps)} calls in a sample, each on a matrix of its own"
        return Implementation(timed, work_of(problem, "8bit"), weights, notes=notes)

    return Entry(single_name(name, graph), "ours", LOW_RANK, build)


def captured(call: Call, device: torch.device) -> Call:
    """The call as a CUDA graph; itself where there is no CUDA. Calls it once before."""
    if device.type != "cuda":
        return call
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):  # loads and compiles what can't be during a capture
        call()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


class _FourLaunches(CudaStages):
    def in_one_pass(self, batch: Batch) -> bool:
        return False


def one_pass_and_four_launches(stages: CudaStages | None = None) -> list[Entry]:
    """The CUDA backend's two ways of one update. ``stages``: others than the built module's."""

    def build(problem: Problem, *, split: bool) -> Implementation:
        if stages is None:
            _selected("cuda", problem)
        native, device_type = (_native, "cuda") if stages is None else (stages._native, stages.device_type)
        pipeline = Pipeline((_FourLaunches if split else CudaStages)(native, device_type))
        return _all_groups(problem, pipeline.group, "")

    return [
        Entry(ONE_PASS, "ours", LOW_RANK, lambda problem: build(problem, split=False)),
        Entry(FOUR_LAUNCHES, "ours", LOW_RANK, lambda problem: build(problem, split=True)),
    ]


def chains(plan: Plan) -> list[Entry]:
    """The chain of plain torch calls under torch.compile: as one would write it, and as fast as we could make it."""

    def build(problem: Problem, *, strongest: bool) -> Implementation:
        weights = problem.weights()
        torch._dynamo.config.recompile_limit = 64  # three shapes at each rank; beyond it, calls silently run uncompiled
        steps = [
            Chain(weight, grad, basis, orient(shape)[2], eight_bit=not strongest)
            for shape, weight, grad, basis in zip(
                problem.case.shapes, weights, problem.grads, problem.bases, strict=True
            )
        ]
        whole = torch.compile(Chain.step, backend=plan.compiler, dynamic=False)
        factors = torch.compile(Chain.factors, backend=plan.compiler, dynamic=False)

        def call() -> None:
            if not strongest:
                for step in steps:
                    whole(step)
                return
            for step in steps:  # outside, for torch.compile gives the product a result of its own and copies it
                step.weight.addmm_(*factors(step), alpha=-1)

        call()
        timed = captured(call, problem.device) if strongest else call
        moments = "float32 moments, the faster ones for torch" if strongest else "8-bit moments"
        work = work_of(problem, "fp32" if strongest else "8bit")
        return Implementation(timed, work, weights, notes=f"{moments}; torch.compile({plan.compiler!r})")

    return [
        Entry(UNFUSED, "rival", LOW_RANK, lambda problem: build(problem, strongest=False)),
        Entry(STRONGEST, "rival", LOW_RANK, lambda problem: build(problem, strongest=True)),
    ]
