"""Quantized bases: what the bytes mean, the scale of least squares, and how much of a basis is lost."""

from __future__ import annotations

import math

import numpy as np
import oracle
import pytest
import torch
from tolerances import U32
from torch import Tensor
from update_cases import assert_same_bits, f64

from galore_kernels.quantizers import (
    BASIS_CODE_DTYPES,
    BASIS_FORMATS,
    basis_code_shape,
    basis_codes,
    dequantize_basis,
    quantize_basis,
)

FORMATS = pytest.mark.parametrize("basis_format", BASIS_FORMATS)
LARGEST = {"int8": 127, "int4": 7}

SHAPES = [
    (1, 1),  # the smallest: half a byte
    (5, 2),  # a byte each
    (40, 7),  # an odd rank: the last byte's high half is free
    (513, 8),
    (600, 129),
]


def columns_of_many_sizes(short: int, rank: int) -> Tensor:
    """A Gaussian basis whose columns differ in length by powers of ten."""
    return torch.randn(short, rank) * 10.0 ** (torch.arange(rank) % 7 - 3)


# --- the format


@FORMATS
@pytest.mark.parametrize("shape", SHAPES)
def test_layout(basis_format: str, shape: tuple[int, int]) -> None:
    short, rank = shape
    codes, scale = quantize_basis(columns_of_many_sizes(*shape), basis_format)
    assert codes.dtype == BASIS_CODE_DTYPES[basis_format]
    assert codes.is_contiguous()
    assert tuple(codes.shape) == basis_code_shape(short, rank, basis_format)
    assert codes.numel() == short * (rank if basis_format == "int8" else (rank + 1) // 2)
    assert (scale.dtype, tuple(scale.shape)) == (torch.float32, (rank,))
    whole = basis_codes(codes, rank)
    assert (whole.dtype, tuple(whole.shape)) == (torch.float32, shape)
    assert np.array_equal(whole.numpy(), oracle.basis_codes(codes.numpy(), rank))
    assert whole.abs().max() <= LARGEST[basis_format]
    assert_same_bits(dequantize_basis(codes, scale), whole * scale, "values")


def test_int4_puts_even_columns_in_the_low_half() -> None:
    basis = torch.tensor([[7.0, -7.0, 3.0], [-1.0, 2.0, -7.0], [0.0, 5.0, 7.0]])
    codes, scale = quantize_basis(basis, "int4")
    assert scale.tolist() == [1.0, 1.0, 1.0]
    assert codes.tolist() == [[0x97, 0x03], [0x2F, 0x09], [0x50, 0x07]]
    assert_same_bits(basis_codes(codes, 3), basis, "codes")


def test_the_free_half_of_an_odd_rank_is_not_read() -> None:
    codes = torch.tensor([[0x97, 0xF3]], dtype=torch.uint8)
    assert basis_codes(codes, 3).tolist() == [[7.0, -7.0, 3.0]]
    assert basis_codes(codes, 4).tolist() == [[7.0, -7.0, 3.0, -1.0]]


@FORMATS
def test_every_code_survives(basis_format: str) -> None:
    largest = LARGEST[basis_format]
    values = torch.arange(-largest, largest + 1).float()[:, None].repeat(1, 3)
    codes, scale = quantize_basis(values, basis_format)
    assert scale.tolist() == [1.0] * 3
    assert_same_bits(dequantize_basis(codes, scale), values, "values")


# --- the scale


@FORMATS
@pytest.mark.parametrize("shape", SHAPES)
def test_the_scale_is_the_one_of_least_squares(basis_format: str, shape: tuple[int, int]) -> None:
    basis = columns_of_many_sizes(*shape)
    codes, scale = quantize_basis(basis, basis_format)
    exact, whole = f64(basis), oracle.basis_codes(codes.numpy(), shape[1])
    products, squares = exact * whole, (whole**2).sum(axis=0)
    # Sums of S float32 products err by S u of their magnitudes; the squares' sum of whole numbers is nearly exact.
    bound = (2 * shape[0] + 2) * U32 * np.abs(products).sum(axis=0) / squares
    assert (np.abs(f64(scale) - products.sum(axis=0) / squares) <= bound).all()
    assert (scale > 0).all()


@FORMATS
def test_columns_do_not_disturb_one_another(basis_format: str) -> None:
    basis = columns_of_many_sizes(200, 8)
    codes, scale = quantize_basis(basis, basis_format)
    for column in range(8):
        own_codes, own_scale = quantize_basis(basis[:, column : column + 1].contiguous(), basis_format)
        assert torch.equal(basis_codes(own_codes, 1)[:, 0], basis_codes(codes, 8)[:, column])
        # torch may sum one column in another order than many.
        assert torch.allclose(own_scale, scale[column : column + 1], rtol=400 * U32, atol=0)


@FORMATS
def test_a_power_of_two_changes_the_scale_alone(basis_format: str) -> None:
    basis = torch.randn(100, 5)
    codes, scale = quantize_basis(basis, basis_format)
    larger, larger_scale = quantize_basis(basis * 2.0**20, basis_format)
    assert torch.equal(codes, larger)
    assert_same_bits(larger_scale, scale * 2.0**20, "scale")


@FORMATS
def test_zero_columns(basis_format: str) -> None:
    basis = torch.randn(30, 5)
    basis[:, [1, 4]] = 0
    codes, scale = quantize_basis(basis, basis_format)
    assert scale[[1, 4]].tolist() == [0.0, 0.0]
    assert (scale[[0, 2, 3]] > 0).all()
    assert not basis_codes(codes, 5)[:, [1, 4]].any()
    nothing, zero = quantize_basis(torch.zeros(3, 2), basis_format)
    assert not nothing.any()
    assert not zero.any()


# --- what is lost


@FORMATS
@pytest.mark.parametrize("shape", SHAPES)
def test_errors_are_at_most_those_of_rounding_to_the_largest(basis_format: str, shape: tuple[int, int]) -> None:
    # With the step absmax / largest every element errs by half a step at most. The fitted scale and a smaller step are
    # only taken where the column's error in Frobenius norm is smaller.
    basis = columns_of_many_sizes(*shape)
    codes, scale = quantize_basis(basis, basis_format)
    exact = f64(basis)
    step = np.abs(exact).max(axis=0) / LARGEST[basis_format]
    naive = exact - np.clip(np.rint(exact / step), -LARGEST[basis_format], LARGEST[basis_format]) * step
    error = exact - oracle.basis_codes(codes.numpy(), shape[1]) * f64(scale)
    # Float32's roundings of values and sums: a few u of each element.
    rounding = (2 * shape[0] + 8) * U32 * np.linalg.norm(exact, axis=0)
    assert (np.linalg.norm(error, axis=0) <= np.linalg.norm(naive, axis=0) + rounding).all()
    assert (np.linalg.norm(naive, axis=0) <= step / 2 * math.sqrt(shape[0]) + rounding).all()


def errors(basis: Tensor, basis_format: str) -> oracle.Array:
    """Norm of each column's error."""
    codes, scale = quantize_basis(basis, basis_format)
    return np.linalg.norm(f64(dequantize_basis(codes, scale)) - f64(basis), axis=0)


def test_int8_errs_as_uniform_rounding_does() -> None:
    # Rounding to a step errs by step / sqrt(12) in the mean square: of 1024 elements by that to some per cent.
    basis = torch.linalg.qr(torch.randn(1024, 64))[0].contiguous()
    step = np.abs(f64(basis)).max(axis=0) / 127
    ratio = errors(basis, "int8") / (step * math.sqrt(1024 / 12))
    assert ratio.max() < 1.06  # four deviations: the squares' is sqrt(4 / 5 / 1024), the norm's half of it
    assert ratio.min() > 0.94


def test_int4_is_near_the_best_step() -> None:
    basis = torch.linalg.qr(torch.randn(1024, 64))[0].contiguous()
    exact = f64(basis)
    best = np.full(64, np.inf)
    for clip in np.linspace(0.3, 1.0, 141):
        whole = np.clip(np.rint(exact / (clip * np.abs(exact).max(axis=0) / 7)), -7, 7)
        fitted = (exact * whole).sum(axis=0) / (whole**2).sum(axis=0)
        best = np.minimum(best, np.linalg.norm(exact - whole * fitted, axis=0))
    ratio = errors(basis, "int4") / best
    assert ratio.max() < 1.05  # six steps tried, of 141


def test_int4_loses_less_than_with_the_largest_as_its_end() -> None:
    basis = torch.randn(1024, 16)
    step = basis.abs().amax(dim=0) / 7
    naive = np.linalg.norm(f64((basis / step).round() * step - basis), axis=0)
    assert (errors(basis, "int4") < 0.85 * naive).all()
