"""A kernel that does nothing but convert: what the Triton backend's loads and stores do to a number."""

from __future__ import annotations

import triton
from triton import language as tl

from galore_kernels.backends.triton.elements import from_float, to_float
from galore_kernels.backends.triton.products import upper_half


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
