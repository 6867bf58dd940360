"""int8 weights on the CUDA kernels, executed by the CPU, against the reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import oracle
import pytest
import simt
import tolerances
import torch
from test_galore_update import SIDES
from torch import Tensor
from update_cases import assert_same_bits, assert_same_state, clone, f64, options, warm_state

from galore_kernels.backends import pipeline as pipeline_module
from galore_kernels.backends.batch import DTYPE_CODES, TABLE_COLUMNS
from galore_kernels.ops import AdamOptions, AdamState, galore_update, registry
from galore_kernels.ops.group import UpdateGroup
from galore_kernels.quantizers import (
    BASIS_FORMATS,
    GROUP_SIZE,
    basis_codes,
    dequantize_weight,
    quantize_basis,
    quantize_weight,
)

F32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
SCALE = 0.25
#: Every kind of product, of plain bases and of codes.
BASES: list[torch.dtype | str] = [F32, BF16, FP16, *BASIS_FORMATS]

SHAPES = [  # rows and columns of the weight, rank
    (1, 7, 1),  # less than a vector
    (37, 53, 5),  # unaligned rows; the lanes behind a row's end have nothing
    (5, 256, 8),  # one whole group
    (70, 300, 24),  # two tiles of 64 rows, a group of 44 behind a whole one, rows not on 16 bytes
    (66, 528, 16),  # vectors everywhere, the last group one of 16
    (130, 257, 72),  # a group of one element; more ranks than a tile's 64 of 16 bits
    (64, 512, 136),  # whole tiles; both stages in shared memory are used again
]


@dataclass
class Int8:
    """One call on an int8 weight."""

    codes: Tensor
    scale: Tensor
    grad: Tensor
    basis: Tensor
    basis_scale: Tensor | None
    state: AdamState
    options: AdamOptions
    side: str
    long_basis: Tensor | None = None

    def solved(self, backend: str) -> tuple[Tensor, Tensor, AdamState]:
        """Codes, scales and state behind the call."""
        codes, scale, state = self.codes.clone(), self.scale.clone(), clone(self.state)
        galore_update(
            codes,
            self.grad,
            self.basis,
            state,
            self.options,
            side=self.side,
            scale=SCALE,
            long_basis=self.long_basis,
            basis_scale=self.basis_scale,
            weight_scale=scale,
            backend=backend,
        )
        return codes, scale, state


def make(
    rows: int,
    cols: int,
    rank: int,
    side: str,
    basis: torch.dtype | str,
    *,
    grad_dtype: torch.dtype = BF16,
    eight_bit: bool = True,
    **scalars: Any,
) -> Int8:
    """Normal numbers. The step is about one code long, so that scales are kept here and found anew there."""
    long, short = (rows, cols) if side == "right" else (cols, rows)
    codes, scale = quantize_weight(0.02 * torch.randn(rows, cols))
    plain, basis_scale = torch.randn(short, rank) / rank**0.5, None
    if isinstance(basis, str):
        plain, basis_scale = quantize_basis(plain, basis)
    else:
        plain = plain.to(basis)
    state = warm_state((long, rank), eight_bit=eight_bit)
    grad = torch.randn(rows, cols).to(grad_dtype)
    o = options(**{"lr": 1e-3, "rounding_seed": 7, **scalars})
    return Int8(codes, scale, grad, plain, basis_scale, state, o, side)


def with_exact_sums(x: Int8) -> Int8:
    """The same of few bits, without memory: Adam's direction is the sign of R, and no order of sums changes a bit."""
    rank = x.state.exp_avg.shape[1]
    if x.basis_scale is None:
        x = replace(x, basis=torch.randint(-4, 5, x.basis.shape).to(x.basis.dtype) / 8)
    else:
        x = replace(x, basis_scale=2.0 ** (-6 - torch.arange(rank) % 5))
    # Rows that are zero, have no scale, and move away from it or do not.
    x.codes[0], x.scale[0] = 0, 0
    return replace(
        x,
        grad=torch.randint(-4, 5, x.grad.shape).to(x.grad.dtype),
        options=replace(x.options, beta1=0.0, beta2=0.0, eps=0.0),
    )


def assert_same_weight(got: tuple[Tensor, Tensor, AdamState], expected: tuple[Tensor, Tensor, AdamState]) -> None:
    assert_same_bits(got[1], expected[1], "scales")
    assert_same_bits(got[0], expected[0], "codes")
    assert_same_state(got[2], expected[2])


# --- against the reference


@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("shape", SHAPES)
def test_everything_is_the_references_to_the_bit_where_sums_are_exact(
    cuda_stand_in: str, shape: tuple[int, int, int], side: str, basis: torch.dtype | str
) -> None:
    # A decay by 0.4 leaves magnitudes below half of the codes' range: every group takes a new scale.
    shrinking: dict[str, Any] = {"weight_decay": 600.0, "grad_scale": 2.0}
    growing: dict[str, Any] = {"weight_decay": 0.1}
    for grad_dtype, scalars in ((BF16, growing), (F32, shrinking)):
        x = with_exact_sums(make(*shape, side, basis, grad_dtype=grad_dtype, **scalars))
        got = x.solved(cuda_stand_in)
        assert_same_weight(got, x.solved("reference"))
        assert not torch.equal(got[0], x.codes)


@pytest.mark.parametrize("side", SIDES)
def test_scales_are_kept_and_found_anew_side_by_side(cuda_stand_in: str, side: str) -> None:
    x = with_exact_sums(make(70, 300, 24, side, BF16))
    scale = x.solved(cuda_stand_in)[1]
    assert 0.2 < (scale == x.scale).double().mean() < 0.8


def weight_bound(x: Int8, state: AdamState) -> oracle.Array:
    """By how much two sums of the same products may move a new weight apart, before it is rounded to a code.

    ``state``: the new one, in float32, of which both have made the same direction. sqrt(1 - beta2^t) / (1 - beta1^t)
    is below 1; a weight is rounded thrice on either side.
    """
    rank = state.exp_avg.shape[1]
    basis = f64(x.basis) if x.basis_scale is None else f64(basis_codes(x.basis, rank)) * f64(x.basis_scale)
    direction = np.abs(f64(state.exp_avg)) / np.sqrt(f64(state.exp_avg_sq))
    terms = oracle.back_project(direction, np.abs(basis), None, x.side)
    largest = np.abs(f64(dequantize_weight(x.codes, x.scale, F32))) + float(x.options.lr) * SCALE * terms
    return 2 * (rank + 3) * tolerances.U32 * float(x.options.lr) * SCALE * terms + 6 * tolerances.U32 * largest


def in_groups(values: oracle.Array) -> list[oracle.Array]:
    return [values[:, first : first + GROUP_SIZE] for first in range(0, values.shape[1], GROUP_SIZE)]


@pytest.mark.parametrize("basis", [F32, "int8"])
@pytest.mark.parametrize("side", SIDES)
def test_another_order_of_sums_moves_few_codes_and_those_by_one(
    cuda_stand_in: str, side: str, basis: torch.dtype | str
) -> None:
    differ, expected_to = 0, 0.0
    for shape in SHAPES:
        x = make(*shape, side, basis, grad_dtype=F32, eight_bit=False, weight_decay=0.1)
        x = replace(x, grad=torch.eye(*x.grad.shape))  # R is rows of the basis, to the bit
        codes, scale, state = x.solved(cuda_stand_in)
        reference_codes, reference_scale, reference_state = x.solved("reference")
        assert_same_state(state, reference_state)
        bound, step = weight_bound(x, state), f64(reference_scale)
        for group, part in enumerate(in_groups(bound)):
            largest = part.max(axis=1)  # of the group's largest weight, too
            assert (np.abs(f64(scale) - step)[:, group] <= largest / 112).all()
            # The chance that a random fraction falls between two values of weight / scale, of which both parts err.
            of_a_code = (part + largest[:, None] * 127 / 112) / step[:, group, None]
            expected_to += float(np.minimum(of_a_code, 1).sum())
        steps = (codes.int() - reference_codes.int()).abs()
        assert int(steps.max()) <= 1
        differ += int((steps != 0).sum())
    assert differ <= expected_to + 4 * expected_to**0.5 + 1  # four deviations of a Poisson distribution
    assert expected_to < 0.001 * sum(rows * cols for rows, cols, _ in SHAPES)


@pytest.mark.parametrize("side", SIDES)
def test_both_sides_projected(cuda_stand_in: str, side: str) -> None:
    x = with_exact_sums(make(37, 300, 5, side, F32))
    long = x.state.exp_avg.shape[0]
    long_basis = torch.randint(-4, 5, (long, 6)) / 8
    x = replace(x, long_basis=long_basis, state=warm_state((6, 5), eight_bit=True))
    assert_same_weight(x.solved(cuda_stand_in), x.solved("reference"))


# --- what does not move


@pytest.mark.parametrize("basis", [BF16, "int8"])
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("shape", [(37, 53, 5), (66, 528, 16)])  # single codes, and vectors
def test_a_weight_that_is_not_moved_keeps_codes_and_scales(
    cuda_stand_in: str, shape: tuple[int, int, int], side: str, basis: torch.dtype | str
) -> None:
    x = make(*shape, side, basis)
    x = replace(x, grad=torch.zeros_like(x.grad), options=replace(x.options, beta1=0.0))
    codes, scale, state = x.solved(cuda_stand_in)
    assert_same_bits(scale, x.scale, "scales")
    assert_same_bits(codes, x.codes, "codes")
    assert float(state.step) == float(x.state.step) + 1


@pytest.mark.parametrize("shape", [(0, 300, 4), (40, 0, 4)])
def test_weights_without_elements_count_their_steps(cuda_stand_in: str, shape: tuple[int, int, int]) -> None:
    for side in SIDES:
        x = make(*shape, side, BF16)
        assert float(x.solved(cuda_stand_in)[2].step) == float(x.state.step) + 1


@pytest.mark.parametrize("side", SIDES)
def test_a_bad_gradient_changes_nothing(cuda_stand_in: str, side: str) -> None:
    x = make(70, 300, 24, side, BF16)
    x.grad[-1, -1] = float("nan")
    codes, scale, state = x.solved(cuda_stand_in)
    assert_same_weight((codes, scale, state), (x.codes, x.scale, replace(x.state, skipped=torch.tensor(1))))


# --- where the tensors lie


@pytest.mark.parametrize("offset", [1, 8])  # on no vector, and on codes' vectors alone
def test_codes_anywhere_in_memory(cuda_stand_in: str, offset: int) -> None:
    x = make(66, 528, 16, "right", BF16)
    storage = torch.empty(x.codes.numel() + offset, dtype=torch.int8)
    got, expected = replace(x, codes=storage[offset:].view(x.codes.shape).copy_(x.codes)), x.solved(cuda_stand_in)
    codes, scale, state = got.codes, got.scale.clone(), clone(got.state)
    galore_update(
        codes, x.grad, x.basis, state, x.options, side="right", scale=SCALE, weight_scale=scale, backend=cuda_stand_in
    )
    assert_same_weight((codes, scale, state), expected)


@pytest.mark.parametrize("basis", [BF16, *BASIS_FORMATS])
@pytest.mark.parametrize("budget", [2**28, 1])  # all at once, and one at a time
def test_a_group_is_its_matrices(
    cuda_stand_in: str, basis: torch.dtype | str, budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline_module, "WORKSPACE_BYTES", budget)
    seeds = (3, 5, 8)
    # Enough panels of a rank that, of bfloat16 weights, they would go in one pass.
    cases = [make(128, 528, 16, "left", basis, weight_decay=0.1) for _ in seeds]
    group = UpdateGroup(
        "galore_update",
        tuple(x.codes.clone() for x in cases),
        tuple(clone(x.state) for x in cases),
        tuple(x.basis for x in cases),
        "left",
        SCALE,
        seeds,
        tuple(x.basis_scale for x in cases if x.basis_scale is not None),
        tuple(x.scale.clone() for x in cases),
    )
    make_group = registry.select("galore_update", cuda_stand_in, torch.device("cpu")).group
    assert make_group is not None
    make_group(group)([x.grad for x in cases], replace(cases[0].options, rounding_seed=None))
    for i, x in enumerate(cases):
        alone = replace(x, options=replace(x.options, rounding_seed=seeds[i])).solved(cuda_stand_in)
        assert_same_weight((group.params[i], group.weight_scales[i], group.states[i]), alone)


# --- what the bindings refuse


@pytest.fixture
def native_batch() -> Callable[..., Any]:
    def build(weight_dtype: int = DTYPE_CODES[torch.int8], weight_scale: int = 4096, stochastic: bool = True) -> Any:
        row = (0,) * 7 + (weight_scale,) + (0,) * (TABLE_COLUMNS - 8)
        return simt.load().CudaBatch(0, row, 1, 4, 4, 4, 1, 0, weight_dtype, 1, 1, 0, True, stochastic, False)

    return build


def test_int8_weights_need_scales_and_seeds(native_batch: Callable[..., Any]) -> None:
    native_batch()
    with pytest.raises(ValueError, match=r"weight_dtype=3 \(int8\): expected the address of a weight_scale"):
        native_batch(weight_scale=0)
    with pytest.raises(ValueError, match=r"weight_dtype=3 \(int8\): rounded stochastically; pass seeds"):
        native_batch(stochastic=False)
    with pytest.raises(ValueError, match=r"weight_dtype=4: expected one of .*, 3 \(int8\)$"):
        native_batch(weight_dtype=4)


@pytest.mark.parametrize("stage", ["galore_update", "adam_update"])
def test_stages_that_take_no_codes_refuse_them(native_batch: Callable[..., Any], stage: str) -> None:
    with pytest.raises(ValueError, match=r"weight_dtype=3: expected one of .*, 2 \(float16\)$"):
        getattr(simt.load(), f"cuda_{stage}")(native_batch(), 0, 0, 0)
    assert not simt.load().cuda_in_one_pass(native_batch(), 0)
