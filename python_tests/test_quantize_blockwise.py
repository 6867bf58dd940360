"""The 8-bit format: bitsandbytes' maps to the bit, nearest codes, signs kept, positive second moments never zero."""

from __future__ import annotations

import hashlib

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from stand_ins import serving
from tolerances import U32
from torch import Tensor
from update_cases import BACKENDS, assert_same_bits

from galore_kernels import ops
from galore_kernels.quantizers import block_count, blockwise, dynamic_map, rounding_thresholds

# SHA-256 of the 1024 bytes of bitsandbytes 0.50.2's create_dynamic_map(signed=...), and a few of its entries, so that
# a wrong map fails where bitsandbytes is missing, and shows where it is wrong.
MAP_SHA256 = {
    True: "e732639a65f497b4ad684bb166a4467708255edd5207757de8b8f0c7e1fda89c",
    False: "305f002cc11278fb769d13b25b9fd0c7c83c8402c40a878fe086f4039fde6398",
}
MAP_ENTRIES = {
    True: {
        0: "-0x1.fc66660000000p-1",
        126: "-0x1.27476e0000000p-21",
        127: "0x0.0p+0",
        128: "0x1.27476e0000000p-21",
        200: "0x1.de66660000000p-3",
        254: "0x1.fc66660000000p-1",
        255: "0x1.0000000000000p+0",
    },
    False: {
        0: "0x0.0p+0",
        1: "0x1.5cf7540000000p-22",
        2: "0x1.a013300000000p-21",
        100: "0x1.00f5c40000000p-4",
        254: "0x1.fe33340000000p-1",
        255: "0x1.0000000000000p+0",
    },
}

SIZES = [
    0,  # no block at all
    1,  # its own absmax
    255,  # around one block
    256,
    257,
    1000,  # several blocks and a tail that no vector width divides
    64 * 256 + 1,  # the native backend hands out 64 blocks at a time; the tail is one element
]


def signed_and_unsigned(x: Tensor) -> list[tuple[Tensor, bool]]:
    return [(x, True), (x.abs(), False)]


def expected(x: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    codes, absmax = oracle.quantize(x.float().numpy(), dynamic_map(signed).numpy())
    return torch.from_numpy(codes), torch.from_numpy(absmax)


def check_against_the_oracle(x: Tensor, signed: bool, backend: str) -> tuple[Tensor, Tensor]:
    codes, absmax = ops.quantize_blockwise(x, signed, backend=backend)
    expected_codes, expected_absmax = expected(x, signed)
    assert_same_bits(absmax, expected_absmax, "absmax")
    assert_same_bits(codes, expected_codes, "codes")
    return codes, absmax


def spread(n: int, seed: int = 0) -> Tensor:
    """n numbers over eight decades of either sign: all of a map's codes, and below its smallest one."""
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(n, generator=rng) * 10.0 ** (-8 * torch.rand(n, generator=rng))


# --- the maps


@pytest.mark.parametrize("signed", [True, False])
def test_map_equals_bitsandbytes_to_the_bit(signed: bool) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    assert_same_bits(dynamic_map(signed), functional.create_dynamic_map(signed=signed), "map")


@pytest.mark.parametrize("signed", [True, False])
def test_map_equals_the_recorded_one(signed: bool) -> None:
    values = dynamic_map(signed)
    for code, recorded in MAP_ENTRIES[signed].items():
        assert float(values[code]).hex() == recorded, f"code {code}"
    assert hashlib.sha256(values.numpy().tobytes()).hexdigest() == MAP_SHA256[signed]


@pytest.mark.parametrize("signed", [True, False])
def test_map_is_the_papers_within_two_ulp(signed: bool) -> None:
    values = dynamic_map(signed)
    exact = oracle.dynamic_map(signed)
    assert values.shape == (256,)
    assert torch.unique(values).numel() == 256
    assert np.all(np.abs(values.double().numpy() - exact) <= 2 * 2 * U32 * np.abs(exact))  # an ulp is at most 2 u


@pytest.mark.parametrize("signed", [True, False])
def test_a_callers_change_of_the_map_stays_his(signed: bool) -> None:
    dynamic_map(signed).zero_()
    assert dynamic_map(signed).any()


def test_every_code_decodes_to_its_value(backend: str) -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    for signed in (True, False):
        for absmax in (1.0, 3.0, 1e-30):  # exact; rounded; small
            got = ops.dequantize_blockwise(codes, torch.tensor([absmax]), signed, backend=backend)
            assert_same_bits(got, dynamic_map(signed) * absmax, f"absmax {absmax}")


# --- codes


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_codes_are_the_nearest(backend: str, size: int, dtype: torch.dtype) -> None:
    for x, signed in signed_and_unsigned(spread(size).to(dtype)):
        codes, absmax = check_against_the_oracle(x, signed, backend)
        assert codes.shape == x.shape
        assert absmax.shape == (block_count(size),)


@pytest.mark.parametrize("signed", [True, False])
def test_codes_around_every_midpoint(backend: str, signed: bool) -> None:
    # The midpoint itself, and the floats on either side of it: off by one float is off by one code. The map's own
    # values are among them, so each code is seen to be its value's. With 1.0 in each block, z is x.
    values = dynamic_map(signed)
    midpoints = (values[:-1] + values[1:]) * 0.5
    infinity = torch.tensor(torch.inf)
    x = torch.cat([values, midpoints, torch.nextafter(midpoints, infinity), torch.nextafter(midpoints, -infinity)])
    x = torch.nn.functional.pad(x, (0, -x.numel() % 255)).view(-1, 255)
    x = torch.cat([torch.ones(len(x), 1), x], dim=1)
    check_against_the_oracle(x, signed, backend)


@pytest.mark.parametrize("signed", [True, False])
def test_ties_go_to_the_even_code(backend: str, signed: bool) -> None:
    # Stated without the oracle. Midpoints near zero, where the rules for signs and for positive numbers act, are
    # left out: the first unsigned code, and the signed codes beside 127.
    values = dynamic_map(signed)
    lower = [c for c in range(255) if c not in ((126, 127) if signed else (0,))]
    ties = ((values[:-1] + values[1:]) * 0.5)[lower]
    x = torch.cat([torch.ones(1), ties])
    codes = ops.quantize_blockwise(x, signed, backend=backend)[0][1:].tolist()
    assert codes == [c if c % 2 == 0 else c + 1 for c in lower]


def test_signs_are_kept_and_zero_is_exact(backend: str) -> None:
    # Half the smallest code is 2.8e-7: -1e-9 would be zero, and 1e-9 is.
    x = torch.tensor([1.0, -1e-9, 1e-9, 0.0, -0.0, -1.0])
    codes, absmax = ops.quantize_blockwise(x, True, backend=backend)
    assert codes.tolist() == [255, 126, 127, 127, 127, 0]
    decoded = ops.dequantize_blockwise(codes, absmax, True, backend=backend)
    assert decoded[1] < 0
    assert decoded[2:5].tolist() == [0.0, 0.0, 0.0]


def test_a_positive_second_moment_never_becomes_zero(backend: str) -> None:
    # Half the smallest code is 1.6e-7. Denormals are positive too; zeros of either sign stay zeros.
    x = torch.tensor([1.0, 1e-7, 1e-20, 1e-45, 0.0, -0.0])
    codes, absmax = ops.quantize_blockwise(x, False, backend=backend)
    assert codes.tolist() == [255, 1, 1, 1, 0, 0]
    assert (ops.dequantize_blockwise(codes, absmax, False, backend=backend)[:4] > 0).all()


@pytest.mark.parametrize("size", [256, 300])  # a whole block of zeros, and a short one
def test_zero_blocks(backend: str, size: int) -> None:
    for signed, zero_code in ((True, 127), (False, 0)):
        codes, absmax = ops.quantize_blockwise(torch.zeros(size), signed, backend=backend)
        assert (codes == zero_code).all()
        assert (absmax == 0).all()
        assert_same_bits(
            ops.dequantize_blockwise(codes, absmax, signed, backend=backend), torch.zeros(size), "decoded zeros"
        )


def test_each_block_has_its_own_scale(backend: str) -> None:
    # Equal shapes at scales 1, 0, 1e-30 and 1e30: equal codes, except for the block of zeros.
    base = spread(256).abs() + 1e-9
    scales = torch.tensor([1.0, 0.0, 2.0**-100, 2.0**100])
    codes, absmax = check_against_the_oracle(scales[:, None] * base, False, backend)
    assert_same_bits(absmax, scales * base.max(), "absmax")
    assert (codes[1] == 0).all()
    assert torch.equal(codes[2], codes[0])
    assert torch.equal(codes[3], codes[0])


@pytest.mark.parametrize("position", [0, 255, 256, 599])  # both ends of a whole block, and of the short last one
def test_the_largest_of_a_block_is_found_anywhere(backend: str, position: int) -> None:
    x = 0.01 * spread(600)
    x[position] = -7.0
    _, absmax = check_against_the_oracle(x, True, backend)
    assert absmax[position // 256] == 7.0


@pytest.mark.parametrize("largest", [1e-38, 1e-42, 1e-45])  # just normal; denormal; the smallest one
def test_denormal_blocks(backend: str, largest: float) -> None:
    for x, signed in signed_and_unsigned(spread(300) * largest):
        check_against_the_oracle(x, signed, backend)


def test_strides_and_shapes(backend: str) -> None:
    # Row-major order counts, not memory order: a transpose, a column slice, an expanded row, four dimensions.
    base = spread(40 * 30).view(40, 30)
    for x in (base.T, base[:, ::2], base[:1].expand(40, 30), base.view(4, 10, 6, 5).permute(3, 1, 0, 2)):
        codes, absmax = check_against_the_oracle(x, True, backend)
        decoded = ops.dequantize_blockwise(codes, absmax, True, backend=backend)
        codes_strided = codes.T.contiguous().T if codes.dim() == 2 else codes
        assert_same_bits(
            ops.dequantize_blockwise(codes_strided, absmax, True, backend=backend), decoded, "strided codes"
        )


# --- decoding


@pytest.mark.parametrize("size", SIZES)
def test_decoding_is_one_exact_product(backend: str, size: int) -> None:
    for x, signed in signed_and_unsigned(spread(size)):
        codes, absmax = ops.quantize_blockwise(x, signed, backend=backend)
        exact = oracle.dequantize(codes.numpy(), absmax.numpy(), dynamic_map(signed).numpy())
        got = ops.dequantize_blockwise(codes, absmax, signed, backend=backend)
        assert_same_bits(got, torch.from_numpy(exact.astype(np.float32)), "decoded")


@pytest.mark.parametrize("signed", [True, False])
def test_decoding_equals_bitsandbytes(backend: str, signed: bool) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    codes = torch.randint(0, 256, (1000,), dtype=torch.uint8)
    absmax = torch.rand(4) + 0.1
    theirs = functional.dequantize_blockwise(codes, absmax=absmax, code=dynamic_map(signed), blocksize=256)
    assert_same_bits(ops.dequantize_blockwise(codes, absmax, signed, backend=backend), theirs, "decoded")


@pytest.mark.parametrize("signed", [True, False])
def test_requantizing_what_was_decoded_changes_nothing(backend: str, signed: bool) -> None:
    # Every code, beside code 255 whose value 1.0 makes absmax itself an element; then no code drifts over time.
    for absmax in (1.0, 0.7, 3e-12):
        codes = torch.arange(255, -1, -1, dtype=torch.uint8)
        decoded = ops.dequantize_blockwise(codes, torch.tensor([absmax]), signed, backend=backend)
        again, again_absmax = ops.quantize_blockwise(decoded, signed, backend=backend)
        assert again_absmax.item() == torch.tensor(absmax).item()
        assert again.tolist() == codes.tolist()


# --- properties

arrays = hnp.arrays(
    np.float32,
    st.integers(1, 600),
    elements=st.floats(-(2.0**100), 2.0**100, width=32),  # decoding beyond 2^100 is as exact, its error bound overflows
)


@pytest.mark.parametrize("name", BACKENDS)
@given(values=arrays)
def test_error_is_within_half_a_cell(name: str, values: np.ndarray[tuple[int], np.dtype[np.float32]]) -> None:
    for x, signed in signed_and_unsigned(torch.from_numpy(values)):
        with serving(name):
            codes, absmax = check_against_the_oracle(x, signed, name)
        table = dynamic_map(signed).double().numpy()
        scale = np.repeat(absmax.double().numpy(), oracle.BLOCK)[: x.numel()]
        decoded = oracle.dequantize(codes.numpy(), absmax.numpy(), dynamic_map(signed).numpy())
        # Half the wider cell beside the code, the smallest code itself where a sign or positivity is kept, and the
        # signed map's missing -1. Denormal quotients round by an absolute 2^-149.
        gaps = np.diff(table)
        half_cell = np.maximum(np.append(gaps, 0), np.insert(gaps, 0, 0))[codes.numpy()] / 2
        kept = np.where(np.abs(table[codes.numpy()]) <= 5.5e-7, 5.5e-7, 0.0)
        end = (1 + table[0]) * (codes.numpy() == 0) if signed else 0.0
        bound = (np.maximum(np.maximum(half_cell, kept), end) + 4 * U32) * scale + 2.0**-149
        assert np.all(np.abs(decoded - x.double().numpy()) <= bound)
        assert np.all((decoded < 0) == ((x.numpy() < 0) & (decoded != 0)))


@pytest.mark.parametrize("signed", [True, False])
def test_thresholds_are_the_midpoints_or_the_float_below(signed: bool) -> None:
    values = dynamic_map(signed)
    midpoints = (values[:-1] + values[1:]) * 0.5
    thresholds = rounding_thresholds(signed)
    below = torch.nextafter(midpoints, torch.tensor(-torch.inf))
    assert_same_bits(thresholds[0::2], midpoints[0::2], "below even codes")
    assert_same_bits(thresholds[1::2], below[1::2], "below odd codes")


@pytest.mark.parametrize("signed", [True, False])
def test_the_map_does_not_depend_on_torchs_defaults(signed: bool) -> None:
    """It is cached: the first caller's default dtype or device would stay in it."""
    expected = dynamic_map(signed), rounding_thresholds(signed)
    blockwise._dynamic_map.cache_clear()
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        with torch.device("meta"):
            got = dynamic_map(signed), rounding_thresholds(signed)
    finally:
        torch.set_default_dtype(before)
        blockwise._dynamic_map.cache_clear()
    for mine, theirs in zip(got, expected, strict=True):
        assert mine.dtype == torch.float32
        assert torch.equal(mine, theirs)
