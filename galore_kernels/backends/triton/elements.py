"""What every kernel reads and writes: rows of the table, rows of the control, and elements of any dtype as float32.

Where Triton's own conversions would do on a device but not in its interpreter (which truncates bfloat16 and breaks its
subnormals), integers do the same on both: one code, one result.
"""

from __future__ import annotations

import torch
import triton
from triton import language as tl

from galore_kernels.backends import batch
from galore_kernels.ops.adam import LARGEST_GRADIENT as _LARGEST
from galore_kernels.quantizers import BLOCK_SIZE

# Columns of the table of addresses: see Batch in galore_kernels/backends/batch.py.
PARAM = tl.constexpr(0)
BASIS = tl.constexpr(1)
EXP_AVG = tl.constexpr(2)
EXP_AVG_SQ = tl.constexpr(3)
EXP_AVG_ABSMAX = tl.constexpr(4)
EXP_AVG_SQ_ABSMAX = tl.constexpr(5)
BASIS_SCALE = tl.constexpr(6)
WEIGHT_SCALE = tl.constexpr(7)
STEP = tl.constexpr(8)
SKIPPED = tl.constexpr(9)
SEED = tl.constexpr(10)
SCALED_NORM = tl.constexpr(11)
BASIS_SEED = tl.constexpr(12)
GRADIENT = tl.constexpr(13)
TABLE_COLUMNS = tl.constexpr(batch.TABLE_COLUMNS)

# Words of a control row: AdamCoefficients of csrc/core/adam.h, then what the launches tell one another.
GRADIENT_SCALE = tl.constexpr(0)
BETA1 = tl.constexpr(1)
ONE_MINUS_BETA1 = tl.constexpr(2)
BETA2 = tl.constexpr(3)
ONE_MINUS_BETA2 = tl.constexpr(4)
EPS = tl.constexpr(5)
STEP_SIZE = tl.constexpr(batch.STEP_SIZE)
DECAY = tl.constexpr(batch.DECAY)
SKIP = tl.constexpr(batch.SKIP)
ARRIVED = tl.constexpr(9)
STEP_NUMBER = tl.constexpr(10)
EXACT_STEP_SIZE = tl.constexpr(12)
CONTROL_WORDS = tl.constexpr(batch.CONTROL_WORDS)

SKIP_GRADIENT = tl.constexpr(batch.SKIP_GRADIENT)
SKIP_FOUND_INF = tl.constexpr(batch.SKIP_FOUND_INF)

LARGEST_GRADIENT = tl.constexpr(_LARGEST)
LARGEST_FLOAT = tl.constexpr(torch.finfo(torch.float32).max)
BLOCK = tl.constexpr(BLOCK_SIZE)


@triton.jit
def multiple(x: tl.tensor, FACTOR: tl.constexpr) -> tl.tensor:
    """x, which is a multiple of FACTOR: now the compiler knows, and loads vectors."""
    return x // FACTOR * FACTOR


@triton.jit
def row_value(table: tl.tensor, tensor: tl.tensor, COLUMN: tl.constexpr) -> tl.tensor:
    """A number of a tensor's row."""
    return tl.load(table + tensor.to(tl.int64) * TABLE_COLUMNS + COLUMN)


@triton.jit
def row_pointer(
    table: tl.tensor, tensor: tl.tensor, COLUMN: tl.constexpr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr
) -> tl.tensor:
    """An address of a tensor's row. ALIGNED: it is a multiple of 16."""
    pointer = tl.load(table + tensor.to(tl.int64) * TABLE_COLUMNS + COLUMN).to(tl.pointer_type(DTYPE))
    return tl.multiple_of(pointer, 16) if ALIGNED else pointer


@triton.jit
def tile_of(
    matrix: tl.tensor,
    row0: tl.tensor,
    column0: tl.tensor,
    pitch: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    OFFSETS: tl.constexpr,
) -> tl.tensor:
    """Pointers to a row-major matrix' elements from (row0, column0) on. OFFSETS: an integer that reaches over a tile.

    64 bits lead to the tile, within it 32 will do, and half the registers, unless rows are immensely long.
    """
    first = matrix + (row0.to(tl.int64) * pitch + column0)
    rows, columns = tl.arange(0, ROWS).to(OFFSETS), tl.arange(0, COLUMNS).to(OFFSETS)
    return first + (rows[:, None] * pitch.to(OFFSETS) + columns[None, :])


@triton.jit
def coefficients(control: tl.tensor, tensor: tl.tensor) -> tl.tensor:
    """Pointer to the eight floats of a control row."""
    return (control + tensor.to(tl.int64) * CONTROL_WORDS).to(tl.pointer_type(tl.float32))


@triton.jit
def skip_flag(control: tl.tensor, tensor: tl.tensor) -> tl.tensor:
    """The skip flag of a control row."""
    return tl.load(control + tensor.to(tl.int64) * CONTROL_WORDS + SKIP)


@triton.jit
def exact_step_size(control: tl.tensor, tensor: tl.tensor) -> tl.tensor:
    """Pointer to a control row's step size as a double."""
    return (control + tensor.to(tl.int64) * CONTROL_WORDS + EXACT_STEP_SIZE).to(tl.pointer_type(tl.float64))


@triton.jit
def flag_beyond(limit: tl.constexpr, x: tl.tensor, there: tl.tensor, control: tl.tensor, tensor: tl.tensor) -> None:
    """Sets the skip flag if an element of x, of those that are there, is NaN or larger than ``limit``."""
    bad = there & ~(tl.abs(x) <= limit)
    if tl.max(bad.to(tl.int32), axis=None) != 0:
        tl.atomic_or(control + tensor.to(tl.int64) * CONTROL_WORDS + SKIP, SKIP_GRADIENT, sem="relaxed")


@triton.jit
def flag_unless_representable(x: tl.tensor, there: tl.tensor, control: tl.tensor, tensor: tl.tensor) -> None:
    """The same if its square overflows."""
    flag_beyond(LARGEST_GRADIENT, x, there, control, tensor)


@triton.jit
def flag_unless_finite(x: tl.tensor, there: tl.tensor, control: tl.tensor, tensor: tl.tensor) -> None:
    """The same if it is infinite."""
    flag_beyond(LARGEST_FLOAT, x, there, control, tensor)


@triton.jit
def count_step(table: tl.tensor, tensor: tl.tensor, skip: tl.tensor) -> None:
    """Once for each tensor, by one program of its launch."""
    if skip == 0:
        step = row_pointer(table, tensor, STEP, tl.float32, False)
        tl.store(step, tl.load(step) + 1.0)
    if skip == SKIP_GRADIENT:
        skipped = row_pointer(table, tensor, SKIPPED, tl.int64, False)
        tl.store(skipped, tl.load(skipped) + 1)


@triton.jit
def to_float(x: tl.tensor) -> tl.tensor:
    """The same number in float32."""
    if x.dtype == tl.bfloat16:
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@triton.jit
def bfloat16_nearest(bits: tl.tensor) -> tl.tensor:
    """bf16_nearest of csrc/core/rounding.h: ties to even, every NaN becomes the quiet one."""
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7FC0, rounded)


@triton.jit
def from_float(x: tl.tensor, DTYPE: tl.constexpr) -> tl.tensor:
    """float32 rounded to nearest even, as csrc/core/rounding.h does it, NaN's bits included."""
    if tl.bfloat16 == DTYPE:
        bits = bfloat16_nearest(x.to(tl.uint32, bitcast=True))
        return bits.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    elif tl.float16 == DTYPE:
        bits = x.to(tl.uint32, bitcast=True)
        nan = ((bits >> 16) & 0x8000) | 0x7E00 | ((bits >> 13) & 0x3FF)
        half = x.to(tl.float16).to(tl.uint16, bitcast=True)
        is_nan = (bits & 0x7FFFFFFF) > 0x7F800000
        return tl.where(is_nan, nan.to(tl.uint16), half).to(tl.float16, bitcast=True)
    else:
        return x
