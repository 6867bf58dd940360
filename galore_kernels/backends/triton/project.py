"""``project``: R = G @ P (right) or G.T @ P (left), in tiles of long rows x columns of the basis.

Of a quantized basis P are the codes, and the sums are multiplied by its columns' scales. A basis that is a seed is
drawn, each tile where it is multiplied, and the sums are multiplied by 1 / sqrt(rank).

Where a batch has too few tiles to fill the device, the short dimension is split; ``scale_and_check`` sums the parts.
"""

from __future__ import annotations

import math

import triton
from torch import Tensor
from triton import language as tl

from galore_kernels.backends.batch import Batch
from galore_kernels.backends.triton import configuration
from galore_kernels.backends.triton.dtypes import offset_dtype, triton_dtype
from galore_kernels.backends.triton.elements import (
    BASIS,
    BASIS_SCALE,
    BASIS_SEED,
    GRADIENT,
    GRADIENT_SCALE,
    SKIP_FOUND_INF,
    coefficients,
    flag_unless_finite,
    flag_unless_representable,
    multiple,
    row_pointer,
    row_value,
    skip_flag,
    tile_of,
    to_float,
)
from galore_kernels.backends.triton.launch import launch, multiprocessors
from galore_kernels.backends.triton.products import load_factor, multiply_add
from galore_kernels.backends.triton.random_basis import drawn_entries
from galore_kernels.backends.triton.scale_and_check import sum_parts, sum_squares


@triton.jit(do_not_specialize=["long", "short", "rank", "count", "splits"])
def project_kernel(
    table: tl.tensor,
    control: tl.tensor,
    out: tl.tensor,
    squares: tl.tensor,
    magnitudes: tl.tensor,
    inverse_root: tl.float32,
    long: tl.int64,
    short: tl.int64,
    rank: tl.int64,
    count: tl.int32,
    splits: tl.int32,
    LEFT: tl.constexpr,
    GRAD_DTYPE: tl.constexpr,
    BASIS_DTYPE: tl.constexpr,
    DRAWN: tl.constexpr,
    SQUARES: tl.constexpr,
    SCALED: tl.constexpr,
    ALIGNED: tl.constexpr,
    GRAD_MULTIPLE: tl.constexpr,
    RANK_MULTIPLE: tl.constexpr,
    PACKED_MULTIPLE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    OFFSETS: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    # The basis' columns vary first: programs that share a panel of the gradient run together.
    program = tl.program_id(0)
    column_tiles = tl.cdiv(rank, COLUMNS).to(tl.int32)
    row_tiles = tl.cdiv(long, ROWS).to(tl.int32)
    column_tile = program % column_tiles
    program = program // column_tiles
    row_tile = program % row_tiles
    program = program // row_tiles
    split = program % splits
    tensor = program // splits
    if skip_flag(control, tensor) & SKIP_FOUND_INF:
        return

    rank = multiple(rank, RANK_MULTIPLE)
    if LEFT:
        long = multiple(long, GRAD_MULTIPLE)
    else:
        short = multiple(short, GRAD_MULTIPLE)
    row0, column0 = row_tile.to(tl.int64) * ROWS, column_tile.to(tl.int64) * COLUMNS
    rows_there, columns_there = row0 + tl.arange(0, ROWS) < long, column0 + tl.arange(0, COLUMNS) < rank
    gradient = row_pointer(table, tensor, GRADIENT, GRAD_DTYPE, ALIGNED)
    if DRAWN:
        basis_seed = row_value(table, tensor, BASIS_SEED)
    else:
        basis = row_pointer(table, tensor, BASIS, BASIS_DTYPE, ALIGNED)
    steps = tl.cdiv(short, DEPTH)
    steps_each = tl.cdiv(steps, splits)
    begin = split * steps_each
    sums, row_squares = tl.zeros((ROWS, COLUMNS), tl.float32), tl.zeros((ROWS,), tl.float32)
    for step in range(begin, tl.minimum(begin + steps_each, steps)):
        short0 = tl.full((), step, tl.int64) * DEPTH
        depth_there = short0 + tl.arange(0, DEPTH) < short
        if LEFT:
            pointers = tl.trans(tile_of(gradient, short0, row0, long, DEPTH, ROWS, OFFSETS))
        else:
            pointers = tile_of(gradient, row0, short0, short, ROWS, DEPTH, OFFSETS)
        g = tl.load(pointers, rows_there[:, None] & depth_there[None, :], other=0.0)
        if DRAWN:
            p = drawn_entries(basis_seed, magnitudes, short0, column0, rank, DEPTH, COLUMNS)
            if tl.float16 == GRAD_DTYPE:
                p = to_float(p).to(tl.float16)  # exact
        else:
            p = load_factor(
                basis,
                short0,
                column0,
                rank,
                depth_there,
                columns_there,
                DEPTH,
                COLUMNS,
                PACKED_MULTIPLE,
                OFFSETS,
                False,
            )
        if SQUARES:
            wide = to_float(g)
            row_squares += tl.sum(wide * wide, axis=1)
        sums = multiply_add(g, p, sums, PRECISION)

    there = rows_there[:, None] & columns_there[None, :]
    if BASIS_DTYPE.is_int():
        scales = row_pointer(table, tensor, BASIS_SCALE, tl.float32, ALIGNED) + column0 + tl.arange(0, COLUMNS)
        sums = sums * tl.load(scales, columns_there, other=0.0)[None, :]
    if DRAWN:
        sums = sums * inverse_root
    if SCALED:
        sums = sums * tl.load(coefficients(control, tensor) + GRADIENT_SCALE)
        flag_unless_representable(sums, there, control, tensor)
    own = out + (split.to(tl.int64) * count + tensor) * (long * rank)
    tl.store(tile_of(own, row0, column0, rank, ROWS, COLUMNS, OFFSETS), sums, there)
    if SQUARES and column_tile == 0:
        if SCALED:
            flag_unless_finite(row_squares, rows_there, control, tensor)
        own_squares = squares + (split.to(tl.int64) * count + tensor) * long + row0
        tl.store(own_squares + tl.arange(0, ROWS), row_squares, rows_there)


def project_splits(batch: Batch) -> int:
    """Into how many parts the short dimension is cut: enough for two tiles on every multiprocessor."""
    forced = configuration.forced_splits()
    if forced is not None:
        return forced
    tile = configuration.project_tile(batch)
    long, short = batch.long_short()
    tiles = batch.count * -(-long // tile.rows) * -(-batch.rank // tile.columns)
    # A part that sums less than this is not worth its way through memory.
    most = short // (tile.depth * 8)
    return max(1, min(most, 2 * multiprocessors(batch.device) // max(1, tiles)))


def _first(*tensors: Tensor | None) -> Tensor:
    """The first that is there: a kernel that doesn't look at an argument wants it all the same."""
    return next(tensor for tensor in tensors if tensor is not None)


def project(
    batch: Batch,
    table: Tensor,
    control: Tensor,
    lowrank: Tensor,
    partial: Tensor | None,
    *,
    final: bool,
    squares: Tensor | None,
    partial_squares: Tensor | None,
) -> None:
    """lowrank = the projected gradient; if ``final``, scaled and signed, and the skip flag set where it must be.

    squares: also the sums of the squares of the gradient's long indices.
    """
    long, short = batch.long_short()
    tile = configuration.project_tile(batch, squares=squares is not None)
    splits = 1 if partial is None else partial.shape[0]
    launch(
        project_kernel,
        batch.count * splits * -(-long // tile.rows) * -(-batch.rank // tile.columns),
        batch.device,
        table,
        control,
        lowrank if partial is None else partial,
        _first(partial_squares, squares, lowrank),
        _first(batch.magnitudes, lowrank),
        1.0 / math.sqrt(max(1, batch.rank)),
        long,
        short,
        batch.rank,
        batch.count,
        splits,
        LEFT=batch.side == "left",
        GRAD_DTYPE=triton_dtype(batch.grad_dtype),
        BASIS_DTYPE=triton_dtype(batch.basis_dtype),
        DRAWN=batch.magnitudes is not None,
        SQUARES=squares is not None,
        SCALED=final and partial is None,
        ALIGNED=batch.aligned,
        GRAD_MULTIPLE=configuration.known_factor(batch.shape[1], batch.aligned),
        RANK_MULTIPLE=configuration.known_factor(batch.rank, batch.aligned),
        PACKED_MULTIPLE=configuration.known_factor(-(-batch.rank // 2), batch.aligned),
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        DEPTH=tile.depth,
        OFFSETS=offset_dtype(tile, max(batch.shape[1], batch.rank)),
        PRECISION=tile.precision,
        warps=tile.warps,
        stages=tile.stages,
    )
    if partial is not None:
        sum_parts(partial, control, lowrank, scaled=final)
    if squares is not None and partial_squares is not None:
        sum_squares(partial_squares, control, squares)
