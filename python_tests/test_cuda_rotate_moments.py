"""``rotate_moments`` on the CUDA kernel, executed by the CPU: against float64 from the operation's formula."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
import tolerances
import torch
from torch import Tensor
from update_cases import assert_close, assert_codes_almost_equal, clone, f64, moments, warm_state

from galore_kernels.ops import AdamState, rotate_moments
from galore_kernels.quantizers import block_count

SHAPES = [  # L, r, r'
    (1, 1, 1),  # the smallest
    (300, 3, 1),  # a block of 256 rows of the result, and a last one of 44
    (40, 16, 16),  # sixteen whole rows to a block
    (37, 5, 7),  # odd: a block begins anywhere in a row, and none begins where another does
    (130, 33, 24),  # eleven and a third rows
    (70, 24, 100),  # a row more than half a block's
    (21, 130, 257),  # a row one element longer than a block
    (9, 600, 512),  # rows of two blocks; more columns than are staged at once
    (5, 1024, 1000),  # the largest rank; the last block ends within
    (0, 4, 4),  # nothing
]


def rotation_of(rank: int, new_rank: int) -> Tensor:
    """The overlap of two random bases of nearly the same space, as after a refresh: far from both 0 and 1."""
    size = 2 * max(rank, new_rank)
    old, new = (torch.linalg.qr(torch.randn(size, k))[0] for k in (rank, new_rank))
    return (old.T @ new).contiguous()


def rotated(state: AdamState, rotation: Tensor, backend: str, long_rotation: Tensor | None = None) -> AdamState:
    return rotate_moments(state, rotation, beta1=0.9, beta2=0.999, long_rotation=long_rotation, backend=backend)


def exact(state: AdamState, rotation: Tensor) -> tuple[oracle.Array, oracle.Array, oracle.Array, oracle.Array]:
    """Both moments in float64, and the bounds of float32's errors: a sum of n products errs by n u of its terms'."""
    m, v = moments(state)
    t = f64(rotation)
    step = int(state.step)
    c = (1 - 0.999**step) / (1 - 0.9**step) ** 2 if step else 0.0
    turned = m @ t
    variance = v - c * m**2
    n = (rotation.shape[0] + 8) * tolerances.U32
    m_bound = n * (np.abs(m) @ np.abs(t))
    v_bound = n * ((v + c * m**2) @ t**2 + c * turned**2) + 2 * c * np.abs(turned) * m_bound
    return turned, np.abs(variance @ t**2 + c * turned**2), m_bound, v_bound


@pytest.mark.parametrize("eight_bit", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape(cuda_stand_in: str, shape: tuple[int, int, int], eight_bit: bool) -> None:
    long, rank, new_rank = shape
    state = warm_state((long, rank), eight_bit=eight_bit)
    kept, rotation = clone(state), rotation_of(rank, new_rank)
    got = rotated(state, rotation, cuda_stand_in)
    expected = rotated(kept, rotation, "reference")
    m, v, m_bound, v_bound = exact(kept, rotation)
    if eight_bit:
        assert got.exp_avg_absmax is not None
        assert got.exp_avg_sq_absmax is not None
        assert got.exp_avg_absmax.shape == (block_count(long * new_rank),)
        for name, bound in (("exp_avg", m_bound), ("exp_avg_sq", v_bound)):
            assert_codes_almost_equal(getattr(got, name), getattr(expected, name), tolerances.EQUAL_CODES, name)
            absmax = f64(getattr(expected, f"{name}_absmax"))
            assert_close(getattr(got, f"{name}_absmax"), absmax, 2 * bound.max(initial=0), f"{name}_absmax")
    else:
        assert_close(got.exp_avg, m, m_bound, "exp_avg")
        assert_close(got.exp_avg_sq, v, v_bound, "exp_avg_sq")
    assert got.step is state.step
    for name in ("exp_avg", "exp_avg_sq", "step"):
        assert torch.equal(getattr(state, name), getattr(kept, name))


@pytest.mark.parametrize("eight_bit", [True, False])
@pytest.mark.parametrize("step", [0, 1, 100_000])  # no mean yet; the largest factor; corrections of 1
def test_every_step(cuda_stand_in: str, step: int, eight_bit: bool) -> None:
    state = warm_state((40, 16), eight_bit=eight_bit, step=step)
    rotation = rotation_of(16, 9)
    got = rotated(state, rotation, cuda_stand_in)
    expected = rotated(state, rotation, "reference")
    _, _, m_bound, v_bound = exact(state, rotation)
    if eight_bit:
        assert_codes_almost_equal(got.exp_avg_sq, expected.exp_avg_sq, tolerances.EQUAL_CODES, "exp_avg_sq")
    else:
        assert_close(got.exp_avg, f64(expected.exp_avg), 2 * m_bound, "exp_avg")
        assert_close(got.exp_avg_sq, f64(expected.exp_avg_sq), 2 * v_bound, "exp_avg_sq")


def test_both_sides(cuda_stand_in: str) -> None:
    state = warm_state((12, 16), eight_bit=True)
    turn, long_turn = rotation_of(16, 9), rotation_of(12, 10)
    got = rotated(state, turn, cuda_stand_in, long_turn)
    expected = rotated(state, turn, "reference", long_turn)
    assert torch.equal(got.exp_avg, expected.exp_avg)
    assert torch.equal(got.exp_avg_sq, expected.exp_avg_sq)
