"""Adam on tiles of (blocks, 256) elements: csrc/core/adam.h, with every operation rounded (no fused multiply-adds)."""

from __future__ import annotations

import triton
from triton import language as tl

from galore_kernels.backends.triton.codes import SIGNED_ZERO_CODE, block_absmax, decode, encode
from galore_kernels.backends.triton.elements import (
    BETA1,
    BETA2,
    BLOCK,
    DECAY,
    EPS,
    EXP_AVG,
    EXP_AVG_ABSMAX,
    EXP_AVG_SQ,
    EXP_AVG_SQ_ABSMAX,
    ONE_MINUS_BETA1,
    ONE_MINUS_BETA2,
    STEP_SIZE,
    coefficients,
    row_pointer,
)


@triton.jit
def tile_offsets(part: tl.tensor, BLOCKS: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """(indices of the tile's blocks, indices of its elements in the flattened tensor) of a tensor's part."""
    blocks = part.to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    return blocks, blocks[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]


@triton.jit
def update_moments(
    gradient: tl.tensor,
    table: tl.tensor,
    control: tl.tensor,
    tensor: tl.tensor,
    blocks: tl.tensor,
    offsets: tl.tensor,
    elements: tl.tensor,
    maps: tl.tensor,
    first_codes: tl.tensor,
    EIGHT_BIT: tl.constexpr,
    ALIGNED: tl.constexpr,
) -> tl.tensor:
    """Updates a tile of both moments and returns Adam's direction, from the new moments before they become codes.

    blocks, offsets: see tile_offsets. gradient: scaled and signed, 0 beyond the tensor's end, so that what lies there
    takes no part in an absmax.
    """
    there, block_there = offsets < elements, blocks * BLOCK < elements
    if EIGHT_BIT:
        m_codes = row_pointer(table, tensor, EXP_AVG, tl.uint8, ALIGNED) + offsets
        v_codes = row_pointer(table, tensor, EXP_AVG_SQ, tl.uint8, ALIGNED) + offsets
        m_absmax = row_pointer(table, tensor, EXP_AVG_ABSMAX, tl.float32, ALIGNED) + blocks
        v_absmax = row_pointer(table, tensor, EXP_AVG_SQ_ABSMAX, tl.float32, ALIGNED) + blocks
        m_scale = tl.load(m_absmax, block_there, other=0.0)
        v_scale = tl.load(v_absmax, block_there, other=0.0)
        m = decode(tl.load(m_codes, there, other=SIGNED_ZERO_CODE), m_scale[:, None], maps, True)
        v = decode(tl.load(v_codes, there, other=0), v_scale[:, None], maps, False)
    else:
        m_values = row_pointer(table, tensor, EXP_AVG, tl.float32, ALIGNED) + offsets
        v_values = row_pointer(table, tensor, EXP_AVG_SQ, tl.float32, ALIGNED) + offsets
        m = tl.load(m_values, there, other=0.0)
        v = tl.load(v_values, there, other=0.0)

    c = coefficients(control, tensor)
    m = tl.load(c + BETA1) * m + tl.load(c + ONE_MINUS_BETA1) * gradient
    v = tl.load(c + BETA2) * v + tl.load(c + ONE_MINUS_BETA2) * (gradient * gradient)
    denominator = tl.sqrt_rn(v) + tl.load(c + EPS)
    # 0 where the denominator is: eps = 0 and no gradient yet.
    none = denominator == 0.0
    direction = tl.where(none, 0.0, tl.div_rn(m, tl.where(none, 1.0, denominator)))

    if EIGHT_BIT:
        # Every element has been decoded with the old absmax when its row's largest is known.
        m_scale, v_scale = block_absmax(m), block_absmax(v)
        tl.store(m_codes, encode(m, m_scale, maps, first_codes, True), there)
        tl.store(v_codes, encode(v, v_scale, maps, first_codes, False), there)
        tl.store(m_absmax, m_scale, block_there)
        tl.store(v_absmax, v_scale, block_there)
    else:
        tl.store(m_values, m, there)
        tl.store(v_values, v, there)
    return direction


@triton.jit
def decayed_weight(weight: tl.tensor, change: tl.tensor, control: tl.tensor, tensor: tl.tensor) -> tl.tensor:
    """(weight - change) * decay."""
    return (weight - change) * tl.load(coefficients(control, tensor) + DECAY)


@triton.jit
def updated_weight(weight: tl.tensor, direction: tl.tensor, control: tl.tensor, tensor: tl.tensor) -> tl.tensor:
    """(weight - step_size * direction) * decay."""
    change = tl.load(coefficients(control, tensor) + STEP_SIZE) * direction
    return decayed_weight(weight, change, control, tensor)
