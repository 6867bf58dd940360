"""Parameters of which each process has a part: DTensors, as FSDP2 (``fully_shard``) makes them.

The state of such a parameter is that of its part: moments of the rows that the process has. Bases are whole, the same
in every process: each finds them by the same steps in the same sums. Among the replicas of HSDP that rests on sums
coming out alike in different groups of processes (gloo's do, which is tested).
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

_PLAIN_TYPES = (Tensor, nn.Parameter)


def is_dtensor(tensor: object) -> bool:
    """Whether it is a DTensor. Doesn't import what defines them, which takes a second."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """What this process has of a DTensor, the same object each time; another tensor is returned as it is."""
    if not is_dtensor(tensor):
        return tensor
    with torch.no_grad():  # else it would be a new view
        part: Tensor = tensor.to_local()  # type: ignore[attr-defined]
    return part


def locals_of(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """What ``local`` gives of each."""
    if "torch.distributed.tensor" not in sys.modules:
        return list(tensors)
    return [tensor if tensor is None or type(tensor) in _PLAIN_TYPES else local(tensor) for tensor in tensors]


def placements(tensor: object) -> tuple[Any, ...] | None:
    """Of a DTensor, else None."""
    return tuple(tensor.placements) if is_dtensor(tensor) else None  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Shard:
    """What this process has of a parameter: rows ``start`` to ``start + size`` of dimension 0.

    Attributes:
        whole: the parameter's shape.
        group: the processes among which its rows are divided.
        mesh, placements: the DTensor's.
    """

    start: int
    size: int
    whole: tuple[int, ...]
    group: Any
    mesh: Any
    placements: tuple[Any, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the part."""
        return (self.size, *self.whole[1:])

    @property
    def rows(self) -> slice:
        """The part's among all."""
        return slice(self.start, self.start + self.size)

    def all_reduce(self, tensor: Tensor, *, largest: bool = False) -> None:
        """See ``galore_kernels.subspace.AllReduce``."""
        dist.all_reduce(tensor, dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM, self.group)


def shard_of(param: Tensor) -> Shard | None:
    """The part of ``param`` that this process has, or None if it has all of it."""
    if not is_dtensor(param):
        return None
    mesh, placed = param.device_mesh, placements(param) or ()  # type: ignore[attr-defined]
    divided = [place for place, placement in enumerate(placed) if placement.is_shard()]
    if not divided:
        return None
    place, whole = divided[0], tuple(param.shape)
    each = -(-whole[0] // mesh.size(place))  # as torch.chunk divides
    start = min(each * mesh.get_local_rank(place), whole[0])
    size = min(each, whole[0] - start)
    return Shard(start, size, whole, mesh.get_group(place), mesh, placed)


#: Options that need more of a gradient than a part, with what to do instead.
_REFUSED = {
    ("rank", "auto"): "pass a number",
    ("proj_type", "full"): 'pass "right", or "std"',
    ("moments_on_refresh", "reset"): 'pass "rotate", or "keep"',
}


def check_sharding(param: Tensor, group: Mapping[str, Any], name: str, optimizer: str | None) -> None:
    """Raises ValueError for a DTensor that can't be updated in parts, or not with its group's options.

    Args:
        optimizer: the name of one that needs more than parts, else None.
    """
    if not is_dtensor(param):
        return
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor import Shard as Sharded

    placed, shard = placements(param) or (), shard_of(param)
    dims = [placement.dim for placement in placed if type(placement) is Sharded]
    if any(type(placement) not in (Replicate, Sharded) for placement in placed) or dims not in ([], [0]):
        raise ValueError(
            f"{name}: expected a DTensor that is divided once, by its rows (Shard(0)), or not at all, got "
            f"{placed}; use fully_shard's own placement, without tensor parallelism"
        )
    expected, part = tuple(param.shape) if shard is None else shard.shape, tuple(local(param).shape)
    if part != expected:
        raise ValueError(
            f"{name}: expected {expected} of a DTensor of shape {tuple(param.shape)} in this process, got {part}; "
            "divide it as torch.chunk does, which fully_shard does"
        )
    if shard is None:
        return
    if optimizer is not None:
        raise ValueError(
            f"{name}: each process has a part of it (fully_shard), and {optimizer} needs norms of the whole; use "
            "GaLoreFusedAdam8bit or GaLoreFusedAdamW, or DDP"
        )
    for (key, value), remedy in _REFUSED.items():
        if group[key] == value:
            raise ValueError(
                f"{key}={value!r}, {name}: each process has a part of it (fully_shard), of which that can't be told; "
                f"{remedy}"
            )
