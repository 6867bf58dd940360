"""APOLLO on the CUDA kernels, executed by the CPU: what ``test_apollo_update.py`` does not know of them.

Drawn tiles are compared to the bit with the same basis from memory, a group with its members, the rest with float64.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import simt
import tolerances
import torch
from simt_backend import simt_pipeline
from test_apollo_update import DTYPE_PAIRS, OPTIONS, SIDES, Problem, check_against_float64, make_problem
from torch import Tensor
from update_cases import assert_same_bits, assert_same_state, clone, options

from galore_kernels.backends import pipeline as pipeline_module
from galore_kernels.backends.batch import Batch, make_batch, new_control, with_gradients
from galore_kernels.backends.pipeline import Pipeline
from galore_kernels.ops import RandomBasis, random_basis
from galore_kernels.ops.group import UpdateGroup
from galore_kernels.ops.random_basis import FAMILIES, magnitudes
from galore_kernels.quantizers import quantize_weight

F32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16

SHAPES = [  # long, short, rank
    (40, 72, 1),  # APOLLO-Mini: a column, of sixteen blocks of a tile
    (37, 53, 5),  # multiples of nothing
    (136, 200, 8),  # two tiles of long indices, vectors everywhere, three or six tiles deep and a tail
    (24, 150, 64),  # warps without columns
    (130, 70, 128),  # one whole tile of the basis
    (20, 100, 130),  # two columns of a second tile, whose blocks sum no squares
]


@pytest.fixture
def pipeline() -> Pipeline:
    return simt_pipeline()


def group_of(problems: Sequence[Problem]) -> UpdateGroup:
    first = problems[0]
    seeds = tuple(p.options.rounding_seed for p in problems if p.options.rounding_seed is not None)
    return UpdateGroup(
        "apollo_update",
        tuple(p.param.clone() for p in problems),
        tuple(clone(p.state) for p in problems),
        tuple(p.basis for p in problems),
        first.side,
        rounding_seeds=seeds or None,
        weight_scales=tuple(p.weight_scale.clone() for p in problems if p.weight_scale is not None),
        scaled_norms=tuple(p.scaled_norm.clone() for p in problems),
        apollo=first.apollo,
    )


def batch_of(pipeline: Pipeline, group: UpdateGroup, problems: Sequence[Problem]) -> Batch:
    """As a group's update makes it; it knows addresses only, of tensors that the group and the problems hold."""
    batch = make_batch(group, pipeline.magnitudes(group))
    return pipeline.tabled(with_gradients(batch, [p.grad for p in problems]))


def oriented(long: int, short: int, rank: int, side: str, dtype: torch.dtype, **changes: object) -> Problem:
    shape = (long, short) if side == "right" else (short, long)
    return make_problem(*shape, rank, side, dtypes=(dtype, dtype), **changes)  # type: ignore[arg-type]


def projected(pipeline: Pipeline, problems: Sequence[Problem], splits: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """What ``project`` gives of a batch: R (N, L, r), sums of squares (N, L), skip flags."""
    group = group_of(problems)
    batch = batch_of(pipeline, group, problems)
    control, long = new_control(batch), batch.long_short()[0]
    lowrank, squares = torch.full((batch.count, batch.moments), 7.0), torch.full((batch.count, long), 7.0)
    partial = partial_squares = None
    if splits > 1:
        partial, partial_squares = (torch.full((splits, *x.shape), 7.0) for x in (lowrank, squares))
    pipeline.stages.prepare(batch, control, problems[0].options, 1.0)
    pipeline.stages.project(
        batch, control, lowrank, partial, final=True, squares=squares, partial_squares=partial_squares
    )
    return lowrank.view(batch.count, long, batch.rank), squares, control[:, 8]


# --- drawing


@pytest.mark.parametrize("dtype", [BF16, FP16, F32])
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_drawn_basis_is_the_stored_one_to_the_bit(
    pipeline: Pipeline, shape: tuple[int, int, int], side: str, dtype: torch.dtype
) -> None:
    long, short, rank = shape
    for splits, family in ((1, "gaussian"), (3, "gaussian"), (1, "rademacher")):
        # Two tensors, each with a seed of its own; the second's uses all bits of a key.
        drawn = [oriented(long, short, rank, side, dtype, basis=family, grad_scale=3.0) for _ in range(2)]
        drawn[1].basis = RandomBasis(rank, 2**63 - 1, family)
        stored = [replace(p, basis=_entries(short, p.basis).to(dtype)) for p in drawn]
        got, squares, flags = projected(pipeline, drawn, splits)
        unscaled = [replace(p, options=options()) for p in stored]
        expected, expected_squares, _ = projected(pipeline, unscaled, splits)
        factor, scale = (torch.tensor(1.0 / x) for x in (rank**0.5, 3.0))
        if splits == 1:
            assert_same_bits(got, expected * factor * scale, f"R, {family}")
        else:  # the parts are multiplied by 1 / sqrt(rank), their sum by the scale
            torch.testing.assert_close(got, expected * factor * scale, rtol=1e-5, atol=1e-6)
        assert_same_bits(squares, expected_squares, "squares")  # also with a basis from memory, and not scaled
        exact = torch.stack([(p.grad if side == "right" else p.grad.T).double().square().sum(1) for p in drawn])
        torch.testing.assert_close(squares.double(), exact, rtol=short * tolerances.U32, atol=0)
        assert flags.tolist() == [0, 0]


def _entries(short: int, basis: Tensor | RandomBasis) -> Tensor:
    assert isinstance(basis, RandomBasis)
    return random_basis(short, basis, backend="reference")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_entries_are_the_reference_s(pipeline: Pipeline, family: str) -> None:
    for short, rank, seed in ((1, 1, 0), (37, 5, 2**63 - 1), (64, 8, 3), (3, 300, 2**32), (0, 4, 1)):
        basis = RandomBasis(rank, seed, family)
        got = pipeline.random_basis(short, basis, torch.device("cpu"))
        assert_same_bits(got, _entries(short, basis), f"{short} x {rank}")


def test_a_graph_writes_its_own_table_of_magnitudes(monkeypatch: pytest.MonkeyPatch, pipeline: Pipeline) -> None:
    monkeypatch.setattr(pipeline_module, "_capturing", lambda device: True)
    group = group_of([make_problem(4, 8, 2, "right")])
    first, second = pipeline.magnitudes(group), pipeline.magnitudes(group)
    assert first is not None
    assert second is not None
    assert first.data_ptr() != second.data_ptr()  # one that a graph writes is nobody else's
    assert_same_bits(first, magnitudes("gaussian").bfloat16(), "magnitudes")
    monkeypatch.undo()
    assert pipeline.magnitudes(group) is pipeline.magnitudes(group)


# --- the whole step


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_follows_the_paper(cuda_stand_in: str, shape: tuple[int, int, int], side: str) -> None:
    for name, dtype, basis, eight_bit in (
        ("APOLLO", BF16, "gaussian", True),
        ("Mini", F32, "rademacher", False),
        ("scale in front", FP16, "given", True),
    ):
        p = oriented(
            *shape,
            side,
            dtype,
            basis=basis,
            eight_bit=eight_bit,
            apollo=OPTIONS[name],
            weight_decay=0.1,
            grad_scale=3.0,
        )
        check_against_float64(p, cuda_stand_in, f"{name}, {dtype}")


@pytest.mark.parametrize(
    "shape",
    [(300, 3, 2), (40, 28, 2), (3, 300, 4)],  # long rows, rows of 4 but not 8, one segment of a row
)
@pytest.mark.parametrize("dtypes", DTYPE_PAIRS)
def test_every_pair_of_dtypes(
    cuda_stand_in: str, shape: tuple[int, int, int], dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    for side in SIDES:
        p = make_problem(*shape, side, dtypes=dtypes, eight_bit=True, norm=0.01, weight_decay=0.1)
        check_against_float64(p, cuda_stand_in, f"{side}")


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize(
    "shape",
    [
        (1, 7, 1),  # less than a vector
        (37, 53, 5),  # unaligned rows; the lanes behind a row's end have nothing
        (66, 528, 8),  # vectors everywhere, the last group one of 16
        (70, 257, 8),  # a group of one element; more segments than a block takes
    ],
)
def test_int8_weights_take_the_reference_s_codes(cuda_stand_in: str, shape: tuple[int, int, int], side: str) -> None:
    p = make_problem(*shape, side, dtypes=(F32, BF16), rounding_seed=11, lr=0.1, weight_decay=0.1, norm=0.0)
    codes, scale = quantize_weight(p.param)
    p = replace(p, param=codes, weight_scale=scale)
    got, expected = p.solved(cuda_stand_in), p.solved("reference")
    assert got.weight_scale is not None
    assert expected.weight_scale is not None
    differ = (got.param != expected.param).float().sum()
    assert differ <= max(1.0, (1 - tolerances.EQUAL_INT8_CODES) * codes.numel())
    assert (got.param.int() - expected.param.int()).abs().max() <= 1
    assert (expected.param != codes).float().mean() > 0.1
    torch.testing.assert_close(got.weight_scale, expected.weight_scale, rtol=1e-5, atol=0)


@pytest.mark.parametrize("seed", range(3))
def test_the_order_of_threads_changes_nothing(cuda_stand_in: str, seed: int) -> None:
    p = oriented(136, 300, 24, "left", BF16, eight_bit=True, rounding_seed=3)
    simt.load().set_seed(1)
    expected = p.solved(cuda_stand_in)
    simt.load().set_seed(100 + seed)
    got = p.solved(cuda_stand_in)
    assert_same_bits(got.param, expected.param, "param")
    assert_same_state(got.state, expected.state)
    assert_same_bits(got.scaled_norm, expected.scaled_norm, "scaled_norm")


@pytest.mark.parametrize("side", SIDES)
def test_nothing_but_the_step_and_the_norm_of_an_empty_matrix_changes(cuda_stand_in: str, side: str) -> None:
    for shape in ((0, 5, 2), (5, 0, 2)):
        p = make_problem(*shape, side)
        got = p.solved(cuda_stand_in)
        assert got.scaled_norm == 0
        assert got.state.step == p.state.step + 1


# --- skipping


@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize("side", SIDES)
def test_squares_whose_sum_is_infinite_are_skipped(pipeline: Pipeline, side: str, splits: int) -> None:
    # Each square is finite, and each part's sum; so is R, of which these elements are no part.
    fine, bad = (oriented(20, 300, 4, side, F32, basis="given") for _ in range(2))
    long_index = bad.grad[3] if side == "right" else bad.grad[:, 3]
    long_index[[0, 299]] = 1.8e19
    assert isinstance(bad.basis, Tensor)
    bad.basis[[0, 299]] = 0.0
    lowrank, _, flags = projected(pipeline, [fine, bad], splits)
    assert lowrank.abs().max() < 1e3
    assert flags.tolist() == [0, 1]


@pytest.mark.parametrize("side", SIDES)
def test_a_split_projection_skips_what_is_not_finite(cuda_stand_in: str, pipeline: Pipeline, side: str) -> None:
    p = oriented(40, 1100, 5, side, BF16, eight_bit=True)
    assert pipeline.stages.project_splits(batch_of(pipeline, group_of([p]), [p])) > 1
    check_against_float64(p, cuda_stand_in, "split")
    p.grad.view(-1)[-1] = float("nan")
    got = p.solved(cuda_stand_in)
    assert_same_bits(got.param, p.param, "param")
    assert_same_bits(got.scaled_norm, p.scaled_norm, "scaled_norm")
    assert_same_state(got.state, replace(p.state, skipped=torch.tensor(1)))


# --- groups


@pytest.mark.parametrize("workspace", [None, 1])  # all at once; one at a time
@pytest.mark.parametrize("side", SIDES)
def test_a_group_is_its_members(
    monkeypatch: pytest.MonkeyPatch, cuda_stand_in: str, pipeline: Pipeline, side: str, workspace: int | None
) -> None:
    if workspace is not None:
        monkeypatch.setattr(pipeline_module, "WORKSPACE_BYTES", workspace)
    for basis, apollo in (("gaussian", OPTIONS["APOLLO"]), ("given", OPTIONS["Mini"])):
        problems = [
            oriented(40, 56, 5, side, BF16, eight_bit=True, basis=basis, apollo=apollo, norm=norm, rounding_seed=seed)
            for norm, seed in ((0.5, 7), (0.0, 2**31 + 5), (1e6, 2**62))
        ]
        for i, p in enumerate(problems):
            if isinstance(p.basis, RandomBasis):
                p.basis = replace(p.basis, seed=p.basis.seed + i)
        problems[1].grad[5, 5] = torch.nan
        group = group_of(problems)
        update = pipeline.group(group)
        for _ in range(2):
            update([p.grad for p in problems], problems[0].options)
        for i, p in enumerate(problems):
            first = p.solved(cuda_stand_in)
            then = replace(p, param=first.param, state=first.state, scaled_norm=first.scaled_norm)
            expected = then.solved(cuda_stand_in)
            assert_same_bits(group.params[i], expected.param, f"param {i}")
            assert_same_state(group.states[i], expected.state)
            assert_same_bits(group.scaled_norms[i], expected.scaled_norm, f"scaled_norm {i}")
            assert group.states[i].skipped == (2 if i == 1 else 0)


def test_a_group_of_int8_weights_is_its_members(cuda_stand_in: str, pipeline: Pipeline) -> None:
    problems = []
    for seed in (7, 2**40):
        p = make_problem(37, 300, 5, "left", dtypes=(F32, BF16), eight_bit=True, rounding_seed=seed, lr=0.1)
        codes, scale = quantize_weight(p.param)
        problems.append(replace(p, param=codes, weight_scale=scale))
    group = group_of(problems)
    pipeline.group(group)([p.grad for p in problems], problems[0].options)
    for i, p in enumerate(problems):
        expected = p.solved(cuda_stand_in)
        assert expected.weight_scale is not None
        assert_same_bits(group.params[i], expected.param, f"codes {i}")
        assert_same_bits(group.weight_scales[i], expected.weight_scale, f"scales {i}")


@pytest.mark.parametrize("sums", ["_partial_sums", "_partial_squares"])
def test_no_tensor_changes_where_memory_runs_out(
    monkeypatch: pytest.MonkeyPatch, pipeline: Pipeline, sums: str
) -> None:
    problems = [oriented(40, 1104, 12, "right", BF16, eight_bit=True) for _ in range(9)]
    monkeypatch.setattr(pipeline_module, "WORKSPACE_BYTES", 8 * problems[0].state.exp_avg.numel() * 8)

    def no_memory(pipeline: Pipeline, batch: Batch) -> None:
        if batch.count == 1:
            raise MemoryError

    monkeypatch.setattr(Pipeline, sums, no_memory)
    group = group_of(problems)
    with pytest.raises(MemoryError):
        pipeline.group(group)([p.grad for p in problems], problems[0].options)
    for i, p in enumerate(problems):
        assert_same_bits(group.params[i], p.param, "param")
        assert_same_state(group.states[i], p.state)
        assert_same_bits(group.scaled_norms[i], p.scaled_norm, "scaled_norm")


# --- what the launcher refuses


def test_codes_of_a_basis_have_no_sums_of_squares(pipeline: Pipeline) -> None:
    p = make_problem(8, 16, 8, "right", basis="given")
    group = replace(group_of([p]), bases=(torch.zeros((16, 8), dtype=torch.int8),), basis_scales=(torch.ones(8),))
    batch = with_gradients(make_batch(group), [p.grad])
    with pytest.raises(RuntimeError, match=re.escape("project: CUDA error: invalid argument")):
        pipeline.stages.project(
            batch, new_control(batch), torch.empty((1, 64)), None, final=True, squares=torch.empty((1, 8))
        )


def test_the_norm_of_many_rows_is_exact(pipeline: Pipeline, cuda_stand_in: str) -> None:
    # More rows than the block that sums them has threads.
    p = make_problem(1100, 3, 1, "right", apollo=OPTIONS["no limit"], norm=0.0)
    exact = p.exact()
    assert abs(float(p.solved(cuda_stand_in).scaled_norm) - exact.norm) <= exact.norm_bound
    assert np.isfinite(exact.norm)
