"""``back_project_update``: W <- (W - step_size * X) * decay with X = U @ P.T (right) or P @ U.T (left).

In tiles of the weight, which is read and written once. Both operands are summed along their rows, so the side only
says which of them comes first. Of a quantized basis P are the codes; U has been multiplied by their scales. Of an int8
weight a tile has as many columns as a group, and so every element that shares a scale.
"""

from __future__ import annotations

import triton
from torch import Tensor
from triton import language as tl

from galore_kernels.backends.batch import Batch
from galore_kernels.backends.triton import configuration
from galore_kernels.backends.triton.adam import updated_weight
from galore_kernels.backends.triton.codes import block_absmax
from galore_kernels.backends.triton.dtypes import offset_dtype, triton_dtype
from galore_kernels.backends.triton.elements import (
    BASIS,
    PARAM,
    SEED,
    WEIGHT_SCALE,
    from_float,
    multiple,
    row_pointer,
    row_value,
    skip_flag,
    tile_of,
    to_float,
)
from galore_kernels.backends.triton.launch import launch
from galore_kernels.backends.triton.products import load_factor, multiply_add
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


@triton.jit(do_not_specialize=["rows", "cols", "rank"])
def back_project_update_kernel(
    table: tl.tensor,
    control: tl.tensor,
    direction: tl.tensor,
    rows: tl.int64,
    cols: tl.int64,
    rank: tl.int64,
    LEFT: tl.constexpr,
    WEIGHT_DTYPE: tl.constexpr,
    BASIS_DTYPE: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    GROUPED: tl.constexpr,
    ALIGNED: tl.constexpr,
    COLS_MULTIPLE: tl.constexpr,
    RANK_MULTIPLE: tl.constexpr,
    PACKED_MULTIPLE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    OFFSETS: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    program = tl.program_id(0)
    column_tiles = tl.cdiv(cols, COLUMNS).to(tl.int32)
    row_tiles = tl.cdiv(rows, ROWS).to(tl.int32)
    column_tile = program % column_tiles
    row_tile = program // column_tiles % row_tiles
    tensor = program // column_tiles // row_tiles
    if skip_flag(control, tensor) != 0:
        return

    cols, rank = multiple(cols, COLS_MULTIPLE), multiple(rank, RANK_MULTIPLE)
    row0, column0 = row_tile.to(tl.int64) * ROWS, column_tile.to(tl.int64) * COLUMNS
    rows_there, columns_there = row0 + tl.arange(0, ROWS) < rows, column0 + tl.arange(0, COLUMNS) < cols
    basis = row_pointer(table, tensor, BASIS, BASIS_DTYPE, ALIGNED)
    if LEFT:
        first = basis
        second = direction + tensor.to(tl.int64) * (cols * rank)
    else:
        first = direction + tensor.to(tl.int64) * (rows * rank)
        second = basis
    change = tl.zeros((ROWS, COLUMNS), tl.float32)
    for step in range(tl.cdiv(rank, DEPTH)):
        rank0 = tl.full((), step, tl.int64) * DEPTH
        depth_there = rank0 + tl.arange(0, DEPTH) < rank
        a = load_factor(first, row0, rank0, rank, rows_there, depth_there, ROWS, DEPTH, PACKED_MULTIPLE, OFFSETS, False)
        b = load_factor(
            second, column0, rank0, rank, columns_there, depth_there, COLUMNS, DEPTH, PACKED_MULTIPLE, OFFSETS, True
        )
        change = multiply_add(a, b, change, PRECISION)

    there = rows_there[:, None] & columns_there[None, :]
    param = row_pointer(table, tensor, PARAM, WEIGHT_DTYPE, ALIGNED)
    weights = tile_of(param, row0, column0, cols, ROWS, COLUMNS, OFFSETS)
    old = to_float(tl.load(weights, there, other=0))
    if tl.int8 == WEIGHT_DTYPE:
        groups = tl.cdiv(cols, COLUMNS)
        scales = row_pointer(table, tensor, WEIGHT_SCALE, tl.float32, ALIGNED) + (row0 * groups + column_tile)
        scales += tl.arange(0, ROWS) * groups
        scale = tl.load(scales, rows_there, other=0.0)
        # Beyond a row's end is 0, so that nothing there takes part in an absmax.
        weight = tl.where(there, updated_weight(old * scale[:, None], change, control, tensor), 0.0)
        scale = updated_scale(block_absmax(weight), scale)
        random = _random_of_tile(table, control, tensor, row0, column0, cols, GROUPED, ROWS, COLUMNS)
        tl.store(weights, stochastic_codes(weight, scale, random), there)
        tl.store(scales, scale, rows_there)
    elif STOCHASTIC:
        weight = updated_weight(old, change, control, tensor)
        random = _random_of_tile(table, control, tensor, row0, column0, cols, GROUPED, ROWS, COLUMNS)
        tl.store(weights, stochastic_bfloat16(weight, random), there)
    else:
        tl.store(weights, from_float(updated_weight(old, change, control, tensor), WEIGHT_DTYPE), there)


def back_project_update(batch: Batch, table: Tensor, control: Tensor, direction: Tensor) -> None:
    """The weights, from the (L, r) direction."""
    rows, cols = batch.shape
    tile = configuration.back_project_update_tile(batch)
    launch(
        back_project_update_kernel,
        batch.count * -(-rows // tile.rows) * -(-cols // tile.columns),
        batch.device,
        table,
        control,
        direction,
        rows,
        cols,
        batch.rank,
        LEFT=batch.side == "left",
        WEIGHT_DTYPE=triton_dtype(batch.weight_dtype),
        BASIS_DTYPE=triton_dtype(batch.basis_dtype),
        STOCHASTIC=batch.stochastic,
        GROUPED=cols % 8 == 0,  # each row begins with a group of eight elements, which share their random bits
        ALIGNED=batch.aligned,
        COLS_MULTIPLE=configuration.known_factor(cols, batch.aligned),
        RANK_MULTIPLE=configuration.known_factor(batch.rank, batch.aligned),
        PACKED_MULTIPLE=configuration.known_factor(-(-batch.rank // 2), batch.aligned),
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        DEPTH=tile.depth,
        OFFSETS=offset_dtype(tile, max(cols, batch.rank)),
        PRECISION=tile.precision,
        warps=tile.warps,
        stages=tile.stages,
    )
