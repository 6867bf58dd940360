"""Quantized bases on the CUDA kernels, executed by the CPU: against the reference, one pass against four launches."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import oracle
import pytest
import simt
import tolerances
import torch
from simt_backend import simt_pipeline
from test_galore_update import SIDES
from torch import Tensor
from update_cases import (
    assert_almost_same,
    assert_close,
    assert_same_bits,
    assert_same_state,
    clone,
    f64,
    options,
    warm_state,
)

from galore_kernels.backends import pipeline as pipeline_module
from galore_kernels.backends.batch import Batch, make_batch, with_gradients
from galore_kernels.backends.cuda import CudaStages
from galore_kernels.backends.pipeline import Pipeline
from galore_kernels.ops import AdamOptions, AdamState, galore_update, lowrank_update
from galore_kernels.ops.group import UpdateGroup
from galore_kernels.quantizers import BASIS_FORMATS, basis_codes

F32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
SCALE = 0.25
LARGEST = {"int8": 127, "int4": 7}

#: Of weight and gradient: every kind of product, and both where the two kinds of one step differ.
DTYPE_PAIRS = [(F32, F32), (BF16, BF16), (FP16, FP16), (F32, BF16), (BF16, F32)]

SHAPES = [  # long, short, rank
    (37, 53, 5),  # an odd rank: a last byte of one 4-bit code
    (1, 7, 1),  # one code
    (64, 64, 4),  # whole bytes of codes, and no vector of eight
    (304, 200, 24),  # vectors, tails of tiles and of the rank's sixteens; 16-bit: in one pass
    (256, 72, 128),  # the largest rank in one pass
    (40, 272, 264),  # more than two tiles of the basis
]


@dataclass
class Quantized:
    """One call with a quantized basis. Of ``exact_sums`` the low-rank gradient is the same in any order."""

    param: Tensor
    grad: Tensor
    codes: Tensor
    basis_scale: Tensor
    state: AdamState
    options: AdamOptions
    side: str

    def solved(self, backend: str) -> tuple[Tensor, AdamState]:
        param, state = self.param.clone(), clone(self.state)
        galore_update(
            param,
            self.grad,
            self.codes,
            state,
            self.options,
            side=self.side,
            scale=SCALE,
            basis_scale=self.basis_scale,
            backend=backend,
        )
        return param, state

    def solved_by(self, pipeline: Pipeline, seed: int | None = None) -> tuple[Tensor, AdamState]:
        param, state = self.param.clone(), clone(self.state)
        o = replace(self.options, rounding_seed=seed)
        pipeline.galore_update(param, self.grad, self.codes, None, self.basis_scale, state, o, self.side, SCALE)
        return param, state


def codes_of(short: int, rank: int, basis_format: str) -> Tensor:
    """Random codes of the whole range, as they are stored."""
    largest = LARGEST[basis_format]
    whole = torch.randint(-largest, largest + 1, (short, rank), dtype=torch.int8)
    if basis_format == "int8":
        return whole
    packed = torch.zeros(short, -(-rank // 2), dtype=torch.uint8)
    for column in range(rank):
        packed[:, column // 2] |= (whole[:, column].view(torch.uint8) & 0xF) << (column % 2 * 4)
    assert torch.equal(basis_codes(packed, rank), whole.float())
    return packed


def quantized(
    long: int,
    short: int,
    rank: int,
    side: str,
    basis_format: str,
    dtypes: tuple[torch.dtype, torch.dtype] = (BF16, BF16),
    *,
    eight_bit: bool = True,
    exact_sums: bool = False,
    **scalars: Any,
) -> Quantized:
    rows, cols = (long, short) if side == "right" else (short, long)
    grad = torch.randint(-4, 5, (rows, cols)) if exact_sums else torch.randn(rows, cols)
    return Quantized(
        param=torch.randn(rows, cols).to(dtypes[0]),
        grad=grad.to(dtypes[1]),
        codes=codes_of(short, rank, basis_format),
        # No two columns' are alike, nor near 1.
        basis_scale=(0.5 + torch.rand(rank)) / (LARGEST[basis_format] * short**0.5),
        state=warm_state((long, rank), eight_bit=eight_bit),
        options=options(**scalars),
        side=side,
    )


def group_of(cases: list[Quantized], seeds: tuple[int, ...] | None = None) -> UpdateGroup:
    return UpdateGroup(
        "galore_update",
        tuple(x.param.clone() for x in cases),
        tuple(clone(x.state) for x in cases),
        tuple(x.codes for x in cases),
        cases[0].side,
        SCALE,
        seeds,
        tuple(x.basis_scale for x in cases),
    )


def tabled(pipeline: Pipeline, cases: list[Quantized]) -> Batch:
    return pipeline.tabled(with_gradients(make_batch(group_of(cases)), [x.grad for x in cases]))


def weight_bound(x: Quantized, expected: Tensor) -> oracle.Array:
    """By how much two sums of the same products, u * basis_scale with codes, may move a weight apart.

    |u| is below 8 in a warm state, and sqrt(1 - beta2^t) / (1 - beta1^t) below 1; two roundings of the weight itself.
    """
    rank = x.basis_scale.shape[0]
    codes = np.abs(f64(basis_codes(x.codes, rank))) @ f64(x.basis_scale)  # |sum over the rank|, for each short index
    change = 2 * (rank + 3) * tolerances.U32 * 8 * float(x.options.lr) * SCALE * codes
    change = change[None, :] if x.side == "right" else change[:, None]
    larger = np.maximum(np.abs(f64(expected)), np.abs(f64(x.param)))
    own = tolerances.ulp(larger, x.param.dtype) if x.param.dtype != F32 else 6 * tolerances.U32 * larger
    return change + own


@pytest.fixture
def pipeline() -> Pipeline:
    return simt_pipeline()


# --- against the reference


@pytest.mark.parametrize("dtypes", DTYPE_PAIRS)
@pytest.mark.parametrize("basis_format", BASIS_FORMATS)
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("shape", SHAPES)
def test_states_are_the_references_to_the_bit_and_weights_but_for_the_order_of_sums(
    cuda_stand_in: str,
    shape: tuple[int, int, int],
    side: str,
    basis_format: str,
    dtypes: tuple[torch.dtype, torch.dtype],
) -> None:
    for eight_bit in (True, False):
        x = quantized(
            *shape, side, basis_format, dtypes, eight_bit=eight_bit, exact_sums=True, weight_decay=0.1, grad_scale=3.0
        )
        got, got_state = x.solved(cuda_stand_in)
        expected, expected_state = x.solved("reference")
        assert_same_state(got_state, expected_state)
        assert_close(got, f64(expected), weight_bound(x, expected), f"param, 8-bit: {eight_bit}")


@pytest.mark.parametrize("basis_format", BASIS_FORMATS)
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_the_scaled_direction_is_rounded_to_the_weights_dtype(
    cuda_stand_in: str, side: str, basis_format: str, dtype: torch.dtype
) -> None:
    # From zero, so that the change itself is what is rounded: were the direction not, every third would differ.
    for shape in ((304, 200, 24), (37, 53, 5)):  # in one pass, and in four launches
        x = quantized(*shape, side, basis_format, (dtype, dtype), exact_sums=True)
        x.param.zero_()
        got, expected = x.solved(cuda_stand_in)[0], x.solved("reference")[0]
        assert (got == expected).double().mean() > 0.98


@pytest.mark.parametrize("basis_format", BASIS_FORMATS)
@pytest.mark.parametrize("side", SIDES)
def test_lowrank_update_is_galore_update_after_its_projection(cuda_stand_in: str, side: str, basis_format: str) -> None:
    for dtypes in DTYPE_PAIRS:
        x = quantized(37, 53, 5, side, basis_format, dtypes, exact_sums=True, weight_decay=0.1)
        oriented = x.grad.float() if side == "right" else x.grad.float().T
        lowrank = (oriented @ basis_codes(x.codes, 5)) * x.basis_scale
        param, state = x.param.clone(), clone(x.state)
        lowrank_update(
            param,
            lowrank,
            x.codes,
            state,
            x.options,
            side=side,
            scale=SCALE,
            basis_scale=x.basis_scale,
            backend=cuda_stand_in,
        )
        expected, expected_state = x.solved(cuda_stand_in)
        assert_same_bits(param, expected, f"param, {dtypes}")
        assert_same_state(state, expected_state)


@pytest.mark.parametrize("basis_format", BASIS_FORMATS)
@pytest.mark.parametrize("side", SIDES)
def test_the_short_dimension_is_split(cuda_stand_in: str, pipeline: Pipeline, side: str, basis_format: str) -> None:
    for rank in (5, 8):
        x = quantized(40, 1100, rank, side, basis_format, maximize=True)
        assert pipeline.stages.project_splits(tabled(pipeline, [x])) > 1
        assert_almost_same(*x.solved(cuda_stand_in), *x.solved("reference"), f"rank {rank}")


# --- one pass


@pytest.mark.parametrize("basis_format", BASIS_FORMATS)
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("shape", [(256, 64, 8), (304, 200, 24), (200, 136, 120), (512, 72, 128)])
def test_one_pass_equals_four_launches_to_the_bit(
    pipeline: Pipeline, shape: tuple[int, int, int], side: str, basis_format: str
) -> None:
    class Stages(CudaStages):
        def in_one_pass(self, batch: Batch) -> bool:
            return False

    four_launches = Pipeline(Stages(simt.load(), "cpu"))
    for dtype, seed in ((BF16, None), (BF16, 7), (FP16, None)):
        x = quantized(*shape, side, basis_format, (dtype, dtype), weight_decay=0.1, grad_scale=3.0)
        assert pipeline.stages.in_one_pass(tabled(pipeline, [x]))
        (got, got_state), (expected, expected_state) = x.solved_by(pipeline, seed), x.solved_by(four_launches, seed)
        assert_same_bits(got, expected, f"param, {dtype}")
        assert_same_state(got_state, expected_state)


@pytest.mark.parametrize("basis_format", BASIS_FORMATS)
def test_what_does_not_go_in_one_pass(pipeline: Pipeline, basis_format: str) -> None:
    def one_pass(rank: int, dtypes: tuple[torch.dtype, torch.dtype] = (BF16, BF16), offset: int = 0) -> bool:
        x = quantized(512, 64, rank, "right", basis_format, dtypes)
        storage = torch.empty(x.codes.numel() + offset, dtype=x.codes.dtype)
        return pipeline.stages.in_one_pass(
            tabled(pipeline, [replace(x, codes=storage[offset:].view(x.codes.shape).copy_(x.codes))])
        )

    assert one_pass(8)
    assert not one_pass(12)  # rows of no whole eight codes
    assert not one_pass(136)
    assert not one_pass(8, (F32, F32))
    assert not one_pass(8, (BF16, FP16))
    assert not one_pass(8, offset=4)  # an address


@pytest.mark.parametrize("basis_format", BASIS_FORMATS)
@pytest.mark.parametrize("side", SIDES)
def test_a_bad_gradient_changes_nothing(pipeline: Pipeline, side: str, basis_format: str) -> None:
    for rank in (16, 12):  # in one pass, and in four launches
        x = quantized(512, 64, rank, side, basis_format)
        x.grad[-1, -1] = float("nan")
        param, state = x.solved_by(pipeline)
        assert_same_bits(param, x.param, "param")
        assert_same_state(state, replace(x.state, skipped=torch.tensor(1)))


# --- groups


@pytest.mark.parametrize("basis_format", BASIS_FORMATS)
@pytest.mark.parametrize("rank", [16, 13])  # in one pass, and in four launches
@pytest.mark.parametrize("seeds", [None, (3, 5, 8)])
@pytest.mark.parametrize("budget", [2**28, 1])  # all at once, and one at a time
def test_a_group_is_its_matrices(
    pipeline: Pipeline,
    rank: int,
    seeds: tuple[int, ...] | None,
    budget: int,
    basis_format: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pipeline_module, "WORKSPACE_BYTES", budget)
    cases = [quantized(264, 72, rank, "left", basis_format, weight_decay=0.1) for _ in range(3)]
    group = group_of(cases, seeds)
    pipeline.group(group)([x.grad for x in cases], cases[0].options)
    for i, x in enumerate(cases):
        param, state = x.solved_by(pipeline, None if seeds is None else seeds[i])
        assert_same_bits(group.params[i], param, f"param {i}")
        assert_same_state(group.states[i], state)
