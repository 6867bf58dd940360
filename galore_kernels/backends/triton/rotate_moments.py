"""``rotate_moments``: Adam's moments carried to another basis. Contract: ``galore_kernels.ops.rotate_moments``.

Both products in one launch, in tiles of the new moments; of 8-bit ones as float32, which two more launches encode: a
block of 256 elements lies in as many tiles as it likes, and a refresh has had larger scratch.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from triton import language as tl

from galore_kernels.backends.triton import configuration
from galore_kernels.backends.triton.code_tables import code_tables
from galore_kernels.backends.triton.codes import decode
from galore_kernels.backends.triton.dtypes import offset_dtype
from galore_kernels.backends.triton.elements import BLOCK, multiple, tile_of
from galore_kernels.backends.triton.launch import launch
from galore_kernels.backends.triton.prepare import as_double, one_minus_powers
from galore_kernels.backends.triton.products import multiply_add
from galore_kernels.backends.triton.quantize_blockwise import quantize_into
from galore_kernels.ops.adam import AdamState


@triton.jit
def _load_moment(
    moment: tl.tensor,
    absmax: tl.tensor,
    offsets: tl.tensor,
    there: tl.tensor,
    maps: tl.tensor,
    EIGHT_BIT: tl.constexpr,
    SIGNED: tl.constexpr,
) -> tl.tensor:
    if EIGHT_BIT:
        scale = tl.load(absmax + offsets // BLOCK, there, other=0.0)
        return decode(tl.load(moment + offsets, there, other=0), scale, maps, SIGNED)
    else:
        return tl.load(moment + offsets, there, other=0.0)


@triton.jit
def _second_from_square_of_first(step: tl.tensor, beta1: tl.float64, beta2: tl.float64) -> tl.tensor:
    """c = (1 - beta2^t) / (1 - beta1^t)^2; 0 at t = 0, where both moments are."""
    steps = tl.load(step).to(tl.int64)
    correction1, correction2 = one_minus_powers(as_double(beta1), as_double(beta2), steps)
    divisor = correction1 * correction1
    return tl.where(steps > 0, correction2 / tl.where(steps > 0, divisor, 1.0), 0.0).to(tl.float32)


@triton.jit(do_not_specialize=["long", "rank", "new_rank"])
def rotate_moments_kernel(
    m: tl.tensor,
    v: tl.tensor,
    m_absmax: tl.tensor,
    v_absmax: tl.tensor,
    step: tl.tensor,
    rotation: tl.tensor,
    new_m: tl.tensor,
    new_v: tl.tensor,
    maps: tl.tensor,
    long: tl.int64,
    rank: tl.int64,
    new_rank: tl.int64,
    beta1: tl.float64,
    beta2: tl.float64,
    EIGHT_BIT: tl.constexpr,
    RANK_MULTIPLE: tl.constexpr,
    NEW_RANK_MULTIPLE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    OFFSETS: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    rank, new_rank = multiple(rank, RANK_MULTIPLE), multiple(new_rank, NEW_RANK_MULTIPLE)
    column_tiles = tl.cdiv(new_rank, COLUMNS).to(tl.int32)
    row0 = (tl.program_id(0) // column_tiles).to(tl.int64) * ROWS
    column0 = (tl.program_id(0) % column_tiles).to(tl.int64) * COLUMNS
    rows_there, columns_there = row0 + tl.arange(0, ROWS) < long, column0 + tl.arange(0, COLUMNS) < new_rank
    c = _second_from_square_of_first(step, beta1, beta2)
    turned, carried = tl.zeros((ROWS, COLUMNS), tl.float32), tl.zeros((ROWS, COLUMNS), tl.float32)
    for k in range(tl.cdiv(rank, DEPTH)):
        depth0 = tl.full((), k, tl.int64) * DEPTH
        depth_there = depth0 + tl.arange(0, DEPTH) < rank
        offsets = tile_of(tl.full((), 0, tl.int64), row0, depth0, rank, ROWS, DEPTH, OFFSETS)
        there = rows_there[:, None] & depth_there[None, :]
        first = _load_moment(m, m_absmax, offsets, there, maps, EIGHT_BIT, True)
        second = _load_moment(v, v_absmax, offsets, there, maps, EIGHT_BIT, False)
        pointers = tile_of(rotation, depth0, column0, new_rank, DEPTH, COLUMNS, OFFSETS)
        turn = tl.load(pointers, depth_there[:, None] & columns_there[None, :], other=0.0)
        turned = multiply_add(first, turn, turned, PRECISION)
        carried = multiply_add(second - (first * first) * c, turn * turn, carried, PRECISION)

    there = rows_there[:, None] & columns_there[None, :]
    tl.store(tile_of(new_m, row0, column0, new_rank, ROWS, COLUMNS, OFFSETS), turned, there)
    second = tl.abs(carried + (turned * turned) * c)
    tl.store(tile_of(new_v, row0, column0, new_rank, ROWS, COLUMNS, OFFSETS), second, there)


def _or_any(absmax: Tensor | None, other: Tensor) -> Tensor:
    # float32 moments have no absmax, and a kernel that doesn't look at an argument wants it all the same.
    return other if absmax is None else absmax


def rotate_moments(source: AdamState, target: AdamState, rotation: Tensor, beta1: float, beta2: float) -> None:
    """The moments of ``target`` from those of ``source``, at any ranks; ``step`` is read by the kernel."""
    (long, rank), new_rank = source.exp_avg.shape, rotation.shape[1]
    eight_bit = source.exp_avg_absmax is not None
    new = [target.exp_avg, target.exp_avg_sq]
    if eight_bit:
        new = [torch.empty_like(moment, dtype=torch.float32) for moment in new]
    tile = configuration.rotate_moments_tile()
    launch(
        rotate_moments_kernel,
        -(-long // tile.rows) * -(-new_rank // tile.columns),
        rotation.device,
        source.exp_avg,
        source.exp_avg_sq,
        _or_any(source.exp_avg_absmax, rotation),
        _or_any(source.exp_avg_sq_absmax, rotation),
        source.step,
        rotation,
        *new,
        code_tables(rotation.device)[0],
        long,
        rank,
        new_rank,
        beta1,
        beta2,
        EIGHT_BIT=eight_bit,
        RANK_MULTIPLE=configuration.known_factor(rank, True),
        NEW_RANK_MULTIPLE=configuration.known_factor(new_rank, True),
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        DEPTH=tile.depth,
        OFFSETS=offset_dtype(tile, max(rank, new_rank)),
        PRECISION=tile.precision,
        warps=tile.warps,
        stages=tile.stages,
    )
    if target.exp_avg_absmax is not None and target.exp_avg_sq_absmax is not None:
        quantize_into(new[0], target.exp_avg, target.exp_avg_absmax, signed=True)
        quantize_into(new[1], target.exp_avg_sq, target.exp_avg_sq_absmax, signed=False)
