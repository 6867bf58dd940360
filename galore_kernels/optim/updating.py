"""What a step does to the parameters: groups of them in one call of a backend, or one after another."""

from __future__ import annotations

import math
import sys
import warnings
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from galore_kernels.ops import registry
from galore_kernels.optim.counters import Counters
from galore_kernels.optim.multi_tensor import Gradients, Plan, observed_options
from galore_kernels.optim.options import matrix_shape
from galore_kernels.optim.packed import PackedGradients
from galore_kernels.optim.pending import Pending
from galore_kernels.optim.refresh import (
    Found,
    batches,
    changes,
    counted,
    find_bases,
    find_together,
    is_asynchronous,
    is_due,
    projected,
    take_over,
)
from galore_kernels.optim.rules import Rule
from galore_kernels.optim.scalars import LearningRates, Unscaling
from galore_kernels.optim.skip_monitor import SkipMonitor, Watched
from galore_kernels.optim.update import Update

_WRAPPERS = ("galore_kernels", "torch")


class NonFiniteGradientWarning(UserWarning):
    """A tensor's step was skipped because its gradient is NaN, infinite or too large to have a second moment."""


class UpdatingOptimizer(Optimizer):
    """How every optimizer updates what a plan names. What it remembers, ``_forget`` may drop at any time."""

    rule: ClassVar[Rule]  #: what it makes of gradients
    _backend: str

    def _forget(self) -> None:
        self._plan: Plan | None = None
        # The groups whose kernels have been launched.
        self._loaded: set[frozenset[int]] = set()
        self._counters = Counters()
        self._rates = LearningRates()
        self._monitor = SkipMonitor()
        self._pending = Pending()
        #: Gradients that are projected already.
        self.packed = PackedGradients()
        self.options_of = observed_options(self.rule)

    def _select(self, device: torch.device) -> registry.Backend:
        return registry.select(self.rule.served_by, self._backend, device)

    def _update(
        self,
        plan: Plan,
        grads: Gradients,
        unscaling: Unscaling,
        done: set[int],
        finished: list[Tensor],
        *,
        capture: bool,
    ) -> None:
        """Updates what is not ``done``, and adds to ``finished`` what it has updated.

        ``grads``: by the parameters' index.
        """
        groups, counters = plan.groups, self._counters
        alone = plan.alone + [update for group in groups for update in group.due(counters, capturing=capture)]
        apart = done.union([id(update.param) for update in alone])
        if capture and alone:
            raise RuntimeError(
                f"{alone[0].name}: {plan.reason_to_be_alone(alone[0], self.state)}, so that its step can't be part of "
                "a CUDA graph; take this step outside of the capture, or leave the parameter out"
            )
        for group in groups if capture else []:
            if group.ids not in self._loaded:
                raise RuntimeError(
                    f"{group.members[0].name}: the kernels of its group have not been loaded yet, which a CUDA graph "
                    "can't hold; take one more step outside of the capture"
                )
        summed = self._summed(plan, done, apart)
        if summed:
            grads = {**(grads if isinstance(grads, Mapping) else dict(enumerate(grads))), **summed}
        for planned in groups:
            options = self._options(planned.group, planned.device, unscaling, capture=capture)
            some = planned.without(apart, self.state, options, counters)
            if some is None:
                continue
            before = some.counted()
            try:
                some.run(grads, options)
            except BaseException:
                if some.counted() != before:  # an interrupt that came while it ran
                    finished += some.params
                raise
            finished += some.params
            self._loaded.add(some.ids)
            if capture:
                for counter in some.counters:
                    counter.captured = True
            elif some.device not in plan.watched:  # where reading is free
                for member, counter in zip(some.members, some.counters, strict=True):
                    before, counter.skips = counter.skips, int(counter.skipped)
                    self._report_skip(member.name, before, counter.skips)
        rest = [update for update in alone if id(update.param) not in done]
        for batch in batches(sorted(rest, key=lambda update: update.index), self.state):
            found = find_together(batch, self.state)
            for update in batch:
                own_options = self._options(update.group, update.param.device, unscaling)
                own_found, lowrank = found.pop(id(update.param), None), summed.get(update.index)
                before, skips = self._apply(update, own_options, own_found, finished, lowrank)
                # Last: a warning may be turned into an exception.
                self._report_skip(update.name, before, skips)

    def _summed(self, plan: Plan, done: set[int], apart: set[int]) -> dict[int, Tensor]:
        """The projections that processes have terms of, summed, by the parameters' index; not of what is refreshed.

        ``apart``: ids of parameters that are in no group in this step, or ``done``.
        """
        by_group: dict[Any, list[Update]] = defaultdict(list)  # by the processes
        for update in plan.sums:
            param, shard = update.param, update.layout.shard
            state = self.state.get(param)
            if shard and state and id(param) not in done and not (id(param) in apart and is_due(update, state)):
                by_group[shard.group].append(update)
        summed: dict[int, Tensor] = {}
        for group, own in by_group.items():
            sizes = [math.prod(update.layout.moments) for update in own]
            flat = own[0].weight.new_empty(sum(sizes), dtype=torch.float32)
            for update, piece in zip(own, flat.split(sizes), strict=True):
                lowrank = piece.view(update.layout.moments)
                summed[update.index] = lowrank.copy_(projected(update, update.grad, self.state[update.param]))
            dist.all_reduce(flat, group=group)
        return summed

    def _options(
        self, group: Mapping[str, Any], device: torch.device, unscaling: Unscaling, *, capture: bool = False
    ) -> Any:
        """The scalars of a step, but for the rounding's seed, which each tensor has its own of."""
        rate = 0.0 if group["lr"] is None else group["lr"]
        lr = self._rates.on(device, rate, id(group), capturing=capture)
        return self.rule.scalars(group, lr, unscaling.on(device))

    def _look_at_skips(self, watched: Mapping[torch.device, Watched]) -> None:
        for device, own in watched.items():
            for name, before, skips in self._monitor.look(self._counters.calls, device, own):
                self._report_skip(name, before, skips)

    def _apply(
        self,
        update: Update,
        options: Any,
        found: Found | None,
        finished: list[Tensor],
        lowrank: Tensor | None = None,
    ) -> tuple[int, int]:
        """Updates one parameter and adds it to ``finished``.

        Args:
            found: its subspaces, if they were searched already.
            lowrank: its gradient in the subspace that it has, instead of the gradient.

        Returns how many of its steps had been skipped as far as is known, and are now.
        """
        param, group, layout, target = update.param, update.group, update.layout, update.weight
        is_lowrank = lowrank is not None or update.takes_lowrank
        grad = update.grad if lowrank is None else lowrank
        fresh = not self.state.get(param)
        state = layout.new_state(param) if fresh else self.state[param]
        step, before, skipped = counted(layout, state), int(state["step"]), int(state["skipped"])
        options = replace(options, rounding_seed=update.rounding_seed(state))
        found = found or self.packed.found(param)
        due = lowrank is None and (found is not None if update.is_packed else is_due(update, state))
        later = due and is_asynchronous(update, state)
        changed: dict[str, Any] = {}
        weight, new, search, agreed = target, state, None, False
        try:
            search = self._pending.begin(update, state, found) if later else None
            if due and not later:
                found = found or find_bases([update], [state], [grad])[0]
                changed = changes(update, state, found, step, self._backend)
            new = {**state, **changed}
            before = int(new["step"])
            if layout.sums and lowrank is None:
                grad = projected(update, grad, new)
                layout.shard.all_reduce(grad)  # type: ignore[union-attr]
            if layout.side is not None:
                weight, grad = target.reshape(matrix_shape(target.shape)), grad.reshape(matrix_shape(grad.shape))
            operands = layout.operands(new)
            if layout.sums and not target.numel():  # none of the rows, but the moments of all
                basis = operands["basis"]
                operands = {**operands, "basis": basis.new_zeros(1, basis.shape[1])}
                weight = target.new_zeros(1, weight.shape[1])
            if weight.numel():
                layout.rule.update(
                    weight,
                    grad,
                    operands,
                    options,
                    group,
                    layout,
                    is_lowrank=is_lowrank,
                    weight_scale=update.weight_scale,
                    backend=self._backend,
                )
            elif options.found_inf is None or not bool(options.found_inf):  # of parts that have none
                state["step"] += 1
            int(state["step"])  # here the host waits, and here Ctrl-C strikes
            agreed = layout.shard is not None
        finally:
            # The kernel decides whether a step was taken. A step that raised has changed nothing of this parameter; a
            # skipped one hasn't either: a basis found in a gradient that is not used goes with it.
            steps, skips = int(new["step"]), int(state["skipped"])
            taken = steps > before
            if taken and target.numel() and weight.data_ptr() != target.data_ptr():
                target.copy_(weight.view(target.shape))
            # Of parts some may be skipped while others aren't: what was found in all of them is taken over by all.
            if taken or agreed:
                take_over(state, changed)
                self.packed.take_over(param)
            if fresh and (taken or skips):
                self.state[param] = state
            if taken or skips > skipped:
                finished.append(param)
            if (taken or agreed) and search is not None:
                self._pending.keep(update, search, step)
            if changed.get("refreshes") == 1:
                self._plan = None  # with a first basis it can be grouped with others
        if param in self.state and self._select(param.device).group is not None:
            skipped = self._counters.note(state, steps + (skips if layout.shard else 0), skipped, skips)
        return skipped, skips

    def _report_skip(self, name: str, before: int, skipped: int) -> None:
        if worth_telling(before, skipped):
            warn_caller(
                f"{name}: its gradient is NaN, infinite or beyond 1.8e19; its step was skipped, weight and state are "
                f"unchanged ({skipped} skipped so far)"
            )


def worth_telling(before: int, now: int) -> bool:
    """At 1, 2, 4, 8, ... skipped steps: a broken run is told of it without being drowned in it."""
    return now.bit_length() > before.bit_length()


def warn_caller(message: str) -> None:
    """A ``NonFiniteGradientWarning`` that names the nearest frame that is neither ours nor torch's."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _WRAPPERS:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, NonFiniteGradientWarning, stacklevel=level + 1)
