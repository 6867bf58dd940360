"""Kernels that do nothing but convert: what the Triton backend's loads and stores do to a number."""

from __future__ import annotations

import triton
from triton import language as tl

from galore_kernels.backends.triton.codes import block_absmax
from galore_kernels.backends.triton.elements import from_float, to_float
from galore_kernels.backends.triton.products import upper_half
from galore_kernels.backends.triton.quantized_weight import stochastic_codes, updated_scale


@triton.jit
def convert_kernel(x: tl.tensor, narrow: tl.tensor, wide: tl.tensor, DTYPE: tl.constexpr, BLOCK: tl.constexpr) -> None:
    """narrow = x rounded to DTYPE, wide = that in float32 again."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    rounded = from_float(tl.load(x + i), DTYPE)
    tl.store(narrow + i, rounded)
    tl.store(wide + i, to_float(rounded))


@triton.jit
def split_kernel(x: tl.tensor, parts: tl.tensor, BLOCK: tl.constexpr) -> None:
    """parts (3, BLOCK) = the upper halves of x, of what they leave, and of what those leave."""
    rest = tl.load(x + tl.arange(0, BLOCK))
    for i in tl.static_range(3):
        upper = upper_half(rest)
        tl.store(parts + i * BLOCK + tl.arange(0, BLOCK), upper)
        rest -= upper


@triton.jit
def requantize_kernel(
    weight: tl.tensor,
    scale: tl.tensor,
    random16: tl.tensor,
    codes: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """codes and the new scale, in place of the old, of an int8 weight with one group in a row."""
    rows = tl.arange(0, ROWS)
    elements = rows[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    values = tl.load(weight + elements)
    new = updated_scale(block_absmax(values), tl.load(scale + rows))
    tl.store(codes + elements, stochastic_codes(values, new, tl.load(random16 + elements)))
    tl.store(scale + rows, new)
