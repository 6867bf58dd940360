"""Blocks of 256 elements as 8-bit codes and an absmax: csrc/core/absmax_block.h on (blocks, 256) tiles."""

from __future__ import annotations

import triton
from triton import language as tl

from galore_kernels import quantizers
from galore_kernels.backends.triton import code_tables

FIRST_BUCKET = tl.constexpr(code_tables.FIRST_BUCKET)
BUCKETS = tl.constexpr(code_tables.BUCKETS)
SIGNED_ZERO_CODE = tl.constexpr(quantizers.SIGNED_ZERO_CODE)
MAP_FLOATS = tl.constexpr(512)  # of one map: its values, then its thresholds
THRESHOLDS = tl.constexpr(256)


@triton.jit
def decode(code: tl.tensor, absmax: tl.tensor, maps: tl.tensor, SIGNED: tl.constexpr) -> tl.tensor:
    """The floats that uint8 codes stand for; absmax is of the codes' shape or broadcasts to it."""
    values = maps if SIGNED else maps + MAP_FLOATS
    return tl.load(values + code.to(tl.int32)) * absmax


@triton.jit
def block_absmax(x: tl.tensor) -> tl.tensor:
    """The largest magnitude of each row. As integers magnitudes sort the same, and a NaN stays."""
    magnitudes = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return tl.max(magnitudes, axis=1).to(tl.float32, bitcast=True)


@triton.jit
def encode(x: tl.tensor, absmax: tl.tensor, maps: tl.tensor, first_codes: tl.tensor, SIGNED: tl.constexpr) -> tl.tensor:
    """uint8 codes of a tile given its rows' absmax: the nearest, found as code_tables says.

    A sign is kept, and a positive second moment stays positive.
    """
    scale = absmax[:, None]
    # A block of zeros has no scale: 0 / 1 has the zero code, which is what all its elements take.
    z = tl.div_rn(x, tl.where(scale == 0.0, 1.0, scale))
    bits = z.to(tl.int32, bitcast=True)
    # The upper bound is for a NaN, which must not read beyond the table.
    bucket = tl.minimum(tl.maximum(((bits & 0x7FFFFFFF) >> 16) - FIRST_BUCKET, 0), BUCKETS - 1)
    bucket = tl.where(bits < 0, bucket + BUCKETS, bucket)
    thresholds = maps + THRESHOLDS
    if not SIGNED:
        thresholds += MAP_FLOATS
        first_codes += 2 * BUCKETS
    code = tl.load(first_codes + bucket).to(tl.int32)
    code += (z > tl.load(thresholds + code)).to(tl.int32)
    if SIGNED:
        code = tl.where((x < 0.0) & (code == SIGNED_ZERO_CODE), SIGNED_ZERO_CODE - 1, code)
    else:
        code = tl.where((x > 0.0) & (code == 0), 1, code)
    return code.to(tl.uint8)
