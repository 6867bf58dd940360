"""The processes of a run: that they agree, and how those with tokens of their own find one basis together.

In prepared layers each has factors of its own tokens, while the low-rank gradients that are averaged have to be taken
in one basis.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from galore_kernels.ops.projection import long_short
from galore_kernels.optim.options import matrix_shape
from galore_kernels.optim.update import Update
from galore_kernels.subspace import AllReduce, Factors, SummedGradient, block_columns, exchanged, is_thin

if TYPE_CHECKING:
    from galore_kernels.optim.rules import Rule

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

#: The default process group, and the one that was made for it. In a group of its own the search can't be taken for, nor
#: wait for, the gradients' all-reduce, which is under way in the same backward pass.
_made: tuple[object, dist.ProcessGroup] | None = None


def check_agreement(
    optimizer: str, rule: Rule, param_groups: Sequence[Mapping[str, Any]], groups: Sequence[dist.ProcessGroup]
) -> None:
    """Raises ValueError in every process unless all have the same parameters in the same groups.

    Args:
        optimizer: its class' name.
        groups: of processes; through them all are connected.
    """
    own = _description(optimizer, rule, param_groups)
    digest = hashlib.blake2b(own.encode(), digest_size=8).digest()
    device = param_groups[0]["params"][0].device
    number = torch.tensor([int.from_bytes(digest, "little") >> 1], device=device)
    extremes = torch.cat([number, -number])
    for group in groups:
        dist.all_reduce(extremes, dist.ReduceOp.MAX, group)
    largest, negated = extremes.tolist()
    if largest != -negated:
        raise ValueError(
            f"optimizer: the processes differ in their parameters' shapes or in their groups' options; process "
            f"{dist.get_rank()} has {own}; build model and optimizer alike in all of them"
        )


def _description(optimizer: str, rule: Rule, param_groups: Sequence[Mapping[str, Any]]) -> str:
    described = []
    for group in param_groups:
        options = {key: group[key] for key in sorted(rule.keys) if key not in ("params", "param_names")}
        shapes = [(tuple(param.shape), str(param.dtype)) for param in group["params"]]
        described.append(f"{options} of {shapes}")
    return f"{optimizer}: " + "; ".join(described)


def searches_thinly(update: Update) -> bool:
    """Whether finding the basis by thin products, and sending the projection, takes fewer bytes than the gradient."""
    layout = update.layout
    long, short = long_short(matrix_shape(update.param.shape), layout.side or "")
    columns = block_columns((long, short), layout.rank or 0, update.group["refresh_method"])
    if columns is None:
        return False
    searches = [exchanged(long, short, columns)]
    if "long_basis" in layout.bases:
        searches.append(exchanged(short, long, columns))
    return is_thin(searches, math.prod(layout.moments), update.param.numel(), update.param.element_size())


def summed(grad: Tensor, group: dist.ProcessGroup) -> SummedGradient:
    """The sum of all processes' gradients (m, n), as a search takes it."""
    return SummedGradient(grad, _all_reduce_of(group))


def factors_of(update: Update, pairs: list[tuple[Tensor, Tensor]]) -> Factors | None:
    """The factors of the sum of all processes' gradients; where there are no others, of ``pairs``. None of none.

    Args:
        pairs: (T, m) and (T, n) of each backward pass of this process; none where it has not used the layer.

    Raises:
        RuntimeError: another process is looking for another layer's basis.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return Factors(pairs) if pairs else None
    weight, all_reduce = update.weight, _all_reduce_of(_group_of(dist.group.WORLD))
    own = _DTYPES.index(pairs[0][0].dtype) if pairs else -1
    said = torch.tensor([update.index, -update.index, own], device=weight.device)
    all_reduce(said, largest=True)
    last, first, dtype = said.tolist()
    if last != -first:
        raise RuntimeError(
            f"{update.name}: other processes are looking for the subspace of another parameter; in the first backward "
            "pass every process has to use all prepared layers, in the same order: see to that, or unprepare the model"
        )
    if dtype < 0:
        return None
    nothing = [weight.new_empty((0, size), dtype=_DTYPES[dtype]) for size in weight.shape]
    return Factors(pairs or [(nothing[0], nothing[1])], all_reduce)


def _group_of(world: object) -> dist.ProcessGroup:
    """The one that was made for ``world``."""
    global _made
    if _made is None or _made[0] is not world:
        _made = world, dist.new_group()
    return _made[1]


def _all_reduce_of(group: dist.ProcessGroup) -> AllReduce:
    def all_reduce(tensor: Tensor, *, largest: bool = False) -> None:
        dist.all_reduce(tensor, dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM, group)

    return all_reduce
