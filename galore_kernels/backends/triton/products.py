"""Products of two tiles, summed in float32."""

from __future__ import annotations

import triton
from triton import language as tl

from galore_kernels.backends.triton.availability import interpreted
from galore_kernels.backends.triton.elements import to_float

# Triton's interpreter multiplies the bit patterns of bfloat16, and knows neither tensor cores nor what stands in for
# float32 on them. The one place where kernels differ there; the products are the same.
INTERPRETED = tl.constexpr(interpreted())


@triton.jit
def multiply_add(a: tl.tensor, b: tl.tensor, sums: tl.tensor, PRECISION: tl.constexpr) -> tl.tensor:
    """sums + a @ b. 16-bit operands of one dtype go to the tensor cores as they are, all others as float32."""
    if INTERPRETED:
        return tl.dot(to_float(a), to_float(b), sums, input_precision="ieee")
    elif a.dtype == b.dtype and a.dtype != tl.float32:
        return tl.dot(a, b, sums)
    else:
        return tl.dot(to_float(a), to_float(b), sums, input_precision=PRECISION)
