"""The state of a parameter that processes have parts of, on its way out and in: DTensors, divided as the parameter is.

Blocks of 8-bit moments are counted from a part's first element, so that they fall elsewhere when the rows are divided
otherwise. A state dict therefore has an absmax for each piece of a row that no block's border can cut, of
gcd(elements of a row, 256) elements: (rows, pieces) instead of (blocks,). Rows can then be divided anew; where blocks
fall as before they are found again to the bit, and elsewhere the moments are quantized anew.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from galore_kernels import ops
from galore_kernels.optim.shard import Shard, is_dtensor, local
from galore_kernels.optim.state import Layout
from galore_kernels.quantizers import BLOCK_SIZE, block_count, dynamic_map

_ABSMAX = "_absmax"

#: The moments; of the first one codes have signs.
_MOMENTS = {"exp_avg": True, "exp_avg_sq": False}


def as_dtensors(state: Mapping[str, Any], layout: Layout) -> dict[str, Any]:
    """A part's ``state`` with its moments as DTensors; they share its memory, but for absmax."""
    shard, result = layout.shard, dict(state)
    if shard is None or layout.sums:
        return result
    for name in _MOMENTS.keys() & state.keys():
        result[name] = _as_dtensor(state[name], shard)
        if name + _ABSMAX in state:
            result[name + _ABSMAX] = _as_dtensor(_of_pieces(state[name + _ABSMAX], layout.moments), shard)
    return result


def own_part(entry: Mapping[str, Any], layout: Layout, where: str) -> dict[str, Any]:
    """What this process keeps of a loaded state, whole or a DTensor; of anything that doesn't fit no less than it got.

    Raises:
        ValueError: DTensors for a parameter that is none.
    """
    shard = None if layout.sums else layout.shard
    if layout.shard is None and any(map(is_dtensor, entry.values())):
        raise ValueError(
            f"{where}: its state is divided among processes, and the parameter isn't; export it whole, with torch's "
            "get_optimizer_state_dict(..., options=StateDictOptions(full_state_dict=True))"
        )
    result = {key: local(value) if isinstance(value, Tensor) else value for key, value in entry.items()}
    whole = layout.moments if shard is None else (shard.whole[0], *layout.moments[1:])
    for name, signed in _MOMENTS.items():
        codes: Any = result.get(name)
        absmax: Any = result.get(name + _ABSMAX)
        if not isinstance(codes, Tensor):
            continue
        is_quantized = isinstance(absmax, Tensor)
        if shard is not None and not is_dtensor(entry[name]) and tuple(codes.shape) == whole:
            result[name] = codes = codes[shard.rows]
            if is_quantized and absmax.shape == (block_count(math.prod(whole)),):
                absmax = _of_pieces(absmax, whole)
            if is_quantized and absmax.shape == _pieces(whole):
                absmax = absmax[shard.rows]
        if is_quantized and tuple(codes.shape) == layout.moments and absmax.shape == _pieces(layout.moments):
            result[name], result[name + _ABSMAX] = _of_blocks(codes, absmax, signed)
    return result


def _as_dtensor(part: Tensor, shard: Shard) -> Tensor:
    from torch.distributed.tensor import DTensor

    shape = torch.Size((shard.whole[0], *part.shape[1:]))
    stride = torch.empty(shape, device="meta").stride()
    found: Tensor = DTensor.from_local(part, shard.mesh, shard.placements, run_check=False, shape=shape, stride=stride)
    return found


def _pieces(shape: tuple[int, ...]) -> tuple[int, int]:
    """The rows of moments of this shape, and the pieces of each."""
    elements = math.prod(shape[1:])
    return shape[0], elements // math.gcd(elements, BLOCK_SIZE)


def _blocks_of_pieces(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Of each piece the block that it lies in, in moments of this shape: (rows, pieces)."""
    rows, each = _pieces(shape)
    size = math.gcd(math.prod(shape[1:]), BLOCK_SIZE)
    return (torch.arange(rows * each, device=device) * size // BLOCK_SIZE).view(rows, each)


def _of_pieces(absmax: Tensor, shape: tuple[int, ...]) -> Tensor:
    """(rows, pieces) of (blocks,)."""
    return absmax[_blocks_of_pieces(shape, absmax.device)]


def _of_blocks(codes: Tensor, absmax: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """Codes, and absmax (blocks,) of (rows, pieces)."""
    shape = tuple(codes.shape)
    blocks = _blocks_of_pieces(shape, absmax.device).flatten()
    largest = absmax.new_zeros(block_count(codes.numel()))
    largest.scatter_reduce_(0, blocks, absmax.flatten(), "amax")
    if torch.equal(largest[blocks], absmax.flatten()):
        return codes, largest
    values = dynamic_map(signed).to(codes.device)[codes.long()].view(*absmax.shape, -1) * absmax[..., None]
    return ops.quantize_blockwise(values.view(shape), signed)
