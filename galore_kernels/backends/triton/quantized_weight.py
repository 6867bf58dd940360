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
    # Clamping first gives the same codes as clamping last. No tl.floor, which on a device flushes subnormal numbers.
    x = tl.minimum(tl.maximum(tl.where(x == x, x, 0.0), -LARGEST_CODE), LARGEST_CODE)
    truncated = x.to(tl.int32)
    floor = truncated - (truncated.to(tl.float32) > x).to(tl.int32)
    # To nearest even, by a sum that has no room for less than 1.
    share = (x - floor.to(tl.float32)) * 65536.0 + 8388608.0 - 8388608.0
    return (floor + (random16.to(tl.float32) < share).to(tl.int32)).to(tl.int8)
