"""DDP that averages projected gradients: ``reduce_lowrank``.

R = G @ P is linear in G, so that the mean of all processes' R is the R of the mean gradient: a matrix whose basis is
not due to be found anew needs r / S of the bytes on the wire. One that is due is found in the mean gradient too, by
sums of thin products, where these are less. DDP asks a hook of ours for each bucket of gradients. The mean R then lies
in the first elements of ``.grad``, behind it zeros: its norm is R's, and what scales gradients (clipping, GradScaler)
scales R.
"""
# No `from __future__ import annotations`: DDP compares the annotations of a hook with the classes they name.

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from galore_kernels.optim.base import LowRankOptimizer
from galore_kernels.optim.processes import check_agreement, searches_thinly, summed
from galore_kernels.optim.refresh import Found
from galore_kernels.optim.update import Update


class LowRankReduction:
    """What the hook knows.

    Args:
        optimizer: whose bases project.
        group: the processes.
    """

    def __init__(self, optimizer: LowRankOptimizer, group: Any) -> None:
        self.optimizer, self.group = optimizer, group
        self._updates: dict[int, Update] = {}
        self._listed: object = None
        self._has_begun = False

    def begin(self, *_: Any) -> None:
        """Before a forward pass: to what is projected already nothing can be added.

        Raises:
            RuntimeError: gradients of the step before are still there.
        """
        if not torch.is_grad_enabled():  # an evaluation: no gradient will come of it
            return
        # Those that somebody else has zeroed in place are told by their values alone.
        if any(bool(grad.any()) for grad in self.optimizer.packed.gradients()):
            raise RuntimeError(
                "gradients: expected none, or zeros, before a forward pass, got those of the step before, which are "
                "projected and can't be added to; call optimizer.zero_grad() after each step, and accumulate under "
                "model.no_sync()"
            )
        self.optimizer.packed.clear()
        self._has_begun = False
        options = [self.optimizer.options_of(group) for group in self.optimizer.param_groups]
        listed = options, [id(param) for group in self.optimizer.param_groups for param in group["params"]]
        if listed != self._listed:
            self._listed = listed
            self._updates = {id(update.param): update for update in self.optimizer.listed()}

    def part_of(self, param: Tensor, grad: Tensor) -> "Part":
        """What is sent of the gradient ``grad`` of ``param``; where a basis is due, it is found, by all processes."""
        if not self._has_begun:  # not before the forward pass, beside which asynchronous searches run
            self.optimizer.take_pending()
            self._has_begun = True
        update = self._updates.get(id(param))
        if update is None or update.carried is not None or update.layout.rank is None or not param.is_contiguous():
            return Part(grad, grad)
        due = self.optimizer.is_due(update)
        if (
            param.dim() != 2
            or math.prod(update.layout.moments) >= param.numel()
            or (due and not searches_thinly(update))
        ):
            return Part(grad, grad)
        found = self.optimizer.find(update, summed(grad, self.group)) if due else None
        return Part(grad, self.optimizer.projected(update, grad, found).to(grad.dtype), update, found)


@dataclass(frozen=True)
class Part:
    """Of a bucket: a gradient, and what is sent of it: itself, or its projection by ``update``'s bases.

    ``found``: in this step.
    """

    grad: Tensor
    sent: Tensor
    update: Update | None = None
    found: Found | None = None


def reduce_lowrank(model: DistributedDataParallel, optimizer: LowRankOptimizer) -> None:
    """Has DDP average the projections of gradients instead of the gradients, where that is all the optimizer needs.

    The training is that of plain DDP: the same in exact arithmetic, and to rounding in floating point (R is sent in
    the gradient's dtype). In the step in which a matrix' basis is found anew the processes search together, and
    exchange thin products in float32; its whole gradient is averaged where that is less (at high ranks, or with
    ``refresh_method="svd"``), as are always the gradients of what isn't projected. All have the same bases.
    A search estimates its gradient's norm, by which a warm start is judged, and ``subspace_report``'s captured share.

        model = DistributedDataParallel(model)
        optimizer = GaLoreFusedAdam8bit(galore_param_groups(model.module), lr=1e-2)
        reduce_lowrank(model, optimizer)

    Accumulate under ``model.no_sync()``, as Accelerate's ``accumulate(model)`` does. ``clip_grad_norm_`` then clips by
    the norm of the projections (as with prepared layers), which is the norm of what moves the weights; between the
    backward pass and the step a projected parameter's ``.grad`` holds its projection, and has no other meaning.
    Prepared layers need none of this: what DDP averages of them has rank r already.

    Args:
        model: wrapped, with no other communication hook.
        optimizer: GaLore's, of the model's parameters; in every process with the same options.

    Raises:
        TypeError: an argument of another class. ValueError: APOLLO, which scales the whole gradient; processes whose
            parameters or options differ (in all of them).
    """
    if not isinstance(model, DistributedDataParallel):
        raise TypeError(f"model: expected a DistributedDataParallel, got {type(model).__name__}; wrap the model first")
    if not isinstance(optimizer, LowRankOptimizer):
        raise TypeError(
            f"optimizer: expected one of galore_kernels, got {type(optimizer).__name__}; of Accelerate's wrapper pass "
            "what it wraps, optimizer.optimizer"
        )
    if not optimizer.rule.takes_lowrank:
        raise ValueError(
            f"optimizer: {type(optimizer).__name__} scales the whole gradient, of which no projection is enough; "
            "leave the hook out"
        )
    group: dist.ProcessGroup = model.process_group
    check_agreement(type(optimizer).__name__, optimizer.rule, optimizer.param_groups, [group])
    state = LowRankReduction(optimizer, group)
    model.register_comm_hook(state, _reduce)
    model.register_forward_pre_hook(state.begin)


def _reduce(
    state: LowRankReduction,
    bucket: dist.GradBucket,  # type: ignore[name-defined]
) -> torch.futures.Future[torch.Tensor]:
    """DDP's hook."""
    pairs = zip(bucket.parameters(), bucket.gradients(), strict=True)
    params, parts = bucket.parameters(), [state.part_of(param, grad) for param, grad in pairs]
    flat = torch.cat([part.sent.reshape(-1) for part in parts]).div_(dist.get_world_size(state.group))
    work = dist.all_reduce(flat, group=state.group, async_op=True)

    def spread(future: torch.futures.Future[Any]) -> Tensor:
        means = flat.split([part.sent.numel() for part in parts])
        for param, part, mean in zip(params, parts, means, strict=True):
            if part.update is None:
                part.grad.copy_(mean.view(part.grad.shape))
            else:
                elements = part.grad.view(-1)
                elements[: mean.numel()] = mean
                elements[mean.numel() :] = 0
                state.optimizer.packed.add(param, part.update.layout.moments, part.found)
        return bucket.buffer()

    return work.get_future().then(spread)
