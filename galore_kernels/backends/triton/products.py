"""Products of two tiles, summed in float32, and the tiles of their factors."""

from __future__ import annotations

import triton
from triton import language as tl

from galore_kernels.backends.triton.availability import interpreted
from galore_kernels.backends.triton.elements import multiple, tile_of, to_float

# Triton's interpreter multiplies the bit patterns of bfloat16, and knows neither tensor cores nor what stands in for
# float32 on them. The one place where kernels differ there; the products are the same.
INTERPRETED = tl.constexpr(interpreted())


@triton.jit
def upper_half(x: tl.tensor) -> tl.tensor:
    """A float32 but for its lower 16 bits, which is a bfloat16's value; int8 codes and bfloat16 as they are."""
    if x.dtype != tl.float32:
        return x
    else:
        return (x.to(tl.uint32, bitcast=True) & 0xFFFF0000).to(tl.float32, bitcast=True)


@triton.jit
def multiply_add(a: tl.tensor, b: tl.tensor, sums: tl.tensor, PRECISION: tl.constexpr) -> tl.tensor:
    """sums + a @ b. 16-bit operands of one dtype go to the tensor cores as they are, all others as float32.

    int8 codes take the other operand's dtype, in which they are exact. Beside float32 neither they nor bfloat16 need
    six products of bfloat16: float32 is the sum of three, taken off one after another, and each of the others is one.
    """
    if INTERPRETED:
        return tl.dot(to_float(a), to_float(b), sums, input_precision="ieee")
    elif PRECISION == "bf16x6" and (
        (a.dtype == tl.float32 and (b.dtype == tl.int8 or b.dtype == tl.bfloat16))
        or (b.dtype == tl.float32 and (a.dtype == tl.int8 or a.dtype == tl.bfloat16))
    ):
        for _ in tl.static_range(3):
            sums = tl.dot(upper_half(a).to(tl.bfloat16), upper_half(b).to(tl.bfloat16), sums)
            if a.dtype == tl.float32:
                a -= upper_half(a)
            else:
                b -= upper_half(b)
        return sums
    elif a.dtype == tl.int8:
        return tl.dot(a.to(b.dtype), b, sums, input_precision=PRECISION)
    elif b.dtype == tl.int8:
        return tl.dot(a, b.to(a.dtype), sums, input_precision=PRECISION)
    elif a.dtype == b.dtype and a.dtype != tl.float32:
        return tl.dot(a, b, sums)
    else:
        return tl.dot(to_float(a), to_float(b), sums, input_precision=PRECISION)


@triton.jit
def _unpacked(packed: tl.tensor) -> tl.tensor:
    """int8 codes (rows, 2 n) from bytes (rows, n) of two: column 2j is the low half of byte j, signed as the high."""
    low = (packed << 4).to(tl.int8, bitcast=True) >> 4
    return tl.interleave(low, packed.to(tl.int8, bitcast=True) >> 4)


@triton.jit
def load_factor(
    matrix: tl.tensor,
    row0: tl.tensor,
    column0: tl.tensor,
    rank: tl.tensor,
    rows_there: tl.tensor,
    columns_there: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PACKED_MULTIPLE: tl.constexpr,
    OFFSETS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
) -> tl.tensor:
    """A tile from (row0, column0) on of a matrix with ``rank`` columns: a basis, its codes, or a direction.

    matrix: uint8 are packed 4-bit codes, whose rows have a multiple of PACKED_MULTIPLE bytes. TRANSPOSED: the result.
    """
    if matrix.dtype.element_ty == tl.uint8:
        width = multiple(tl.cdiv(rank, 2), PACKED_MULTIPLE)
        there = rows_there[:, None] & (column0 // 2 + tl.arange(0, COLUMNS // 2) < width)[None, :]
        packed = tl.load(tile_of(matrix, row0, column0 // 2, width, ROWS, COLUMNS // 2, OFFSETS), there, other=0)
        codes = _unpacked(packed)  # beyond the last column is an odd rank's last half: 0
        return tl.trans(codes) if TRANSPOSED else codes
    elif TRANSPOSED:
        pointers = tl.trans(tile_of(matrix, row0, column0, rank, ROWS, COLUMNS, OFFSETS))
        return tl.load(pointers, columns_there[:, None] & rows_there[None, :], other=0)
    else:
        pointers = tile_of(matrix, row0, column0, rank, ROWS, COLUMNS, OFFSETS)
        return tl.load(pointers, rows_there[:, None] & columns_there[None, :], other=0)
