"""The Triton kernel that carries moments to another basis, beside the reference and beside float64.

On a machine with a GPU it runs there, else in Triton's interpreter.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from triton_device import BACKEND, DEVICE, moved_state
from update_cases import assert_close, assert_codes_almost_equal, assert_same_bits, clone, f64, moments, warm_state

from galore_kernels import ops
from galore_kernels.backends.triton import configuration
from galore_kernels.ops import AdamState

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(BACKEND.refuses(DEVICE) is not None, reason=str(BACKEND.refuses(DEVICE)))

CPU = torch.device("cpu")
BETAS = (0.9, 0.99)
U32 = 2.0**-24

#: Several tiles of rows, of columns and of what is summed; blocks of 256 elements lie across them.
SMALL = {"rows": 16, "columns": 32, "depth": 16}

SHAPES = [
    (48, 64, 64),  # whole tiles, a block is four rows
    (37, 19, 23),  # no tile and no block is whole, the rank grows
    (5, 200, 131),  # a row is longer than a block or shorter; the rank shrinks
    (3, 1, 1),
]


def rotation_of(rank: int, new_rank: int) -> Tensor:
    return torch.randn(rank, new_rank) / max(rank, new_rank) ** 0.5


def rotated(state: AdamState, rotation: Tensor, long_rotation: Tensor | None = None) -> AdamState:
    """By the Triton backend; CPU tensors in, CPU tensors out."""
    long = len(state.exp_avg) if long_rotation is None else long_rotation.shape[1]
    source = moved_state(state)
    target = AdamState.zeros((long, rotation.shape[1]), eight_bit=state.exp_avg_absmax is not None, device=DEVICE)
    turns = [None if turn is None else turn.to(DEVICE) for turn in (rotation, long_rotation)]
    BACKEND.kernels["rotate_moments"](source, target, *turns, *BETAS)
    for name in ("exp_avg", "exp_avg_sq", "step"):
        assert_same_bits(getattr(source, name).cpu(), getattr(state, name), f"{name} of the source")
    return moved_state(target, CPU)


def exact(state: AdamState, rotation: Tensor) -> tuple[Any, Any, Any, Any]:
    """Both moments in float64, and bounds of a float32 computation's errors: of sums, of the mean's square, and 8 u."""
    m, v = moments(state)
    t, turn, (beta1, beta2) = int(state.step), f64(rotation), BETAS
    c = (1 - beta2**t) / (1 - beta1**t) ** 2 if t else 0.0
    turned = m @ turn
    terms, rounding = np.abs(m) @ np.abs(turn), (len(turn) + 8) * U32
    magnitudes = (v + c * m * m) @ (turn * turn) + c * terms * terms
    second = np.abs((v - c * m * m) @ (turn * turn) + c * turned * turned)
    return turned, second, rounding * terms, 3 * rounding * magnitudes


@pytest.mark.parametrize("step", [0, 1, 7, 10**5])
@pytest.mark.parametrize("shape", SHAPES)
def test_float32_moments_are_the_formulas(shape: tuple[int, int, int], step: int) -> None:
    long, rank, new_rank = shape
    state, rotation = warm_state((long, rank), eight_bit=False, step=step), rotation_of(rank, new_rank)
    m, v, m_bound, v_bound = exact(state, rotation)
    for tile in ({}, SMALL):
        with configuration.override(rotate_moments=tile):
            got = rotated(state, rotation)
        assert_close(got.exp_avg, m, m_bound, "exp_avg")
        assert_close(got.exp_avg_sq, v, v_bound, "exp_avg_sq")


@pytest.mark.parametrize("step", [0, 7])
@pytest.mark.parametrize("shape", SHAPES)
def test_8bit_moments_are_the_references(shape: tuple[int, int, int], step: int) -> None:
    long, rank, new_rank = shape
    state, rotation = warm_state((long, rank), eight_bit=True, step=step), rotation_of(rank, new_rank)
    expected = ops.rotate_moments(clone(state), rotation, beta1=BETAS[0], beta2=BETAS[1], backend="reference")
    for tile in ({}, SMALL):
        with configuration.override(rotate_moments=tile, quantize_blockwise={"blocks": 2}):
            got = rotated(state, rotation)
        for name in ("exp_avg", "exp_avg_sq"):
            assert_codes_almost_equal(getattr(got, name), getattr(expected, name), 0.999, name)
            absmax, other = getattr(got, f"{name}_absmax"), getattr(expected, f"{name}_absmax")
            assert torch.allclose(absmax, other, rtol=(rank + 8) * 4 * U32, atol=0), name


def test_a_positive_second_moment_stays_positive() -> None:
    # Beside one that is 10^9 times larger, whose block it shares.
    state = AdamState.zeros((2, 2), eight_bit=True)
    m, v = torch.zeros(2, 2), torch.tensor([[1e-9, 1.0], [1e-9, 1.0]])
    for name, moment, signed in (("exp_avg", m, True), ("exp_avg_sq", v, False)):
        codes, absmax = ops.quantize_blockwise(moment, signed, backend="reference")
        getattr(state, name).copy_(codes)
        getattr(state, f"{name}_absmax").copy_(absmax)
    state.step.fill_(5)
    got = rotated(state, torch.eye(2))
    assert (got.exp_avg_sq > 0).all()


@pytest.mark.parametrize("eight_bit", [True, False])
def test_without_rows_nothing_is_launched(eight_bit: bool) -> None:
    got = rotated(warm_state((0, 3), eight_bit=eight_bit), rotation_of(3, 2))
    assert got.exp_avg.shape == (0, 2)


@pytest.mark.parametrize("eight_bit", [True, False])
def test_both_sides_turn(eight_bit: bool) -> None:
    state, rotation, long_rotation = warm_state((12, 9), eight_bit=eight_bit), rotation_of(9, 7), rotation_of(12, 10)
    expected = ops.rotate_moments(
        clone(state), rotation, beta1=BETAS[0], beta2=BETAS[1], long_rotation=long_rotation, backend="reference"
    )
    got = rotated(state, rotation, long_rotation)
    for a, b in zip(moments(got), moments(expected), strict=True):
        assert np.allclose(a, b, rtol=1e-5, atol=1e-7)
