"""A tile of the weight: read, W <- (W - change) * decay, and written in its dtype. The end of every projected update.

Of an int8 weight a tile has as many columns as a group, and so every element that shares a scale.
"""

from __future__ import annotations

import triton
from triton import language as tl

from galore_kernels.backends.triton.adam import decayed_weight
from galore_kernels.backends.triton.codes import block_absmax
from galore_kernels.backends.triton.elements import (
    PARAM,
    SEED,
    WEIGHT_SCALE,
    from_float,
    row_pointer,
    row_value,
    tile_of,
    to_float,
)
from galore_kernels.backends.triton.quantized_weight import stochastic_codes, updated_scale
from galore_kernels.backends.triton.random_bits import (
    PER_BLOCK,
    random_of_elements,
    random_of_groups,
    step_number,
    stochastic_bfloat16,
)


@triton.jit
def _random_of_tile(
    table: tl.tensor,
    control: tl.tensor,
    tensor: tl.tensor,
    row0: tl.tensor,
    column0: tl.tensor,
    cols: tl.tensor,
    GROUPED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> tl.tensor:
    """The 16 bits of each element of the weight's tile from (row0, column0) on."""
    seed, number = row_value(table, tensor, SEED), step_number(control, tensor)
    if GROUPED:
        group0 = row0 * (cols // PER_BLOCK) + column0 // PER_BLOCK
        groups = tl.arange(0, ROWS)[:, None] * (cols // PER_BLOCK) + tl.arange(0, COLUMNS // PER_BLOCK)[None, :]
        return random_of_groups(seed, number, group0 + groups)
    else:
        elements = tl.arange(0, ROWS)[:, None] * cols + tl.arange(0, COLUMNS)[None, :]
        return random_of_elements(seed, number, row0 * cols + column0 + elements)


@triton.jit
def update_weight_tile(
    change: tl.tensor,
    table: tl.tensor,
    control: tl.tensor,
    tensor: tl.tensor,
    row0: tl.tensor,
    column0: tl.tensor,
    rows_there: tl.tensor,
    columns_there: tl.tensor,
    cols: tl.tensor,
    WEIGHT_DTYPE: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    GROUPED: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    OFFSETS: tl.constexpr,
) -> None:
    """The (ROWS, COLUMNS) tile from (row0, column0) on of a tensor's weight, which has ``cols`` columns."""
    there = rows_there[:, None] & columns_there[None, :]
    param = row_pointer(table, tensor, PARAM, WEIGHT_DTYPE, ALIGNED)
    weights = tile_of(param, row0, column0, cols, ROWS, COLUMNS, OFFSETS)
    old = to_float(tl.load(weights, there, other=0))
    if tl.int8 == WEIGHT_DTYPE:
        groups = tl.cdiv(cols, COLUMNS)
        scales = row_pointer(table, tensor, WEIGHT_SCALE, tl.float32, ALIGNED) + (row0 * groups + column0 // COLUMNS)
        scales += tl.arange(0, ROWS) * groups
        scale = tl.load(scales, rows_there, other=0.0)
        # Beyond a row's end is 0, so that nothing there takes part in an absmax.
        weight = tl.where(there, decayed_weight(old * scale[:, None], change, control, tensor), 0.0)
        scale = updated_scale(block_absmax(weight), scale)
        random = _random_of_tile(table, control, tensor, row0, column0, cols, GROUPED, ROWS, COLUMNS)
        tl.store(weights, stochastic_codes(weight, scale, random), there)
        tl.store(scales, scale, rows_there)
    elif STOCHASTIC:
        weight = decayed_weight(old, change, control, tensor)
        random = _random_of_tile(table, control, tensor, row0, column0, cols, GROUPED, ROWS, COLUMNS)
        tl.store(weights, stochastic_bfloat16(weight, random), there)
    else:
        tl.store(weights, from_float(decayed_weight(old, change, control, tensor), WEIGHT_DTYPE), there)
