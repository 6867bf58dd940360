"""``random_basis``: bases that are drawn from a seed, as csrc/core/random_basis.h has it for other compilers."""

from __future__ import annotations

import triton
from torch import Tensor
from triton import language as tl

from galore_kernels.backends.triton import configuration
from galore_kernels.backends.triton.launch import launch
from galore_kernels.backends.triton.random_bits import PER_BLOCK, random_of_groups
from galore_kernels.ops.random_basis import MAGNITUDES as _MAGNITUDES
from galore_kernels.ops.random_basis import RandomBasis

MAGNITUDES = tl.constexpr(_MAGNITUDES)


@triton.jit
def drawn_entries(
    seed: tl.tensor,
    magnitudes: tl.tensor,
    row0: tl.tensor,
    column0: tl.tensor,
    rank: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> tl.tensor:
    """The entries from (row0, column0) on of a basis with ``rank`` columns, times sqrt(rank), as bfloat16.

    Beyond the basis' end are others. magnitudes: the family's. row0 and column0: int64, column0 a multiple of eight.
    """
    blocks_each = tl.cdiv(rank, PER_BLOCK)  # a row begins a block of random bits
    first = row0 * blocks_each + column0 // PER_BLOCK
    blocks = tl.arange(0, ROWS)[:, None] * blocks_each + tl.arange(0, COLUMNS // PER_BLOCK)[None, :]
    random = random_of_groups(seed, tl.full((), 0, tl.int64), first + blocks)
    size = tl.load(magnitudes + ((random >> 4) % MAGNITUDES).to(tl.int32)).to(tl.uint16, bitcast=True)
    return (size | (random & 0x8000).to(tl.uint16)).to(tl.bfloat16, bitcast=True)


@triton.jit(do_not_specialize=["seed", "short", "rank"])
def random_basis_kernel(
    out: tl.tensor,
    magnitudes: tl.tensor,
    seed: tl.int64,
    short: tl.int64,
    rank: tl.int64,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    column_tiles = tl.cdiv(rank, COLUMNS).to(tl.int32)
    row0 = (tl.program_id(0) // column_tiles).to(tl.int64) * ROWS
    column0 = (tl.program_id(0) % column_tiles).to(tl.int64) * COLUMNS
    rows, columns = row0 + tl.arange(0, ROWS)[:, None], column0 + tl.arange(0, COLUMNS)[None, :]
    z = drawn_entries(seed.to(tl.uint64), magnitudes, row0, column0, rank, ROWS, COLUMNS)
    tl.store(out + rows * rank + columns, z, (rows < short) & (columns < rank))


def random_basis(drawn: Tensor, basis: RandomBasis, magnitudes: Tensor) -> None:
    """drawn (S, rank) bfloat16 = the entries, times sqrt(rank)."""
    tile = configuration.panel_tile("random_basis", *drawn.shape)
    launch(
        random_basis_kernel,
        -(-drawn.shape[0] // tile.rows) * -(-basis.rank // tile.columns),
        drawn.device,
        drawn,
        magnitudes,
        basis.seed,
        *drawn.shape,
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        warps=tile.warps,
    )
