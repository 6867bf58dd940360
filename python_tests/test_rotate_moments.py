"""Moments carried to another basis: against float64, between backends, and what must hold of them in any basis."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import oracle
import pytest
import tolerances
import torch
from test_ops_library import RANK, ROWS, scrambled, turn_arguments
from torch import Tensor
from torch.library import opcheck
from update_cases import (
    assert_close,
    assert_codes_almost_equal,
    assert_same_bits,
    assert_same_state,
    clone,
    f64,
    moments,
    tensors,
    warm_state,
)

from galore_kernels.ops import AdamState, rotate_moments
from galore_kernels.quantizers import dynamic_map

SHAPES = [  # L, r, r'
    (1, 1, 1),  # the smallest
    (7, 3, 5),  # more columns than before, in part of a block
    (51, 5, 5),  # 255 elements: around one quantization block
    (64, 4, 4),  # 256
    (257, 1, 1),  # 257: a row is an element
    (600, 1, 3),  # blocks begin every 256 rows, in the middle of the old ones
    (9, 70, 300),  # a block ends within a row
    (300, 33, 7),  # vectors and tiles with tails
    (130, 24, 24),  # blocks begin every 32 rows
    (70, 130, 129),  # a rank one past vectors and tiles; fewer columns than before
    (40, 256, 256),  # a row is a block
    (15, 1024, 65),  # a long sum
]

BETA1, BETA2 = 0.9, 0.999


def turned(state: AdamState, rotation: Tensor, backend: str, long_rotation: Tensor | None = None) -> AdamState:
    """The operation, with a check that it changes nothing and gives memory of its own."""
    before, matrix = clone(state), rotation.clone()
    result = rotate_moments(state, rotation, beta1=BETA1, beta2=BETA2, long_rotation=long_rotation, backend=backend)
    assert_same_state(state, before)
    assert_same_bits(rotation, matrix, "rotation")
    old = {tensor.data_ptr() for tensor in tensors(state).values() if tensor.numel()}
    new = {tensor.data_ptr() for tensor in tensors(result).values() if tensor.numel()}
    assert old & new == {state.step.data_ptr(), state.skipped.data_ptr()}
    assert result.step is state.step
    assert result.skipped is state.skipped
    long = state.exp_avg.shape[0] if long_rotation is None else long_rotation.shape[1]
    assert result.exp_avg.shape == result.exp_avg_sq.shape == (long, rotation.shape[1])
    return result


def random_rotation(rank: int, new_rank: int) -> Tensor:
    """P_old.T @ P_new of two random orthonormal bases that share most of what they span."""
    short = max(rank, new_rank) + 2
    old = torch.linalg.qr(torch.randn(short, rank).double())[0]
    new = torch.linalg.qr(torch.randn(short, new_rank).double())[0]
    return (old.T @ new).float().contiguous()


def check_against_float64(
    state: AdamState, rotation: Tensor, long_rotation: Tensor | None, backend: str, what: str
) -> None:
    exact = tolerances.rotate_moments(
        *moments(state),
        f64(rotation),
        None if long_rotation is None else f64(long_rotation),
        BETA1,
        BETA2,
        int(state.step),
    )
    got = turned(state, rotation, backend, long_rotation)
    for name, value, bound in (("exp_avg", exact.m, exact.m_bound), ("exp_avg_sq", exact.v, exact.v_bound)):
        result, absmax = getattr(got, name), getattr(got, f"{name}_absmax")
        if absmax is None:
            assert_close(result, value, bound, f"{name}, {what}")
        else:
            codes, expected = oracle.quantize(value.astype(np.float32), dynamic_map(name == "exp_avg").numpy())
            assert_codes_almost_equal(result, codes, tolerances.EQUAL_CODES, f"{name}, {what}")
            assert_close(absmax, expected.astype(np.float64), bound.max(initial=0), f"{name}_absmax, {what}")


# --- against float64


@pytest.mark.parametrize("eight_bit", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_follows_the_formula(backend: str, shape: tuple[int, int, int], eight_bit: bool) -> None:
    long, rank, new_rank = shape
    # After one step m*m is all of v; after 3 a good part; after 1000 the corrections are nearly 1.
    for step in (1, 3, 1000):
        state = warm_state((long, rank), eight_bit=eight_bit, step=step)
        check_against_float64(state, random_rotation(rank, new_rank), None, backend, f"step {step}")


@pytest.mark.parametrize("eight_bit", [True, False])
def test_both_sides(backend: str, eight_bit: bool) -> None:
    for long, rank, new_long, new_rank in ((5, 5, 5, 5), (3, 7, 9, 2), (1, 1, 1, 1), (40, 30, 33, 20)):
        state = warm_state((long, rank), eight_bit=eight_bit)
        turns = random_rotation(rank, new_rank), random_rotation(long, new_long)
        check_against_float64(state, *turns, backend, f"{(long, rank, new_long, new_rank)}")


def test_any_matrix_is_taken(backend: str) -> None:
    # Of no orthonormal bases: T*T is no longer small where T is.
    check_against_float64(warm_state((60, 20), eight_bit=False), 3 * torch.randn(20, 10), None, backend, "random")


def test_unusual_betas(backend: str) -> None:
    state, rotation = warm_state((20, 6), eight_bit=False), random_rotation(6, 6)
    for beta1, beta2 in ((0.0, 0.999), (0.0, 0.0), (0.7, 0.95)):  # v = m*m without memory
        exact = tolerances.rotate_moments(*moments(state), f64(rotation), None, beta1, beta2, 3)
        got = rotate_moments(state, rotation, beta1=beta1, beta2=beta2, backend=backend)
        assert_close(got.exp_avg, exact.m, exact.m_bound, "exp_avg")
        assert_close(got.exp_avg_sq, exact.v, exact.v_bound, "exp_avg_sq")


# --- what holds in any basis


@pytest.mark.parametrize("eight_bit", [True, False])
def test_moments_before_the_first_step_stay_zero(backend: str, eight_bit: bool) -> None:
    state = AdamState.zeros((70, 9), eight_bit=eight_bit)
    expected = AdamState.zeros((70, 5), eight_bit=eight_bit)
    assert_same_state(turned(state, random_rotation(9, 5), backend), expected)


def test_no_moments_at_all(backend: str) -> None:
    for eight_bit in (True, False):
        assert turned(AdamState.zeros((0, 9), eight_bit=eight_bit), random_rotation(9, 5), backend).exp_avg.numel() == 0


def test_there_and_back_gives_the_first_moment_again(backend: str) -> None:
    state = warm_state((50, 12), eight_bit=False)
    rotation = torch.linalg.qr(torch.randn(12, 12).double())[0].float().contiguous()
    back = turned(turned(state, rotation, backend), rotation.T.contiguous(), backend)
    # Each product errs by r u of the sum of its magnitudes; rotation @ rotation.T is the identity to sqrt(r) u.
    magnitudes = np.abs(f64(state.exp_avg)) @ np.abs(f64(rotation)) @ np.abs(f64(rotation)).T
    assert_close(back.exp_avg, f64(state.exp_avg), 3 * 13 * tolerances.U32 * magnitudes, "exp_avg")


def test_the_same_basis_changes_nothing_but_roundings(backend: str) -> None:
    state = warm_state((50, 12), eight_bit=False)
    got = turned(state, torch.eye(12), backend)
    assert_same_bits(got.exp_avg, state.exp_avg, "exp_avg")
    v, mean = f64(state.exp_avg_sq), f64(state.exp_avg) ** 2
    assert_close(got.exp_avg_sq, v, 8 * tolerances.U32 * (v + mean), "exp_avg_sq")
    eight_bit = warm_state((50, 12), eight_bit=True)
    assert_same_bits(turned(eight_bit, torch.eye(12), backend).exp_avg, eight_bit.exp_avg, "codes")


@pytest.mark.parametrize("eight_bit", [True, False])
def test_second_moments_are_never_negative_and_positive_ones_never_zero(backend: str, eight_bit: bool) -> None:
    # The variance may be estimated below zero: here m*m is far beyond v in every other row.
    state = warm_state((200, 16), eight_bit=False)
    state.exp_avg[::2] *= 10
    state.exp_avg_sq[:, ::3] *= 1e-7  # below the smallest code
    rotation = random_rotation(16, 15)
    exact = f64(turned(state, rotation, "reference").exp_avg_sq)
    assert (exact > 0).all()
    if eight_bit:
        state = quantized(state)
    got = moments(turned(state, rotation, backend))[1]
    assert (got > 0).all()


def quantized(state: AdamState) -> AdamState:
    """The state with 8-bit moments."""
    m_codes, m_absmax = oracle.quantize(state.exp_avg.numpy(), dynamic_map(True).numpy())
    v_codes, v_absmax = oracle.quantize(state.exp_avg_sq.numpy(), dynamic_map(False).numpy())
    codes = {"exp_avg": m_codes, "exp_avg_absmax": m_absmax, "exp_avg_sq": v_codes, "exp_avg_sq_absmax": v_absmax}
    return replace(state, **{name: torch.from_numpy(x) for name, x in codes.items()})


def test_a_subspace_that_is_lost_takes_its_moments_along(backend: str) -> None:
    state = warm_state((30, 4), eight_bit=True)
    nothing = turned(state, torch.zeros(4, 6), backend)
    assert_same_state(replace(nothing, step=torch.zeros(())), AdamState.zeros((30, 6), eight_bit=True))


# --- backends against the reference


@pytest.mark.parametrize("shape", SHAPES)
def test_codes_agree_to_the_bit_where_sums_are_exact(fast_backend: str, shape: tuple[int, int, int]) -> None:
    # Columns of one +-1, and of zeros: every sum has one term.
    long, rank, new_rank = shape
    rotation = torch.zeros(rank, new_rank)
    for column, row in enumerate(torch.randperm(rank).tolist()[:new_rank]):
        rotation[row, column] = -1.0 if column % 2 else 1.0
    eight_bit = warm_state((long, rank), eight_bit=True)
    assert_same_state(turned(eight_bit, rotation, fast_backend), turned(eight_bit, rotation, "reference"))
    state = warm_state((long, rank), eight_bit=False)
    got, expected = turned(state, rotation, fast_backend), turned(state, rotation, "reference")
    assert torch.equal(got.exp_avg, expected.exp_avg)  # where a zero may have either sign
    assert torch.equal(got.exp_avg_sq, expected.exp_avg_sq)


@pytest.mark.parametrize("shape", SHAPES)
def test_backends_agree_with_the_reference(fast_backend: str, shape: tuple[int, int, int]) -> None:
    long, rank, new_rank = shape
    state, rotation = warm_state((long, rank), eight_bit=True), random_rotation(rank, new_rank)
    got, expected = turned(state, rotation, fast_backend), turned(state, rotation, "reference")
    exact = tolerances.rotate_moments(*moments(state), f64(rotation), None, BETA1, BETA2, 3)
    for name, bound in (("exp_avg", exact.m_bound), ("exp_avg_sq", exact.v_bound)):
        assert_codes_almost_equal(getattr(got, name), getattr(expected, name), tolerances.EQUAL_CODES, name)
        absmax = f64(getattr(expected, f"{name}_absmax"))
        assert_close(getattr(got, f"{name}_absmax"), absmax, 2 * bound.max(), f"{name}_absmax")


@pytest.mark.parametrize("shape", [(600, 1, 3), (900, 33, 31)])  # panels of 256 rows
def test_threads_change_nothing(fast_backend: str, shape: tuple[int, int, int]) -> None:
    long, rank, new_rank = shape
    for eight_bit in (True, False):
        state, rotation = warm_state((long, rank), eight_bit=eight_bit), random_rotation(rank, new_rank)
        torch.set_num_threads(1)
        expected = turned(state, rotation, fast_backend)
        for threads in (2, 7):  # two; more than there are cores
            torch.set_num_threads(threads)
            assert_same_state(turned(state, rotation, fast_backend), expected)


# --- torch.library, and every check


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("eight_bit", [True, False])
def test_opcheck_accepts_rotate_moments(backend: str, eight_bit: bool, both: bool) -> None:
    arguments = turn_arguments(eight_bit=eight_bit, both=both)
    state = arguments["state"]
    moments = (state.exp_avg, state.exp_avg_sq, state.exp_avg_absmax, state.exp_avg_sq_absmax, state.step)
    positional = (*moments, arguments["rotation"], arguments["long_rotation"])
    keywords = {"beta1": 0.9, "beta2": 0.999, "backend": backend}
    opcheck(torch.ops.galore_kernels.rotate_moments.default, positional, keywords)


#: What is wrong with a call of rotate_moments -> the words of the message, and the argument that makes it so.
BAD_TURNS: dict[str, tuple[str, Callable[[AdamState], dict[str, Any]]]] = {
    "flat moments": ("exp_avg must be a matrix", lambda s: {"state": replace(s, exp_avg=s.exp_avg.flatten())}),
    "moments of two sizes": ("exp_avg_sq must be of", lambda s: {"state": replace(s, exp_avg_sq=s.exp_avg_sq[:-1])}),
    "moment dtype": ("exp_avg_sq must be", lambda s: {"state": replace(s, exp_avg_sq=s.exp_avg_sq.half())}),
    "moment strides": ("exp_avg must be contiguous", lambda s: {"state": replace(s, exp_avg=scrambled(s.exp_avg))}),
    "one absmax": ("both tensors or both None", lambda s: {"state": replace(s, exp_avg_absmax=None)}),
    "absmax shape": ("exp_avg_absmax must be of shape", lambda s: {"state": replace(s, exp_avg_absmax=torch.ones(2))}),
    "integer step": ("step must be", lambda s: {"state": replace(s, step=s.step.long())}),
    "rotation of another rank": ("rotation must be of shape", lambda s: {"rotation": torch.ones(RANK + 1, 2)}),
    "rotation to rank 0": ("rotation must be of shape", lambda s: {"rotation": torch.ones(RANK, 0)}),
    "rotation of one dimension": ("rotation must be of shape", lambda s: {"rotation": torch.ones(RANK)}),
    "rotation dtype": ("rotation must be torch.float32", lambda s: {"rotation": torch.ones(RANK, 2).double()}),
    "rotation strides": ("rotation must be contiguous", lambda s: {"rotation": torch.ones(2, RANK).T}),
    "rotation elsewhere": ("rotation must be on cpu", lambda s: {"rotation": torch.ones(RANK, 2, device="meta")}),
    "long_rotation size": ("long_rotation must be of shape", lambda s: {"long_rotation": torch.ones(ROWS + 1, 2)}),
    "long_rotation strides": ("long_rotation must be contiguous", lambda s: {"long_rotation": torch.ones(2, ROWS).T}),
    "beta1 of 1": ("beta1 must be in", lambda s: {"beta1": 1.0}),
    "beta2 negative": ("beta2 must be in", lambda s: {"beta2": -0.1}),
    "beta2 NaN": ("beta2 must be in", lambda s: {"beta2": float("nan")}),
}


@pytest.mark.parametrize("what", BAD_TURNS)
def test_bad_turns_are_refused(backend: str, what: str) -> None:
    message, change = BAD_TURNS[what]
    arguments = turn_arguments()
    arguments |= change(arguments["state"])
    with pytest.raises(ValueError, match=message) as raised:
        rotate_moments(**arguments, backend=backend)
    assert str(raised.value).startswith("rotate_moments:")
