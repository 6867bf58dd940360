"""int8 weights: the rule of their scales and codes, as csrc/core/quantized_weight.h has it for other compilers."""

from __future__ import annotations

import triton
from triton import language as tl

from galore_kernels.quantizers import weight

LARGEST_CODE = tl.constexpr(float(weight.LARGEST_CODE))
LEAST_CODE = tl.constexpr(float(weight.LEAST_CODE))
NEW_SCALE_CODE = tl.constexpr(float(weight.NEW_SCALE_CODE))


@triton.jit
def updated_scale(absmax: tl.tensor, scale: tl.tensor) -> tl.tensor:
    """Each group's scale, given its largest magnitude and its scale before: the same while it fits."""
    kept = (absmax <= scale * LARGEST_CODE) & (absmax >= scale * LEAST_CODE)
    return tl.where(kept, scale, tl.div_rn(absmax, tl.full(absmax.shape, NEW_SCALE_CODE, tl.float32)))


@triton.jit
def stochastic_codes(x: tl.tensor, scale: tl.tensor, random16: tl.tensor) -> tl.tensor:
    """int8 codes of a tile given its rows' scales. A NaN has the code 0, and what has no scale."""
    scale = scale[:, None]
    some = scale > 0.0
    x = tl.where(some, tl.div_rn(x, tl.where(some, scale, 1.0)), 0.0)
    floor = tl.floor(x)
    code = floor + (random16.to(tl.float32) < (x - floor) * 65536.0).to(tl.float32)
    code = tl.minimum(tl.maximum(code, -LARGEST_CODE), LARGEST_CODE)
    return tl.where(x == x, code, 0.0).to(tl.int32).to(tl.int8)
