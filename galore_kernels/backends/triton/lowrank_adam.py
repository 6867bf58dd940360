"""``lowrank_adam``: the moments and Adam's direction of projected gradients, over flat blocks of 256 elements."""

from __future__ import annotations

import triton
from torch import Tensor
from triton import language as tl

from galore_kernels.backends.batch import Batch
from galore_kernels.backends.triton import configuration
from galore_kernels.backends.triton.adam import tile_offsets, update_moments
from galore_kernels.backends.triton.code_tables import code_tables
from galore_kernels.backends.triton.dtypes import triton_dtype
from galore_kernels.backends.triton.elements import (
    BASIS_SCALE,
    BLOCK,
    count_step,
    from_float,
    multiple,
    row_pointer,
    skip_flag,
)
from galore_kernels.backends.triton.launch import launch
from galore_kernels.quantizers import block_count


@triton.jit(do_not_specialize=["elements", "rank", "programs_each"])
def lowrank_adam_kernel(
    table: tl.tensor,
    control: tl.tensor,
    lowrank: tl.tensor,
    direction: tl.tensor,
    maps: tl.tensor,
    first_codes: tl.tensor,
    elements: tl.int64,
    rank: tl.int32,
    programs_each: tl.int32,
    EIGHT_BIT: tl.constexpr,
    QUANTIZED: tl.constexpr,
    DIRECTION_DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    MULTIPLE: tl.constexpr,
    RANK_MULTIPLE: tl.constexpr,
    BLOCKS: tl.constexpr,
) -> None:
    tensor, part = tl.program_id(0) // programs_each, tl.program_id(0) % programs_each
    skip = skip_flag(control, tensor)
    if part == 0:
        count_step(table, tensor, skip)
    if skip != 0:
        return
    elements = multiple(elements, MULTIPLE)
    blocks, offsets = tile_offsets(part, BLOCKS)
    there = offsets < elements
    first = tensor.to(tl.int64) * elements
    g = tl.load(lowrank + first + offsets, there, other=0.0)
    u = update_moments(g, table, control, tensor, blocks, offsets, elements, maps, first_codes, EIGHT_BIT, ALIGNED)
    if QUANTIZED:
        rank = multiple(rank, RANK_MULTIPLE)
        # Within a tile 32 bits do, whose remainders are much cheaper.
        block_columns = (blocks * BLOCK % rank).to(tl.int32)
        columns = (block_columns[:, None] + tl.arange(0, BLOCK)[None, :]) % rank
        u = u * tl.load(row_pointer(table, tensor, BASIS_SCALE, tl.float32, ALIGNED) + columns)
    tl.store(direction + first + offsets, from_float(u, DIRECTION_DTYPE), there)


def lowrank_adam(batch: Batch, table: Tensor, control: Tensor, lowrank: Tensor, direction: Tensor) -> None:
    """Updates moments, ``step`` and ``skipped``; direction = Adam's direction, times a quantized basis' scales."""
    tile = configuration.element_tile("lowrank_adam", batch.moments)
    programs_each = max(1, -(-block_count(batch.moments) // tile.blocks))  # a step counts without elements too
    launch(
        lowrank_adam_kernel,
        batch.count * programs_each,
        batch.device,
        table,
        control,
        lowrank,
        direction,
        *code_tables(batch.device),
        batch.moments,
        batch.rank,
        programs_each,
        EIGHT_BIT=batch.eight_bit,
        QUANTIZED=not batch.basis_dtype.is_floating_point,
        DIRECTION_DTYPE=triton_dtype(direction.dtype),
        ALIGNED=batch.aligned,
        MULTIPLE=configuration.known_factor(batch.moments, batch.aligned),
        RANK_MULTIPLE=configuration.known_factor(batch.rank, batch.aligned),
        BLOCKS=tile.blocks,
        warps=tile.warps,
    )
