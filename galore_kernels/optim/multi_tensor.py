"""The plan of a step: which tensors are updated together, made once and followed until something it rests on changes.

A step of hundreds of tensors is then a handful of calls of the backend. What the plan rests on is looked at in every
step, without a word to the device: see ``observe``. A plan keeps no gradient alive: who frees
them between two steps gets their memory. Moments and bases that somebody replaces live until the next step, which makes
a new plan.
"""

from __future__ import annotations

import math
import weakref
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from operator import attrgetter, itemgetter
from typing import Any, cast

import torch
from torch import Tensor, nn

from galore_kernels.nn import WeightCodes
from galore_kernels.ops.adafactor_update import AdafactorState, check_adafactor
from galore_kernels.ops.adam import check_adam
from galore_kernels.ops.apollo_update import check_apollo, check_drawn, check_norm
from galore_kernels.ops.group import UpdateGroup
from galore_kernels.ops.projection import check_projected_weight, check_projection
from galore_kernels.ops.random_basis import RandomBasis
from galore_kernels.ops.registry import Backend
from galore_kernels.optim.counters import Counter, Counters
from galore_kernels.optim.options import matrix_shape
from galore_kernels.optim.refresh import due_at
from galore_kernels.optim.rules import Rule
from galore_kernels.optim.shard import locals_of
from galore_kernels.optim.update import Update

#: By the index of their parameters.
Gradients = Sequence[Tensor | None] | Mapping[int, Tensor | None]

States = Mapping[Tensor, dict[str, Any]]

#: Of a state's tensors those whose memory is worth moving elsewhere; who does so moves the smaller ones with them.
_moments = ("exp_avg", "exp_avg_sq", "exp_avg_sq_row")
_dtype, _shape, _layout, _is_leaf = map(attrgetter, ("dtype", "shape", "layout", "is_leaf"))

#: Parameters whose memory a launch may be given. Other subclasses may hold their data elsewhere.
_PLAIN_TYPES = (Tensor, nn.Parameter, WeightCodes)


def capturing(devices: Iterable[torch.device]) -> bool:
    """Whether a CUDA graph is being captured, so that nothing may be read from these devices."""
    return any(device.type == "cuda" and _capturing_on(device) for device in devices)


def _capturing_on(device: torch.device) -> bool:
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def reads_are_free(device: torch.device) -> bool:
    """Whether a number there can be read without waiting for work that was enqueued."""
    return device.type == "cpu"


def own_states(states: States) -> list[dict[str, Any]]:
    """What this optimizer has made of ``optimizer.state``: others may keep things there as well."""
    return [state for state in states.values() if type(state) is dict and "skipped" in state]


def observed_options(rule: Rule) -> Callable[[Mapping[str, Any]], tuple[Any, ...]]:
    """What gets the values of a group that a plan rests on. Learning rates are new in every step."""
    return itemgetter(*(key for key in rule.keys if key not in ("params", "param_names", "lr")))


def observe(
    options_of: Callable[[Mapping[str, Any]], tuple[Any, ...]],
    groups: Sequence[Mapping[str, Any]],
    states: States,
    grads: Sequence[Tensor | None],
    weights: Sequence[Tensor],
    carriers: Collection[int] = (),
) -> object:
    """What the checks and the plan of a step rest on, in values that are cheap to get and to compare.

    Learning rates and the gradients' addresses, which are new in every step, are left out: ``options_of`` is
    ``observed_options``. Equal to nothing, not to itself either, if an option is a tensor, which may change in place.

    Args:
        grads: of all parameters; of DTensors this process' parts.
        weights: those whose gradients parameters carry, with the scales of int8 ones.
        carriers: ids of parameters that lie where their gradients do.
    """
    options: list[Any] = []
    for group in groups:
        values = [one for v in options_of(group) for one in (v if isinstance(v, (tuple, list)) else (v,))]
        kinds = list(map(type, values))
        if any(issubclass(kind, Tensor) for kind in kinds):
            return math.nan
        options.append((kinds, values, len(group["params"])))
    given = [param for group in groups for param in group["params"]]
    params = [*cast(list[Tensor], locals_of(given)), *weights]
    placed = [param for param in params if id(param) not in carriers] if carriers else params
    present = [grad for grad in grads if grad is not None]
    own = own_states(states)
    resets = any(group["moments_on_refresh"] == "reset" for group in groups)
    # One list for each fact, not one tuple for each tensor: a map over a method of C takes a third of the time. A
    # parameter's address tells its device too. ``.data = `` moves a tensor that stays the same object.
    return (
        options,
        list(map(id, given)),
        list(map(id, weights)),
        list(map(Tensor.data_ptr, placed)),
        list(map(_dtype, params)),
        list(map(_shape, params)),
        list(map(_is_leaf, params)),
        [param.is_contiguous() or param.stride() for param in params],
        [grad is None for grad in grads],
        list(map(Tensor.get_device, present)),
        list(map(_dtype, present)),
        list(map(_layout, present)),
        list(map(_shape, present)),
        list(map(Tensor.is_contiguous, present)),
        list(map(Tensor.is_inference, present)),
        list(map(id, states)),
        [id(value) for state in own for value in state.values() if type(value) is Tensor],
        [state.get("basis_seed") for state in own],
        [state.get("refreshes") for state in own] if resets else (),  # of which the seeds of roundings depend
        [value.data_ptr() for state in own for name in _moments if (value := state.get(name)) is not None],
    )


class PlannedGroup:
    """Tensors that one call of a backend updates.

    Args:
        members: tensors of one parameter group that ``_key`` holds alike, for none of which there is a
            ``reason_to_be_alone``.
        states: of all parameters.
        backend: offers groups.
        options: those of a step, to check the tensors with.
        counters: of the optimizer.

    Attributes:
        params, weights, counters: of each member, in the members' order.
        ids: of the parameters.
        group: the parameter group. device: where they are.

    Raises:
        ValueError: a state's tensor doesn't fit.
    """

    def __init__(
        self, members: Sequence[Update], states: States, backend: Backend, options: Any, counters: Counters
    ) -> None:
        if backend.group is None:
            raise ValueError(f"backend {backend.name} takes tensors one at a time")
        first = members[0]
        self.members, self._backend = members, backend
        self.params = [member.param for member in members]
        self.weights = [member.weight for member in members]
        self.ids = frozenset(map(id, self.params))
        self.group, self.device = first.group, first.param.device
        self._indices = [member.index for member in members]
        self._copies = not all(member.grad.is_contiguous() for member in members)
        side = first.layout.side
        self._shape = matrix_shape(first.weight.shape) if side is not None and first.weight.dim() != 2 else None
        self._views = self._shape is not None and not first.takes_lowrank
        own = [states[param] for param in self.params]
        pairs = zip(members, own, strict=True)
        seeds = tuple(seed for member, state in pairs if (seed := member.rounding_seed(state)) is not None)
        group = UpdateGroup(
            operation=operation_of(first),
            # A view would keep the memory of a parameter that has moved: none is made where the shape fits.
            params=tuple(w if self._shape is None else w.detach().view(self._shape) for w in self.weights),
            states=tuple(map(first.layout.rule.tensors, own)),
            rounding_seeds=seeds or None,
            weight_scales=tuple(scale for member in members if (scale := member.weight_scale) is not None),
            **first.layout.rule.group_fields(first.group, first.layout, list(map(first.layout.operands, own))),
        )
        _check(group, options)
        self._update = backend.group(group)
        self.counters = counters.watch(own, adds_skips=first.layout.shard is not None)
        self._states = own if side is not None and first.factored is None else None
        # The replays of a graph count unseen: then every call has to ask.
        self._always_ask = any(counter.captured for counter in self.counters)
        self._ask_at = 0

    def due(self, counters: Counters, *, capturing: bool) -> list[Update]:
        """Members whose subspace has to be refreshed in this step. Reads their steps only where one may be due.

        Raises:
            RuntimeError: one may be due, and a graph is being captured.
        """
        asks = self._always_ask and not capturing
        if self._states is None or (self._ask_at > counters.calls and not asks):
            return []
        steps = [due_at(member, state) for member, state in zip(self.members, self._states, strict=True)]
        self._ask_at = self._earliest(steps)
        if self._ask_at > counters.calls and not asks:
            return []
        if capturing:
            raise RuntimeError(
                f"{self.members[0].name}: its subspace may have to be refreshed in this step, which a CUDA graph "
                "can't hold; take this step outside of the capture"
            )
        counters.update(self.counters)
        self._ask_at = self._earliest(steps)
        return [m for m, c, step in zip(self.members, self.counters, steps, strict=True) if c.steps >= step]

    def _earliest(self, steps: Sequence[int]) -> int:
        """The earliest call before which one of the members may have reached its step."""
        return min(counter.call_of(step) for counter, step in zip(self.counters, steps, strict=True))

    def without(self, ids: Collection[int], states: States, options: Any, counters: Counters) -> PlannedGroup | None:
        """The group of the members that are not among ``ids``; None if there are none."""
        if self.ids.isdisjoint(ids):
            return self
        rest = [member for member in self.members if id(member.param) not in ids]
        return PlannedGroup(rest, states, self._backend, options, counters) if rest else None

    def counted(self) -> int:
        """Steps that its first member, and so each, has taken or skipped; always 0 where one call isn't all of it."""
        first = self.counters[0]
        return int(first.step) + int(first.skipped) if self._backend.group_is_one_call else 0

    def run(self, gradients: Gradients, options: Any) -> None:
        """One step of all members, each with its gradient among those of all parameters."""
        grads: list[Any] = [gradients[index] for index in self._indices]
        if self._copies:
            grads = [grad.contiguous() for grad in grads]
        if self._views:
            grads = [grad.view(self._shape) for grad in grads]
        if torch.is_autocast_enabled(self.device.type):  # see galore_kernels.ops.library
            with torch.autocast(self.device.type, enabled=False):
                self._update(grads, options)
        else:
            self._update(grads, options)
        torch.autograd.graph.increment_version(self.weights)


class Plan:
    """The parameters of a step: which are updated in groups, and which alone.

    Args:
        updates: what has a gradient, checked.
        states: of all parameters.
        backends: of each device.
        options: of a member, for the checks. counters: of the optimizer.
        capturing: the plan is for a CUDA graph.

    Attributes:
        groups: calls of a backend. alone: what takes the way through the single operations, in order.
        factored: what carries a low-rank gradient.
        count: of the parameters.
        watched: on each device where reading makes wait, name and counter of what is updated in groups.
        sums: what needs the sum of all processes' projections, in order.
    """

    def __init__(
        self,
        updates: Sequence[Update],
        states: States,
        backends: Mapping[torch.device, Backend],
        options: Callable[[Mapping[str, Any], torch.device], Any],
        counters: Counters,
        *,
        capturing: bool,
    ) -> None:
        self.backends, self.count = backends, len(updates)
        self.alone: list[Update] = []
        self.factored = [update for update in updates if update.factored is not None]
        self.sums = [update for update in updates if update.layout.sums]
        together: dict[tuple[Any, ...], list[Update]] = defaultdict(list)
        for update in updates:
            reason = self.reason_to_be_alone(update, states)
            (self.alone if reason else together[_key(update, states[update.param])]).append(update)
        if capturing:
            _refuse_unfit([update for members in together.values() for update in members], states, counters)
        self.groups = [
            PlannedGroup(
                members,
                states,
                backends[members[0].param.device],
                options(members[0].group, members[0].param.device),
                counters,
            )
            for members in together.values()
        ]
        self.watched: dict[torch.device, list[tuple[str, Counter]]] = defaultdict(list)
        for group in self.groups:
            if not reads_are_free(group.device):
                names = [member.name for member in group.members]
                self.watched[group.device] += zip(names, group.counters, strict=True)
        self._seen: object = math.nan

    def reason_to_be_alone(self, update: Update, states: States) -> str | None:
        """Why ``update`` can't be part of a group in this step; None if it can."""
        state = states.get(update.param)
        backend, operation = self.backends[update.param.device], operation_of(update)
        if backend.group is None:
            return f"backend {backend.name} takes tensors one at a time"
        if not state:
            return "it has taken no step yet"
        if state.get("refreshes") == 0:
            return "it has no subspace yet"
        if "long_basis" in update.layout.bases:
            return "both its sides are projected"
        if operation not in backend.grouped:
            return f"backend {backend.name} has no {operation} for several tensors"
        if type(update.weight) not in _PLAIN_TYPES or update.weight.is_inference():
            return "it is no plain parameter"
        if not update.weight.numel():
            return "this process has none of it"
        return None if update.weight.is_contiguous() else "it is not contiguous"

    def rest_on(self, seen: object, states: States) -> None:
        """Remembers what the plan was made from, which is what ``observe`` gave."""
        self._seen = seen
        # An id says nothing once its owner is gone.
        self._gone: list[object] = []
        values = [value for state in own_states(states) for value in state.values()]
        owners = [owner for owner in (*states, *values) if isinstance(owner, Tensor)]
        self._references = [weakref.ref(owner, self._gone.append) for owner in owners]

    def holds(self, seen: object, backends: Callable[[torch.device], Backend]) -> bool:
        """Whether a plan made now would be this one."""
        return (
            not self._gone
            and seen == self._seen
            and all(backends(device) is backend for device, backend in self.backends.items())
        )


def _key(update: Update, state: Mapping[str, Any]) -> tuple[Any, ...]:
    """What members of one group have in common."""
    weight, layout = update.weight, update.layout
    bases = [state[name].dtype for name in layout.bases]
    grad_dtype = torch.float32 if layout.sums else update.grad.dtype
    kind = (operation_of(update), weight.device, weight.dtype, weight.shape, grad_dtype, *bases)
    own = layout.rank, layout.side, layout.eight_bit, layout.shard, "exp_avg_absmax" in state
    return id(update.group), *kind, *own


def operation_of(update: Update) -> str:
    """The operation of ``galore_kernels.ops`` that updates it."""
    return update.layout.rule.operation(update.layout, is_lowrank=update.takes_lowrank)


def _refuse_unfit(updates: Iterable[Update], states: States, counters: Counters) -> None:
    """Raises RuntimeError for what a CUDA graph can't hold: a counter to be read, a basis that a refresh will move."""
    for update in updates:
        state, dtype = states[update.param], update.param.dtype
        bases = update.layout.bases if update.layout.basis_format is None else ()
        if counters.of(state) is None:
            raise RuntimeError(f"{update.name}: its step is not known; take a step outside of the capture before it")
        if update.layout.draws:
            raise RuntimeError(
                f"{update.name}: its basis is drawn from a seed, which a CUDA graph would hold over the next refresh; "
                'take its steps outside of the capture, or pass proj="svd"'
            )
        if any(state[name].dtype != dtype for name in bases):
            raise RuntimeError(
                f"{update.name}: its basis is {state['basis'].dtype}, its next one will be {dtype}, in other memory; "
                "take the step of the next refresh outside of the capture before it"
            )


def _check(group: UpdateGroup, options: Any) -> None:
    """Raises ValueError, as the group's operation would, unless every tensor fits."""
    bases = group.bases or (None,) * len(group.params)
    scales = group.basis_scales or (None,) * len(group.params)
    weight_scales = group.weight_scales or (None,) * len(group.params)
    seeds = group.rounding_seeds or (None,) * len(group.params)
    each = zip(group.params, group.states, bases, scales, weight_scales, seeds, strict=True)
    if group.apollo is not None:
        check_apollo(group.operation, group.apollo)
        for param, norm in zip(group.params, group.scaled_norms, strict=True):
            check_norm(group.operation, param, norm)
    for param, state, basis, basis_scale, weight_scale, seed in each:
        check_projected_weight(group.operation, param, weight_scale, replace(options, rounding_seed=seed))
        shape = tuple(param.shape)
        if isinstance(basis, RandomBasis):
            shape = check_drawn(group.operation, param, basis, group.side)
        elif basis is not None:
            shape = check_projection(group.operation, param, basis, None, basis_scale, group.side, group.scale)
        if isinstance(state, AdafactorState):
            check_adafactor(group.operation, param, shape, state, options)
        else:
            check_adam(group.operation, param, math.prod(shape), state, options)
