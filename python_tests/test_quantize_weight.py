"""int8 weights: what codes and scales mean, which scales are kept, and how codes are rounded."""

from __future__ import annotations

import math

import numpy as np
import oracle
import pytest
import tolerances
import torch
from torch import Tensor
from update_cases import DTYPES, assert_close, assert_same_bits, f64

from galore_kernels.quantizers import dequantize_weight, quantize_weight, requantize_weight, weight_scale_shape

COLUMNS = [1, 7, 255, 256, 257, 600]  # no vector; an odd tail; around one group; a last group that is short


def per_element(scale: Tensor, columns: int) -> oracle.Array:
    """Float64 scales of a row's elements."""
    return np.repeat(f64(scale), 256, axis=1)[:, :columns]


def weights_of_many_sizes(rows: int, columns: int) -> Tensor:
    """Gaussian, groups a power of ten apart: a scale of another group shows."""
    power = (torch.arange(rows)[:, None] + torch.arange(columns) // 256) % 7 - 3
    return torch.randn(rows, columns) * 10.0**power


def random16(weight: Tensor, seed: int = 1) -> Tensor:
    return torch.randint(0, 65536, weight.shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", COLUMNS)
def test_every_weight_is_within_half_a_code(columns: int, dtype: torch.dtype) -> None:
    weight = weights_of_many_sizes(9, columns).to(dtype)
    codes, scale = quantize_weight(weight)
    assert (codes.dtype, codes.shape) == (torch.int8, weight.shape)
    assert (scale.dtype, tuple(scale.shape)) == (torch.float32, weight_scale_shape((9, columns)))
    assert scale.shape[1] == math.ceil(columns / 256)
    spread = per_element(scale, columns)
    # The quotient, up to 127, is rounded to float32 before it is rounded to a code.
    assert_close(f64(codes) * spread, f64(weight), spread * (0.5 + 127 * tolerances.U32), "weight")
    largest = np.abs(f64(codes))
    assert all(largest[:, first : first + 256].max(axis=1).tolist() == [127.0] * 9 for first in range(0, columns, 256))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", COLUMNS)
def test_weights_are_products_rounded_once(columns: int, dtype: torch.dtype) -> None:
    codes, scale = quantize_weight(weights_of_many_sizes(9, columns))
    product = codes.float().numpy() * np.repeat(scale.numpy(), 256, axis=1)[:, :columns]
    assert product.dtype == np.float32
    got = dequantize_weight(codes, scale, dtype)
    assert got.is_contiguous()
    assert_same_bits(got, torch.from_numpy(product).to(dtype), "weight")


def test_a_group_of_zeros_has_no_scale() -> None:
    weight = torch.randn(3, 600)
    weight[1, 256:512] = 0
    codes, scale = quantize_weight(weight)
    assert (scale == 0).nonzero().tolist() == [[1, 1]]
    assert not codes[1, 256:512].any()
    assert_same_bits(dequantize_weight(codes, scale, torch.float32)[1, 256:512], torch.zeros(256), "zeros")
    new_codes, new_scale = requantize_weight(dequantize_weight(codes, scale, torch.float32), scale, random16(weight))
    assert_same_bits(new_codes, codes, "codes")
    assert_same_bits(new_scale, scale, "scale")


@pytest.mark.parametrize("columns", COLUMNS)
def test_weights_that_did_not_move_keep_codes_and_scales(columns: int) -> None:
    codes, scale = quantize_weight(weights_of_many_sizes(9, columns))
    weight = dequantize_weight(codes, scale, torch.float32)
    # The least and the largest random number: c * scale / scale misses c on either side.
    for bits16 in (0, 65535):
        new_codes, new_scale = requantize_weight(weight, scale, torch.full_like(codes, bits16, dtype=torch.int64))
        assert_same_bits(new_codes, codes, "codes")
        assert_same_bits(new_scale, scale, "scale")


@pytest.mark.parametrize(
    ("largest", "kept"),
    [(64.0, True), (63.99, False), (127.0, True), (127.01, False), (112.0, True), (0.0, False), (1e4, False)],
)
def test_a_scale_is_kept_from_64_to_127(largest: float, kept: bool) -> None:
    scale = torch.full((1, 2), 0.125)
    weight = torch.full((1, 300), 0.25)
    weight[0, 17], weight[0, 280] = -largest * 0.125, 100 * 0.125
    if largest == 0.0:
        weight[0, :256] = 0
    codes, new = requantize_weight(weight, scale, torch.full((1, 300), 32768))
    assert new[0, 0] == (0.125 if kept else weight[0, 17].abs() / 112)
    assert new[0, 1] == 0.125  # another group's size is nothing to it
    assert codes[0, 17] == -round(largest if kept else 112 if largest else 0)


def test_codes_stay_within_their_range() -> None:
    # 167 of the smallest subnormal over 112 rounds to one of it: without the clamp the code would be 167.
    tiny = torch.tensor([[167 * 2.0**-149, -167 * 2.0**-149]])
    codes, scale = requantize_weight(tiny, torch.zeros(1, 1), torch.zeros(1, 2, dtype=torch.int64))
    assert scale.item() == 2.0**-149
    assert codes.tolist() == [[127, -127]]


def test_every_probability_is_the_fraction() -> None:
    # Each row is a group: a weight that keeps the scale, and one that is rounded by each 16-bit number once.
    bits16 = torch.stack((torch.zeros(65536, dtype=torch.int64), torch.arange(65536)), dim=1)
    for x in (0.25, -0.25, 3 + 2.0**-16, 41.625, -41.625, 0.0, -5.0):
        weight = torch.tensor([100.0, x]).repeat(65536, 1)
        codes, scale = requantize_weight(weight, torch.ones(65536, 1), bits16)
        assert (scale == 1).all()
        assert set(codes[:, 1].tolist()) <= {math.floor(x), math.floor(x) + 1}
        assert codes[:, 1].double().mean().item() == x
