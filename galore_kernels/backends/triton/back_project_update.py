"""``back_project_update``: W <- (W - step_size * X) * decay with X = U @ P.T (right) or P @ U.T (left).

In tiles of the weight, which is read and written once. Both operands are summed along their rows, so the side only
says which of them comes first. Of a quantized basis P are the codes; U has been multiplied by their scales.
"""

from __future__ import annotations

import triton
from torch import Tensor
from triton import language as tl

from galore_kernels.backends.batch import Batch
from galore_kernels.backends.triton import configuration
from galore_kernels.backends.triton.dtypes import offset_dtype, triton_dtype
from galore_kernels.backends.triton.elements import BASIS, STEP_SIZE, coefficients, multiple, row_pointer, skip_flag
from galore_kernels.backends.triton.launch import launch
from galore_kernels.backends.triton.products import load_factor, multiply_add
from galore_kernels.backends.triton.weight_tile import update_weight_tile


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

    change *= tl.load(coefficients(control, tensor) + STEP_SIZE)
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
