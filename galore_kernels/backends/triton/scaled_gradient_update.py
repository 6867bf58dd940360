"""``scaled_gradient_update``: W <- (W - g * factor) * decay, a factor for each row (right) or column (left).

g is the gradient, scaled and signed. Of an int8 weight a tile has as many columns as a group.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from triton import language as tl

from galore_kernels.backends.batch import Batch
from galore_kernels.backends.triton import configuration
from galore_kernels.backends.triton.dtypes import offset_dtype, triton_dtype
from galore_kernels.backends.triton.elements import (
    GRADIENT,
    GRADIENT_SCALE,
    coefficients,
    multiple,
    row_pointer,
    skip_flag,
    tile_of,
    to_float,
)
from galore_kernels.backends.triton.launch import launch
from galore_kernels.backends.triton.weight_tile import update_weight_tile
from galore_kernels.quantizers import GROUP_SIZE


@triton.jit(do_not_specialize=["rows", "cols"])
def scaled_gradient_update_kernel(
    table: tl.tensor,
    control: tl.tensor,
    factors: tl.tensor,
    rows: tl.int64,
    cols: tl.int64,
    LEFT: tl.constexpr,
    WEIGHT_DTYPE: tl.constexpr,
    GRAD_DTYPE: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    GROUPED: tl.constexpr,
    ALIGNED: tl.constexpr,
    COLS_MULTIPLE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    OFFSETS: tl.constexpr,
) -> None:
    program = tl.program_id(0)
    column_tiles = tl.cdiv(cols, COLUMNS).to(tl.int32)
    row_tiles = tl.cdiv(rows, ROWS).to(tl.int32)
    column_tile = program % column_tiles
    row_tile = program // column_tiles % row_tiles
    tensor = program // column_tiles // row_tiles
    if skip_flag(control, tensor) != 0:
        return

    cols = multiple(cols, COLS_MULTIPLE)
    row0, column0 = row_tile.to(tl.int64) * ROWS, column_tile.to(tl.int64) * COLUMNS
    rows_there, columns_there = row0 + tl.arange(0, ROWS) < rows, column0 + tl.arange(0, COLUMNS) < cols
    gradient = row_pointer(table, tensor, GRADIENT, GRAD_DTYPE, ALIGNED)
    pointers = tile_of(gradient, row0, column0, cols, ROWS, COLUMNS, OFFSETS)
    g = to_float(tl.load(pointers, rows_there[:, None] & columns_there[None, :], other=0.0))
    g = g * tl.load(coefficients(control, tensor) + GRADIENT_SCALE)
    if LEFT:
        own = factors + tensor.to(tl.int64) * cols + column0
        change = g * tl.load(own + tl.arange(0, COLUMNS), columns_there, other=0.0)[None, :]
    else:
        own = factors + tensor.to(tl.int64) * rows + row0
        change = g * tl.load(own + tl.arange(0, ROWS), rows_there, other=0.0)[:, None]
    update_weight_tile(
        change,
        table,
        control,
        tensor,
        row0,
        column0,
        rows_there,
        columns_there,
        cols,
        WEIGHT_DTYPE,
        STOCHASTIC,
        GROUPED,
        ALIGNED,
        ROWS,
        COLUMNS,
        OFFSETS,
    )


def scaled_gradient_update(batch: Batch, table: Tensor, control: Tensor, factors: Tensor) -> None:
    """The weights, from the (N, L) factors of the gradients."""
    rows, cols = batch.shape
    columns = max(cols, GROUP_SIZE) if batch.weight_dtype == torch.int8 else cols
    tile = configuration.panel_tile("scaled_gradient_update", rows, columns)
    launch(
        scaled_gradient_update_kernel,
        batch.count * -(-rows // tile.rows) * -(-cols // tile.columns),
        batch.device,
        table,
        control,
        factors,
        rows,
        cols,
        LEFT=batch.side == "left",
        WEIGHT_DTYPE=triton_dtype(batch.weight_dtype),
        GRAD_DTYPE=triton_dtype(batch.grad_dtype),
        STOCHASTIC=batch.stochastic,
        GROUPED=cols % 8 == 0,
        ALIGNED=batch.aligned,
        COLS_MULTIPLE=configuration.known_factor(cols, batch.aligned),
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        OFFSETS=offset_dtype(tile, cols),
        warps=tile.warps,
    )
