"""csrc/core/dynamic_code.h, csrc/cpu/quantize_blockwise.h: the 8-bit code against a definition written in numpy."""

from __future__ import annotations

import importlib.util
import itertools

import numpy as np
import pytest
import torch
from native_calls import BLOCK, FloatArray, bits, dequantize, quantize
from numpy.typing import NDArray

from galore_kernels import _native

BOTH_MAPS = pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])


def published_map(signed: bool) -> FloatArray:
    """The published formula. Each float32 operation that the tables were made with is rounded where it was."""
    tenth, one = np.float32(0.1), np.float32(1.0)
    values = [np.float32(0.0), one]
    for decade in range(7):
        cells = 2**decade if signed else 2 ** (decade + 1)
        spacing = float((one - tenth) / np.float32(cells))
        edges = [
            np.float32(float(tenth) + spacing * i) if i < (cells + 1) // 2 else np.float32(1.0 - spacing * (cells - i))
            for i in range(cells + 1)
        ]
        for lower, upper in itertools.pairwise(edges):
            value = np.float32(10.0 ** (decade - 6)) * ((lower + upper) / np.float32(2.0))
            values += [value, -value] if signed else [value]
    return np.sort(np.array(values, dtype=np.float32))


def nearest_codes(x: FloatArray, signed: bool) -> tuple[NDArray[np.uint8], FloatArray]:
    """The definition: nearest value of x / absmax, ties to the even code, sign kept, positive never zero."""
    values = np.array(_native.dynamic_map(signed), dtype=np.float32)
    midpoints = (values[:-1] + values[1:]) * np.float32(0.5)
    zero = 127 if signed else 0
    blocks = np.pad(x, (0, -x.size % BLOCK)).reshape(-1, BLOCK)
    absmax = np.abs(blocks).max(axis=1, keepdims=True)
    z = blocks / np.where(absmax == 0, np.float32(1), absmax)
    codes = np.searchsorted(midpoints, z, side="left")  # the number of midpoints < z: a tie stays below
    tie = midpoints[np.minimum(codes, 254)] == z
    codes = np.where(tie & (codes % 2 == 1), codes + 1, codes)
    if signed:
        codes = np.where((blocks < 0) & (codes == zero), zero - 1, codes)
    else:
        codes = np.where((blocks > 0) & (codes == zero), 1, codes)
    return codes.ravel()[: x.size].astype(np.uint8), absmax.ravel()


def check_against_definition(x: FloatArray, signed: bool) -> None:
    codes, absmax = quantize(torch.from_numpy(x), signed=signed)
    expected_codes, expected_absmax = nearest_codes(x, signed)
    np.testing.assert_array_equal(absmax.numpy(), expected_absmax)
    np.testing.assert_array_equal(codes.numpy(), expected_codes)


def random_magnitudes(n: int, seed: int) -> FloatArray:
    """Floats whose ratio to their block's largest spans the whole code and the range below it."""
    rng = np.random.default_rng(seed)
    return (rng.choice([-1.0, 1.0], n) * 10.0 ** rng.uniform(-9, 0, n)).astype(np.float32)


@BOTH_MAPS
def test_map_follows_the_published_formula(signed: bool) -> None:
    native = np.array(_native.dynamic_map(signed), dtype=np.float32)
    np.testing.assert_array_equal(native.view(np.uint32), published_map(signed).view(np.uint32))
    assert np.all(np.diff(native) > 0)


def test_map_has_the_known_landmarks() -> None:
    signed = np.array(_native.dynamic_map(True), dtype=np.float32)
    unsigned = np.array(_native.dynamic_map(False), dtype=np.float32)
    # Literal values: the formula above and the one in C++ could share a misunderstanding.
    expected = np.array([-0.992968738079071, 0.0, 5.500000384017767e-07, 1.0], dtype=np.float32)
    np.testing.assert_array_equal(signed[[0, 127, 128, 255]], expected)
    expected = np.array([0.0, 3.2500003044333425e-07, 9.437499829800799e-05, 0.9964843988418579], dtype=np.float32)
    np.testing.assert_array_equal(unsigned[[0, 1, 14, 254]], expected)


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
@pytest.mark.filterwarnings("ignore")  # its optional kernels warn on import
@BOTH_MAPS
def test_map_equals_bitsandbytes(signed: bool) -> None:
    from bitsandbytes.functional import create_dynamic_map

    theirs = create_dynamic_map(signed=signed).numpy()
    np.testing.assert_array_equal(
        np.array(_native.dynamic_map(signed), dtype=np.float32).view(np.uint32), theirs.view(np.uint32)
    )


@BOTH_MAPS
@pytest.mark.parametrize("n", [1, 7, 255, 256, 257, 511, 20000])  # around a block; more than one task of blocks
def test_codes_are_the_nearest(n: int, signed: bool) -> None:
    check_against_definition(random_magnitudes(n, seed=n), signed)


@BOTH_MAPS
def test_codes_around_every_midpoint(signed: bool) -> None:
    """Ties and the 3 floats to either side of each, with absmax 1 so that the division changes nothing."""
    values = np.array(_native.dynamic_map(signed), dtype=np.float32)
    midpoints = (values[:-1] + values[1:]) * np.float32(0.5)
    offsets = np.arange(-3, 4, dtype=np.int32)
    near = (midpoints.view(np.int32)[:, None] + offsets).view(np.float32).ravel()
    near = near[(np.abs(near) <= 1)]
    rows = near.reshape(-1)
    blocks = [np.append(rows[i : i + BLOCK - 1], np.float32(1.0)) for i in range(0, rows.size, BLOCK - 1)]
    for block in blocks:
        check_against_definition(block, signed)


@BOTH_MAPS
def test_codes_of_a_million_floats_by_bit_pattern(signed: bool) -> None:
    """Every 1021st float of (0, 1]: all exponents, mantissas in no step with the code's table."""
    patterns = np.arange(1, 0x3F800000 + 1, 1021, dtype=np.uint32)
    floats = patterns[: patterns.size // 255 * 255].view(np.float32).reshape(-1, 255)
    x = np.concatenate([floats, np.ones((floats.shape[0], 1), np.float32)], axis=1).ravel()
    check_against_definition(x, signed)
    if signed:
        check_against_definition(-x, signed)


@BOTH_MAPS
def test_decoding_is_the_table_times_absmax(signed: bool) -> None:
    codes = torch.arange(256, dtype=torch.uint8).repeat(3)[:700]
    absmax = torch.tensor([3.7, 1e-30, 0.0])
    values = np.array(_native.dynamic_map(signed), dtype=np.float32)[codes.numpy()]
    expected = torch.from_numpy(values * np.repeat(absmax.numpy(), BLOCK)[:700])
    np.testing.assert_array_equal(bits(dequantize(codes, absmax, signed=signed)), bits(expected))


@BOTH_MAPS
def test_codes_survive_a_round_trip(signed: bool) -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    again, absmax = quantize(dequantize(codes, torch.tensor([2.5]), signed=signed), signed=signed)
    assert absmax.item() == 2.5
    torch.testing.assert_close(again, codes, rtol=0, atol=0)


@BOTH_MAPS
def test_all_zero_block_between_others(signed: bool) -> None:
    x = torch.zeros(3 * BLOCK)
    x[0] = 1.0
    x[-1] = 2.0
    codes, absmax = quantize(x, signed=signed)
    assert absmax.tolist() == [1.0, 0.0, 2.0]
    zero = 127 if signed else 0
    assert codes[1:-1].eq(zero).all()
    assert codes[[0, -1]].eq(255).all()


def test_negative_zero_is_zero_and_tiny_negative_keeps_its_sign() -> None:
    # -1e-45 / 1e30 underflows to -0.0: the sign has to come from the element, not from the quotient.
    x = torch.tensor([-0.0, -1e-45, 1e-45, 1e30])
    assert quantize(x, signed=True)[0].tolist() == [127, 126, 127, 255]


def test_positive_second_moment_never_becomes_zero() -> None:
    x = torch.tensor([0.0, 1e-45, 1e-7, 1.0, -0.5])  # a negative one does not occur; it is clamped to zero
    assert quantize(x, signed=False)[0].tolist() == [0, 1, 1, 255, 0]


@BOTH_MAPS
def test_denormal_blocks(signed: bool) -> None:
    """The largest element is itself denormal: quotients are coarse, and must still be the IEEE ones."""
    rng = np.random.default_rng(0)
    x = rng.integers(0, 0x7FFFFF, 600, dtype=np.uint32).view(np.float32)
    check_against_definition(x, signed)


@BOTH_MAPS
def test_extreme_scales(signed: bool) -> None:
    for scale in (1e-30, 1e30, 3e38):  # products or squares of these would leave the range of float32
        x = random_magnitudes(600, seed=3)
        check_against_definition((x.astype(np.float64) * scale).astype(np.float32), signed)


@BOTH_MAPS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_input_is_converted_exactly(dtype: torch.dtype, signed: bool) -> None:
    x = torch.from_numpy(random_magnitudes(1003, seed=5)).to(dtype)  # 1003: a tail of every vector width
    codes, absmax = quantize(x, signed=signed)
    expected_codes, expected_absmax = quantize(x.float(), signed=signed)
    assert torch.equal(codes, expected_codes)
    assert torch.equal(absmax, expected_absmax)


def test_every_fp16_value_is_read_exactly() -> None:
    """Each finite one alone in a block with 65504: absmax and code see the value that torch sees."""
    halves = torch.arange(0, 0x7C00, dtype=torch.int32).to(torch.int16).view(torch.float16)
    _, absmax = quantize(torch.stack([halves] + [torch.zeros_like(halves)] * (BLOCK - 1), 1).ravel(), signed=True)
    assert torch.equal(absmax, halves.float())


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_non_finite_input_is_harmless_to_its_neighbours(bad: float) -> None:
    """What it becomes is undefined, and the operations refuse it; other blocks and memory are untouched."""
    x = torch.ones(3 * BLOCK)
    x[BLOCK + 5] = bad
    codes, absmax = quantize(x, signed=True)
    assert absmax[[0, 2]].tolist() == [1.0, 1.0]
    assert not absmax[1].isfinite()
    assert codes[:BLOCK].eq(255).all()
    assert codes[2 * BLOCK :].eq(255).all()


def test_nothing_to_quantize() -> None:
    codes, absmax = quantize(torch.empty(0), signed=True)
    assert codes.numel() == absmax.numel() == 0
