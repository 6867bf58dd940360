"""The GaLore step with a quantized basis: codes and one scale for each column."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import oracle
import pytest
import tolerances
import torch
from test_galore_update import SHAPES, SIDES, Problem, check_against_float64, make_problem
from update_cases import (
    DTYPES,
    HYPERPARAMETERS,
    assert_almost_same,
    assert_close,
    assert_same_bits,
    assert_same_state,
    clone,
    f64,
)

from galore_kernels.ops import AdamState, galore_update, lowrank_update
from galore_kernels.quantizers import BASIS_FORMATS, quantize_basis

DTYPE_PAIRS = [  # of weight and gradient
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),  # matrix units' own products: codes are exact in bfloat16
    (torch.float16, torch.float16),
    (torch.float32, torch.bfloat16),  # a master weight: the direction is not rounded
    (torch.bfloat16, torch.float32),  # gradients accumulated in float32
]


def quantized_problem(
    rows: int,
    cols: int,
    rank: int,
    side: str,
    basis_format: str,
    *,
    dtypes: tuple[torch.dtype, torch.dtype] = DTYPE_PAIRS[0],
    exact_sums: bool = False,
    **keywords: Any,
) -> Problem:
    """``make_problem`` with its basis quantized. With ``exact_sums`` the scales are powers of two, all different."""
    p = make_problem(rows, cols, rank, side, dtypes=(*dtypes, torch.float32), exact_sums=exact_sums, **keywords)
    if exact_sums:
        codes, _ = quantize_basis(8 * p.basis, basis_format)
        return replace(p, basis=codes, basis_scale=2.0 ** (-2 - torch.arange(rank) % 5))
    # Columns of different lengths: their scales differ by far more than any rounding.
    codes, scale = quantize_basis(p.basis * (1 + torch.arange(rank) % 4), basis_format)
    return replace(p, basis=codes, basis_scale=scale)


# --- against float64


@pytest.mark.parametrize("basis_format", BASIS_FORMATS)
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("shape", SHAPES)  # odd ranks too, which leave half of an int4 row's last byte
def test_every_shape_follows_the_paper(backend: str, shape: tuple[int, int, int], side: str, basis_format: str) -> None:
    for dtypes, eight_bit in zip(DTYPE_PAIRS, (False, True, False, True, True), strict=True):
        p = quantized_problem(*shape, side, basis_format, dtypes=dtypes, eight_bit=eight_bit, weight_decay=0.1)
        check_against_float64(p, backend, f"{dtypes}, 8-bit: {eight_bit}")


@pytest.mark.parametrize("case", HYPERPARAMETERS)
@pytest.mark.parametrize("basis_format", BASIS_FORMATS)
def test_every_hyperparameter_follows_the_paper(backend: str, basis_format: str, case: str) -> None:
    for side in SIDES:
        p = quantized_problem(37, 53, 5, side, basis_format, **HYPERPARAMETERS[case])
        check_against_float64(p, backend, side)


@pytest.mark.parametrize("basis_format", BASIS_FORMATS)
def test_every_combination_of_dtypes(backend: str, basis_format: str) -> None:
    for weight_dtype in DTYPES:
        for grad_dtype in DTYPES:
            p = quantized_problem(19, 35, 7, "left", basis_format, dtypes=(weight_dtype, grad_dtype))
            check_against_float64(p, backend, f"{weight_dtype}, {grad_dtype}")


@pytest.mark.parametrize("basis_format", BASIS_FORMATS)
@pytest.mark.parametrize("side", SIDES)
def test_every_code_is_read(backend: str, side: str, basis_format: str) -> None:
    # Row k of the basis is code k in every column: with a gradient that picks one row each, R is the codes, exactly.
    largest = {"int8": 127, "int4": 7}[basis_format]
    values = torch.arange(-largest, largest + 1).float()
    codes, scale = quantize_basis(values[:, None].repeat(1, 3), basis_format)
    assert scale.tolist() == [1.0, 1.0, 1.0]
    column_scale = torch.tensor([1.0, 0.5, 4.0])
    n = len(values)
    state = AdamState.zeros((n, 3), eight_bit=False)
    p = make_problem(n, n, 3, side, beta1=0.0)
    p = replace(p, basis=codes, basis_scale=column_scale, state=state, grad=torch.eye(n))
    assert_same_bits(p.solved(backend)[1].exp_avg, values[:, None] * column_scale, "exp_avg")


@pytest.mark.parametrize("basis_format", BASIS_FORMATS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_scaled_direction_is_rounded_to_a_16bit_weights_dtype(
    backend: str, dtype: torch.dtype, basis_format: str
) -> None:
    # The bound of the other tests lets single elements be rounded the other way. From zero weights nearly all would
    # be another number of the dtype if none were rounded, or if the direction were rounded before it is scaled.
    for side in SIDES:
        p = quantized_problem(60, 90, 4, side, basis_format, dtypes=(dtype, torch.float32), lr=4.0)
        p.param.zero_()
        got = f64(p.solved(backend)[0])
        rounded, unrounded = (
            tolerances.rounded(p.exact(rounded_direction=rounds).weight, dtype) for rounds in (True, False)
        )
        assert (got == rounded).mean() > 0.95
        assert (got == unrounded).mean() < 0.9


# --- backends against the reference


@pytest.mark.parametrize("basis_format", BASIS_FORMATS)
@pytest.mark.parametrize("side", SIDES)
def test_states_agree_to_the_bit_where_sums_are_exact(fast_backend: str, side: str, basis_format: str) -> None:
    for dtypes in DTYPE_PAIRS:
        for eight_bit in (True, False):
            for case in ({}, {"grad_scale": 3.0}):  # the column's scale comes before the gradient's
                p = quantized_problem(
                    70, 130, 33, side, basis_format, dtypes=dtypes, eight_bit=eight_bit, exact_sums=True, **case
                )
                assert_same_state(p.solved(fast_backend)[1], p.solved("reference")[1])


@pytest.mark.parametrize("basis_format", BASIS_FORMATS)
@pytest.mark.parametrize("side", SIDES)
def test_a_basis_of_codes_is_the_float_basis_of_their_values(backend: str, side: str, basis_format: str) -> None:
    # Scales that are powers of two: the codes' products are the basis' to the bit, before and after rounding.
    p = quantized_problem(70, 130, 33, side, basis_format, dtypes=DTYPE_PAIRS[1], eight_bit=True, exact_sums=True)
    assert p.basis_scale is not None
    values = torch.from_numpy(oracle.basis_codes(p.basis.numpy(), 33)).float() * p.basis_scale
    floats = replace(p, basis=values.bfloat16(), basis_scale=None)
    got, got_state = p.solved(backend)
    expected, expected_state = floats.solved(backend)
    assert_same_state(got_state, expected_state)
    assert_almost_same(got, got_state, expected, expected_state, "codes")


@pytest.mark.parametrize("basis_format", BASIS_FORMATS)
@pytest.mark.parametrize("side", SIDES)
def test_threads_change_nothing(fast_backend: str, side: str, basis_format: str) -> None:
    for dtypes, seed in ((DTYPE_PAIRS[1], 3), (DTYPE_PAIRS[0], None)):
        p = quantized_problem(300, 500, 33, side, basis_format, dtypes=dtypes, eight_bit=True, rounding_seed=seed)
        torch.set_num_threads(1)
        expected, expected_state = p.solved(fast_backend)
        for threads in (2, 7):  # two; more than there are cores
            torch.set_num_threads(threads)
            got, got_state = p.solved(fast_backend)
            assert_same_bits(got, expected, "param")
            assert_same_state(got_state, expected_state)


# --- the rest of the contract


@pytest.mark.parametrize("basis_format", BASIS_FORMATS)
@pytest.mark.parametrize("side", SIDES)
def test_lowrank_update_is_galore_update_after_its_projection(backend: str, side: str, basis_format: str) -> None:
    for dtypes in DTYPE_PAIRS:
        p = quantized_problem(37, 53, 5, side, basis_format, dtypes=dtypes, eight_bit=True, exact_sums=True)
        assert p.basis_scale is not None
        basis = oracle.basis_codes(p.basis.numpy(), 5) * f64(p.basis_scale)
        lowrank = torch.from_numpy(oracle.project(f64(p.grad), basis, None, side)).float()
        param, state = p.param.clone(), clone(p.state)
        lowrank_update(
            param,
            lowrank,
            p.basis,
            state,
            p.options,
            side=side,
            scale=p.scale,
            basis_scale=p.basis_scale,
            backend=backend,
        )
        expected, expected_state = p.solved(backend)
        assert_same_bits(param, expected, "param")
        assert_same_state(state, expected_state)


@pytest.mark.parametrize("basis_format", BASIS_FORMATS)
@pytest.mark.parametrize("side", SIDES)
def test_stochastic_rounding(backend: str, side: str, basis_format: str) -> None:
    p = quantized_problem(70, 131, 3, side, basis_format, dtypes=DTYPE_PAIRS[1], eight_bit=True, weight_decay=0.1)
    exact = p.exact()
    got, got_state = replace(p, options=replace(p.options, rounding_seed=2**40 + 3)).solved(backend)
    bits16 = oracle.random_bits16(2**40 + 3, 4, p.param.numel())
    bits = oracle.stochastic_bfloat16_bits(exact.weight, bits16)
    same = got.view(torch.int16).numpy().view(np.uint16) == bits
    assert same.mean() > 0.98  # but where float32's or the direction's errors carry a weight over a boundary
    assert_close(got, exact.weight, exact.weight_bound + tolerances.rounding_of(exact.weight, torch.bfloat16), "param")
    assert_same_state(got_state, p.solved(backend)[1])


@pytest.mark.parametrize("basis_format", BASIS_FORMATS)
@pytest.mark.parametrize("value", [torch.nan, 1e25])
def test_an_unrepresentable_gradient_changes_only_the_count(backend: str, value: float, basis_format: str) -> None:
    for side in SIDES:
        p = quantized_problem(37, 53, 5, side, basis_format, eight_bit=True, weight_decay=0.1)
        p.grad[20] = value
        got, got_state = p.solved(backend)
        assert_same_bits(got, p.param, "param")
        assert got_state.skipped.item() == 1
        assert_same_state(replace(got_state, skipped=p.state.skipped), p.state)


def test_the_scaled_sums_decide_what_is_representable(backend: str) -> None:
    # 127 x 1e18 alone is not; times the column's scale it is, and the other way round.
    codes = torch.full((4, 1), 127, dtype=torch.int8)
    for size, column_scale, skipped in ((1e18, 1e-3, 0), (1e15, 1e4, 1)):
        p = make_problem(3, 4, 1, "right")
        p = replace(p, grad=torch.full((3, 4), size), basis=codes, basis_scale=torch.tensor([column_scale]))
        assert p.solved(backend)[1].skipped.item() == skipped


@pytest.mark.parametrize("basis_format", BASIS_FORMATS)
def test_a_zero_column_adds_nothing(backend: str, basis_format: str) -> None:
    p = make_problem(37, 53, 5, "left", weight_decay=0.1)
    p.basis[:, 2] = 0
    codes, scale = quantize_basis(p.basis, basis_format)
    assert scale[2] == 0
    check_against_float64(replace(p, basis=codes, basis_scale=scale), backend, "zero column")


@pytest.mark.parametrize("side", SIDES)
def test_strided_weights_are_updated_in_place(backend: str, side: str) -> None:
    p = quantized_problem(12, 40, 3, side, "int4", eight_bit=True, exact_sums=True)
    expected, expected_state = p.solved(backend)
    buffer = torch.zeros(12, 80)
    view = buffer[:, ::2]
    view.copy_(p.param)
    galore_update(
        view,
        p.grad.T.contiguous().T,
        p.basis,
        p.state,
        p.options,
        side=side,
        scale=p.scale,
        basis_scale=p.basis_scale,
        backend=backend,
    )
    assert_same_bits(view.contiguous(), expected, "param")
    assert_same_state(p.state, expected_state)
    assert not buffer[:, 1::2].any()
