"""The CUDA kernels, executed by the CPU: what the operations' own tests don't reach. Those run on them as well."""

from __future__ import annotations

import contextlib
import itertools
import re
from dataclasses import replace
from typing import Any

import pytest
import simt
import torch
from simt_backend import simt_pipeline
from stand_ins import serving
from test_galore_update import SIDES, Problem, check_against_float64, make_problem
from torch import Tensor
from update_cases import assert_almost_same, assert_same_bits, assert_same_state, clone, options, warm_state

from galore_kernels import GaLoreFusedAdam8bit, GaLoreFusedAdamW, NonFiniteGradientWarning
from galore_kernels.backends import pipeline as pipeline_module
from galore_kernels.backends.batch import Batch, make_batch, new_control, with_gradients
from galore_kernels.backends.cuda import CudaStages, make_backend
from galore_kernels.backends.pipeline import Pipeline
from galore_kernels.ops import AdamState, registry
from galore_kernels.ops.group import UpdateGroup
from galore_kernels.optim.state import adam_state

BF16, FP16 = torch.bfloat16, torch.float16

#: Long and short dimension and rank, all of which go through the one-pass kernel on four multiprocessors.
ONE_PASS_SHAPES = [
    (256, 64, 8),  # two panels, one tile of the short dimension, the smallest rank
    (256, 192, 16),  # three tiles: as many as the projection has stages
    (304, 200, 24),  # tails of both dimensions; a rank that is no multiple of 16
    (512, 72, 128),  # as many panels as blocks; the largest rank
    (200, 136, 120),  # a rank just below it
    (384, 8, 64),  # a short dimension of one chunk
]


@pytest.fixture
def pipeline() -> Pipeline:
    return simt_pipeline()


def oriented(long: int, short: int, rank: int, side: str, dtype: torch.dtype, **scalars: Any) -> Problem:
    rows, cols = (long, short) if side == "right" else (short, long)
    return make_problem(rows, cols, rank, side, dtypes=(dtype, dtype, dtype), **scalars)


def group_of(problems: list[Problem], seeds: tuple[int, ...] | None = None) -> UpdateGroup:
    first = problems[0]
    return UpdateGroup(
        "galore_update",
        tuple(p.param.clone() for p in problems),
        tuple(clone(p.state) for p in problems),
        tuple(p.basis for p in problems),
        first.side,
        first.scale,
        seeds,
    )


def batch_of(problems: list[Problem]) -> Batch:
    return with_gradients(make_batch(group_of(problems)), [p.grad for p in problems])


def takes_one_pass(pipeline: Pipeline, problems: list[Problem]) -> bool:
    return pipeline.stages.in_one_pass(pipeline.tabled(batch_of(problems)))


def splits(pipeline: Pipeline, problems: list[Problem]) -> int:
    return pipeline.stages.project_splits(pipeline.tabled(batch_of(problems)))


def solved(pipeline: Pipeline, p: Problem) -> tuple[Tensor, AdamState]:
    param, state = p.param.clone(), clone(p.state)
    pipeline.galore_update(param, p.grad, p.basis, None, None, state, p.options, p.side, p.scale)
    return param, state


def in_four_launches(p: Problem) -> tuple[Tensor, AdamState]:
    class Stages(CudaStages):
        def in_one_pass(self, batch: Batch) -> bool:
            return False

    return solved(Pipeline(Stages(simt.load(), "cpu")), p)


# --- one pass


@pytest.mark.parametrize("eight_bit", [True, False])
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("shape", ONE_PASS_SHAPES)
def test_one_pass_follows_the_paper_and_equals_four_launches_to_the_bit(
    cuda_stand_in: str, pipeline: Pipeline, shape: tuple[int, int, int], side: str, eight_bit: bool
) -> None:
    # To the bit, because both sum in the same order.
    for dtype, seed in ((BF16, None), (BF16, 7), (FP16, None)):
        p = oriented(*shape, side, dtype, eight_bit=eight_bit, weight_decay=0.1, grad_scale=3.0, rounding_seed=seed)
        assert takes_one_pass(pipeline, [p])
        if seed is None:
            check_against_float64(p, cuda_stand_in, f"{dtype}")
        (got, got_state), (expected, expected_state) = solved(pipeline, p), in_four_launches(p)
        assert_same_bits(got, expected, f"param, {dtype}")
        assert_same_state(got_state, expected_state)


def test_what_does_not_go_in_one_pass(pipeline: Pipeline) -> None:
    def one_pass(long: int, short: int, rank: int, dtype: torch.dtype = BF16, grad: Tensor | None = None) -> bool:
        p = oriented(long, short, rank, "right", dtype)
        return takes_one_pass(pipeline, [p if grad is None else replace(p, grad=grad)])

    assert one_pass(512, 64, 8)
    assert not one_pass(513, 64, 8)  # five panels, four blocks: the fifth would never come
    assert not one_pass(128, 64, 8)  # would leave most of the device idle
    assert not one_pass(512, 64, 136)  # does not fit
    assert not one_pass(512, 64, 12)  # rows of the basis that no copy of 16 bytes starts at
    assert not one_pass(512, 60, 8)  # rows of the gradient
    assert not one_pass(512, 64, 8, torch.float32)
    assert not one_pass(512, 64, 8, grad=torch.randn(512, 64))  # another dtype
    storage = torch.randn(512 * 64 + 1).bfloat16()
    assert not one_pass(512, 64, 8, grad=storage[1:].view(512, 64))  # an address


@pytest.mark.parametrize("seed", range(5))
def test_the_order_of_threads_changes_nothing(pipeline: Pipeline, seed: int) -> None:
    p = oriented(304, 200, 24, "right", BF16, eight_bit=True)
    simt.load().set_seed(100)
    expected, expected_state = solved(pipeline, p)
    simt.load().set_seed(seed)
    got, got_state = solved(pipeline, p)
    assert_same_bits(got, expected, "param")
    assert_same_state(got_state, expected_state)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("where", [0, 511])  # in the first and in the last panel
def test_one_pass_leaves_a_matrix_alone_if_one_of_its_panels_has_to(pipeline: Pipeline, side: str, where: int) -> None:
    problems = [oriented(512, 64, 16, side, BF16, eight_bit=True) for _ in range(3)]
    problems[1].grad[(where, 3) if side == "right" else (3, where)] = float("nan")
    assert takes_one_pass(pipeline, problems)
    group = group_of(problems)
    pipeline.group(group)([p.grad for p in problems], problems[0].options)
    for i, p in enumerate(problems):
        if i == 1:
            assert_same_bits(group.params[i], p.param, "param")
            assert_same_state(group.states[i], replace(p.state, skipped=torch.tensor(1)))
        else:
            expected, expected_state = solved(pipeline, p)
            assert_same_bits(group.params[i], expected, "param")
            assert_same_state(group.states[i], expected_state)


def test_found_inf_changes_nothing(pipeline: Pipeline) -> None:
    for rank in (16, 12):  # in one pass, and in four launches
        p = oriented(512, 64, rank, "right", BF16, eight_bit=True)
        p.options = replace(p.options, found_inf=torch.tensor(1.0))
        param, state = solved(pipeline, p)
        assert_same_bits(param, p.param, "param")
        assert_same_state(state, p.state)


# --- groups


@pytest.mark.parametrize("rank", [16, 12])  # in one pass, and in four launches
@pytest.mark.parametrize("seeds", [None, (3, 5, 8)])
@pytest.mark.parametrize("budget", [2**28, 1])  # all at once, and one at a time
def test_a_group_is_its_matrices(
    pipeline: Pipeline, rank: int, seeds: tuple[int, ...] | None, budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline_module, "WORKSPACE_BYTES", budget)
    problems = [oriented(264, 72, rank, "left", BF16, eight_bit=True, weight_decay=0.1) for _ in range(3)]
    group = group_of(problems, seeds)
    update = pipeline.group(group)
    expected = [(p.param.clone(), clone(p.state)) for p in problems]
    for step in range(3):
        # New gradients, at other addresses.
        grads = [torch.randn_like(p.grad) for p in problems]
        if step == 2:  # one of which no vector can be loaded from
            storage = torch.empty(grads[1].numel() + 1, dtype=BF16)
            grads[1] = storage[1:].view(grads[1].shape).copy_(grads[1])
        lr = torch.tensor(0.01 * (step + 1), dtype=torch.float64)
        update(grads, replace(problems[0].options, lr=lr))
        for i, (p, (param, state)) in enumerate(zip(problems, expected, strict=True)):
            own = replace(p.options, lr=lr, rounding_seed=None if seeds is None else seeds[i])
            pipeline.galore_update(param, grads[i], p.basis, None, None, state, own, p.side, p.scale)
            assert_same_bits(group.params[i], param, f"param {i}, step {step}")
            assert_same_state(group.states[i], state)


def test_a_full_rank_group_is_its_tensors(pipeline: Pipeline) -> None:
    shape = (37, 131)  # no multiple of a block
    states = [warm_state(shape, eight_bit=True, seed=i) for i in range(3)]
    params = [torch.randn(shape) for _ in range(3)]
    grads = [torch.randn(shape) for _ in range(3)]
    grads[2][5, 5] = float("inf")
    group = UpdateGroup("adam8bit_update", tuple(w.clone() for w in params), tuple(map(clone, states)))
    pipeline.group(group)(grads, options(weight_decay=0.1))
    for i in range(3):
        pipeline.adam8bit_update(params[i], grads[i], states[i], options(weight_decay=0.1))
        assert_same_bits(group.params[i], params[i], f"param {i}")
        assert_same_state(group.states[i], states[i])
    assert [int(state.skipped) for state in group.states] == [0, 0, 1]


# --- the optimizer on them


@pytest.mark.parametrize("cls", [GaLoreFusedAdam8bit, GaLoreFusedAdamW])
def test_the_optimizer_takes_the_same_steps_in_groups_as_one_by_one(
    cls: type[GaLoreFusedAdam8bit] | type[GaLoreFusedAdamW],
) -> None:
    # Four matrices of two shapes, one of which goes in one pass, and two vectors; a refresh at the steps 0 and 4.
    shapes = [(256, 64), (256, 64), (64, 72), (64, 72), (300,), (300,)]
    runs = []
    for grouped in (True, False):
        torch.manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(shape).bfloat16()) for shape in shapes]
        with serving("cuda"):
            if not grouped:
                registry.register(replace(registry._backends["cuda"], group=None))
            optimizer = cls(params, lr=0.01, rank=16, update_proj_gap=4, weight_decay=0.1, backend="cuda")
            for step in range(7):
                for param in params:
                    param.grad = torch.randn_like(param)
                if step == 5:
                    params[1].grad = torch.full_like(params[1], float("nan"))
                with pytest.warns(NonFiniteGradientWarning) if step == 5 else contextlib.nullcontext():
                    optimizer.step()
        runs.append((params, [optimizer.state[param] for param in params]))
    (params, states), (expected_params, expected_states) = runs
    for i, (got, expected) in enumerate(zip(params, expected_params, strict=True)):
        assert_same_bits(got, expected, f"param {i}")
        assert_same_state(adam_state(states[i]), adam_state(expected_states[i]))
    assert int(states[1]["skipped"]) == 1


# --- one matrix that has to fill the device


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("dtype", [BF16, torch.float32])
def test_the_short_dimension_is_split(cuda_stand_in: str, pipeline: Pipeline, side: str, dtype: torch.dtype) -> None:
    # 1100: more than two of the shortest parts, and no multiple of a tile.
    for rank, eight_bit in itertools.product((5, 8), (False, True)):
        p = oriented(40, 1100, rank, side, dtype, eight_bit=eight_bit, grad_scale=3.0, maximize=True)
        assert splits(pipeline, [p]) > 1
        check_against_float64(p, cuda_stand_in, f"rank {rank}, 8-bit: {eight_bit}")


@pytest.mark.parametrize("side", SIDES)
def test_a_matrix_alone_sums_in_another_order_than_in_a_group(pipeline: Pipeline, side: str) -> None:
    problems = [oriented(128, 1104, 16, side, BF16, eight_bit=True, weight_decay=0.1) for _ in range(3)]
    assert takes_one_pass(pipeline, problems)
    assert not takes_one_pass(pipeline, problems[:1])
    assert splits(pipeline, problems[:1]) > 1
    group = group_of(problems)
    pipeline.group(group)([p.grad for p in problems], problems[0].options)
    for i, p in enumerate(problems):
        param, state = solved(pipeline, p)
        assert_almost_same(group.params[i], group.states[i], param, state, f"{i}")


def test_the_memory_of_split_sums_is_there_before_anything_changes(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    problems = [oriented(40, 1104, 12, "right", BF16, eight_bit=True) for _ in range(9)]
    each = problems[0].state.exp_avg.numel() * 6
    monkeypatch.setattr(pipeline_module, "WORKSPACE_BYTES", 8 * each)  # eight, which aren't split, and one, which is
    assert splits(pipeline, problems[:8]) == 1
    assert splits(pipeline, problems[:1]) > 1

    def no_memory(pipeline: Pipeline, batch: Batch) -> None:
        if batch.count == 1:
            raise MemoryError

    monkeypatch.setattr(Pipeline, "_partial_sums", no_memory)
    group = group_of(problems)
    with pytest.raises(MemoryError):
        pipeline.group(group)([p.grad for p in problems], problems[0].options)
    for i, p in enumerate(problems):
        assert_same_bits(group.params[i], p.param, "param")
        assert_same_state(group.states[i], p.state)


@pytest.mark.parametrize("side", SIDES)
def test_float32_products_stay_accurate_in_long_sums(pipeline: Pipeline, side: str) -> None:
    # Matrix units cut off, and so does the emulation: a chain of 256 such sums would be off by hundreds of roundings.
    p = oriented(40, 4096, 8, side, torch.float32)
    p.grad.abs_()
    p.basis.abs_()
    group = group_of([p])  # a batch knows addresses only
    batch = with_gradients(make_batch(group), [p.grad])
    control = new_control(batch)
    lowrank = torch.empty((1, 40 * 8))
    pipeline.stages.prepare(batch, control, p.options, 1.0)
    pipeline.stages.project(batch, control, lowrank, None, final=False)
    grad = p.grad if side == "right" else p.grad.T
    exact = grad.double() @ p.basis.double()
    worst = float(((lowrank.view(40, 8).double() - exact) / exact).abs().max())
    assert worst < 16 * 2.0**-24


def test_a_split_projection_finds_bad_gradients(pipeline: Pipeline) -> None:
    p = oriented(40, 1100, 5, "right", BF16)
    p.grad[39, 1099] = float("inf")
    param, state = solved(pipeline, p)
    assert_same_bits(param, p.param, "param")
    assert_same_state(state, replace(p.state, skipped=torch.tensor(1)))


# --- large ranks: several tiles of the basis


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("dtype", [BF16, FP16, torch.float32])
@pytest.mark.parametrize("rank", [129, 264])  # one column past a tile; more than two tiles, aligned
def test_ranks_beyond_a_tile(cuda_stand_in: str, side: str, dtype: torch.dtype, rank: int) -> None:
    check_against_float64(oriented(136, 272, rank, side, dtype, eight_bit=True), cuda_stand_in, f"rank {rank}")


# --- devices that can't run them


def test_a_device_without_the_kernels_is_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    class Native:
        def cuda_device_error(self, index: int) -> str:
            asked.append(index)
            return "" if index == 0 else "no kernel image is available for execution on the device"

        def build_info(self) -> dict[str, Any]:
            return {"cuda_archs": ["80"]}

    backend = make_backend(Native(), "cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    for _ in range(2):
        assert backend.refuses(torch.device("cuda", 0)) is None
        for device in ("cuda", "cuda:1"):
            assert re.search("device 1 .*no kernel image", str(backend.refuses(torch.device(device))))
    assert "tensors only" in str(backend.refuses(torch.device("cpu")))
    assert asked == [0, 1]
    assert "no kernel image" in backend.describe()["reason"]
    assert simt.load().cuda_device_error(0) == ""
    assert "ordinal" in simt.load().cuda_device_error(1)
