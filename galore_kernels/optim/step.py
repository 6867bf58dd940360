"""A step of the optimizer: everything is checked, then updated, in groups where the backend offers it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from galore_kernels.nn import LowRankGradient, Pairs, carried_gradient_of
from galore_kernels.optim import factored, multi_tensor
from galore_kernels.optim.auto_rank import chosen_ranks, finite, undecided
from galore_kernels.optim.given import Given
from galore_kernels.optim.multi_tensor import Plan
from galore_kernels.optim.options import check_param, check_scheduled
from galore_kernels.optim.processes import check_agreement, factors_of
from galore_kernels.optim.refresh import (
    changes,
    find_bases,
    take_over,
)
from galore_kernels.optim.scalars import Unscaling
from galore_kernels.optim.shard import Shard, check_sharding, locals_of
from galore_kernels.optim.state import Layout
from galore_kernels.optim.update import Update
from galore_kernels.optim.updating import UpdatingOptimizer, warn_caller, worth_telling
from galore_kernels.subspace import Gradient, phases


class SteppingOptimizer(UpdatingOptimizer):
    """What every optimizer does at a step: what is looked at, planned and remembered around the updates."""

    # Until then, prepared layers are left to the optimizer that they may have.
    _is_made = False

    # What it was given.
    _given: Given

    # torch.amp.GradScaler then passes grad_scale and found_inf instead of unscaling and skipping itself.
    _step_supports_amp_scaling = True

    def _forget(self) -> None:
        super()._forget()
        # Parameters already updated in a step that raised half-way, with the gradient they were updated by.
        self._interrupted: list[tuple[Tensor, Tensor, int]] = []
        # CUDA graphs read what the plans that they were captured from hold.
        self._captured: list[Plan] = []
        # By group: steps that were left out because ranks couldn't be chosen.
        self._put_off: dict[int, int] = {}
        # All parameters by their ids, while layers look for their first bases.
        self._everything: dict[int, Update] = {}
        # Bases found in this step's factors.
        self._findings: list[factored.Finding] = []
        # Whether the processes that have parts of parameters have been compared.
        self._has_agreed = False
        # Of the prepared layers.
        self._prepared: list[LowRankGradient] = []
        # What was planned when these were last told of their bases, and the call before which they are again.
        self._told: tuple[Plan | None, float] = None, 0

    def _named_params(self) -> Iterator[tuple[int, str, Tensor, dict[str, Any]]]:
        """(index over all groups, name for messages, parameter, group)."""
        index = 0
        for group_index, group in enumerate(self.param_groups):
            names = group.get("param_names")
            for position, param in enumerate(group["params"]):
                name = f"param group {group_index}, parameter {position}"
                if names is not None:
                    name += f' ("{names[position]}")'
                yield index, name, param, group
                index += 1

    def _layout(self, param: Tensor, group: Mapping[str, Any]) -> Layout:
        return Layout.of(param, group, self.rule)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Performs one optimization step.

        Everything is checked before anything changes. If a call raises half-way (out of memory, say), calling
        ``step()`` again with the same gradients continues where it stopped, so that no parameter is updated twice.
        Gradients are the same if nothing has written to them (as autograd counts it: not through ``.data``, nor by the
        replay of a CUDA graph).

        A tensor whose gradient is NaN, infinite or beyond 1.8e19 is skipped: weight and state stay as they are, a
        ``NonFiniteGradientWarning`` names it, ``skipped_steps()`` counts it. On a GPU the warning comes some steps
        late, for nothing is read from it but in the steps that refresh a subspace, in those that make a state, and in
        those of tensors that can't be grouped with others (strided ones, and both sides projected). Replays of CUDA
        graphs report nothing; the next call does.

        Other steps can be captured in a CUDA graph, from the third on. Its replays read the learning rate from the
        tensor on the GPU that ``lr`` was at the capture (a number, or a tensor on the CPU, is part of the graph), and
        count, but refresh nothing: for that call ``step()`` itself whenever the number of steps taken is a multiple of
        ``update_proj_gap`` (with other schedules, has reached ``next_refresh`` of a state). Replays then use the new
        basis; one that was found asynchronously, after one more call. Capture anew after ``load_state_dict``.

        Args:
            closure: reevaluates the model and returns the loss; run with gradients enabled.

        Returns:
            The closure's result, or None.

        Raises:
            ValueError: an option out of range, or a sparse, complex or wrongly shaped gradient; names the parameter.
            RuntimeError: the step is being captured in a CUDA graph, and can't be; names the parameter.
        """
        try:
            return self._step(closure)
        except BaseException:
            self._plan = None
            # GradScaler sets these for the call, and multiplies into what it finds: left behind by a call that failed,
            # they would unscale the retry twice.
            for name in ("grad_scale", "found_inf"):
                self.__dict__.pop(name, None)
            raise

    # Dynamo can't see what launches write through addresses. The public decorator would import all of it here.
    @_disable_dynamo
    def _step(self, closure: Callable[[], Any] | None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        factored.check_owner(self._prepared, self)
        self.take_pending()
        unscaling = Unscaling(getattr(self, "grad_scale", None), getattr(self, "found_inf", None))
        put_off = dict(self._put_off)
        plan, grads, capture = self._planned(unscaling)
        done = self._resume_interrupted()
        if not done:
            self._findings = []
        finished: list[Tensor] = []
        try:
            if not capture:
                known = {id(update.param) for update, *_ in self._findings}
                self._findings += factored.find(plan.factored, self.state, done | known)
            self._update(plan, grads, unscaling, done, finished, capture=capture)
            if not capture:
                self._look_at_skips(plan.watched)
        except BaseException:
            self._interrupted += [(p, p.grad, p.grad._version) for p in finished if p.grad is not None]
            if len(done.union(map(id, finished))) >= plan.count:
                self._interrupted = []  # nothing is left to do: it was a report that raised
            raise
        finally:
            self._counters.calls += 1
        self._everything = {}
        if capture:
            self._captured.append(plan)
        else:
            self._take_over_factored(plan)
        self._interrupted = []
        self._report_put_off(put_off)
        return loss

    def _take_over_factored(self, plan: Plan) -> None:
        """Puts the bases that were found in this step's factors into the state, and tells the layers."""
        try:
            factored.take_over_bases(self._findings, self.state, self._backend)
            told, call = self._told
            if plan is not told or self._counters.calls >= call:
                self._told = plan, factored.tell_layers(plan.factored, self.state, self._counters)
        except BaseException:
            everyone = [param for group in self.param_groups for param in group["params"]]
            self._interrupted = [(p, p.grad, p.grad._version) for p in everyone if p.grad is not None]
            raise

    @torch.no_grad()
    def find_first_basis(self, gradient: LowRankGradient, factors: Pairs) -> bool:
        """Called by a prepared layer's first backward pass. See ``galore_kernels.nn.LowRankGradient``."""
        if not self._everything:
            self._everything = {id(update.param): update for update in self.listed()}
        update = self._everything.get(id(gradient.carrier))
        if update is None:  # Accelerate has put a DTensor in its place
            return False
        together = factors_of(update, factors)
        if together is not None and self._has_first_basis(update, together):
            gradient.use(self.state[update.param])
        return True

    def _has_first_basis(self, update: Update, gradient: Gradient) -> bool:
        """Whether there is one now: found in ``gradient`` if there was none. No step is taken."""
        state = self.state.get(update.param) or update.layout.new_state(update.param)
        if state["refreshes"] == 0:
            found = find_bases([update], [state], [gradient])[0]
            changed = changes(update, state, found, int(state["step"]), self._backend)
            if not changed:
                return False
            take_over(state, changed)
            self.state[update.param] = state
        return True

    def _adopt(self) -> None:
        """Makes this the optimizer of the prepared layers whose gradients it is given."""
        params = [param for group in self.param_groups for param in group["params"]]
        self._carried = [gradient for param in params if (gradient := carried_gradient_of(param)) is not None]
        self._prepared = [gradient for gradient in self._carried if isinstance(gradient, LowRankGradient)]
        self._everything = {}
        for gradient in self._prepared:
            gradient.owner = weakref.ref(self)
        self._told = None, 0
        updates = [update for update in self.listed() if update.factored is not None] if self._prepared else []
        factored.tell_layers(updates, self.state, self._counters)

    @torch.no_grad()
    def take_pending(self) -> None:
        """Puts the bases that asynchronous refreshes of the last step have found into the state."""
        devices = self._pending.devices()
        if devices and multi_tensor.capturing(devices):
            raise RuntimeError(
                "the last step began to refresh subspaces, and a CUDA graph is being captured, which can't hold their "
                "taking over; take one more step outside of the capture"
            )
        for update, found, step in self._pending.finished():
            state = self.state.get(update.param)
            if state:  # else somebody has removed it
                take_over(state, changes(update, state, found, step, self._backend))

    def _planned(self, unscaling: Unscaling) -> tuple[Plan, list[Tensor | None], bool]:
        """The step's plan, all parameters' gradients, and whether a CUDA graph is being captured. Changes nothing."""
        params = [param for group in self.param_groups for param in group["params"]]
        grads = list(self.packed.seen(params, locals_of([param.grad for param in params])))
        plan, self._plan = self._plan, None
        if (
            plan is not None
            and not multi_tensor.capturing(plan.backends)
            and plan.holds(self._observe(grads), self._select)
        ):
            for index, group in enumerate(self.param_groups):
                self.rule.check_lr(group, f"param group {index}")
            self._plan = plan
            return plan, grads, False
        updates = self._collect(unscaling)
        capture = multi_tensor.capturing({update.param.device for update in updates})
        self._counters.keep(multi_tensor.own_states(self.state))
        plan = self._plan_of(updates, unscaling, capture=capture)
        # Of parameters that are left out until their ranks are chosen a plan would not hear again.
        present = sum(param.grad is not None and param.numel() > 0 for param in params)
        if plan.groups and not capture and len(updates) == present:
            plan.rest_on(self._observe(grads), self.state)
            self._plan = plan
        return plan, grads, capture

    def _plan_of(self, updates: list[Update], unscaling: Unscaling, *, capture: bool) -> Plan:
        backends = {update.param.device: self._select(update.param.device) for update in updates}

        def options(group: Mapping[str, Any], device: torch.device) -> Any:
            return self._options(group, device, unscaling, capture=capture)

        return Plan(updates, self.state, backends, options, self._counters, capturing=capture)

    def _observe(self, grads: list[Tensor | None]) -> object:
        weights = [tensor for gradient in self._carried for tensor in gradient.stored]
        carriers = {id(gradient.carrier) for gradient in self._prepared}
        return multi_tensor.observe(self.options_of, self.param_groups, self.state, grads, weights, carriers)

    def _collect(self, unscaling: Unscaling) -> list[Update]:
        self._check_groups()
        self.check_held()
        updates = [u for u in self.listed() if u.param.grad is not None and u.param.numel() > 0]
        for update in updates:
            self._check(update)
        self._agree([update.layout.shard for update in updates if update.layout.shard is not None])
        return self._with_chosen_ranks(updates, unscaling)

    def check_held(self) -> None:
        """Raises ValueError or RuntimeError if a wrapper has flattened the parameters, or put others in their place."""
        self._given.check(((name, param) for _, name, param, _ in self._named_params()), self.state)

    def _agree(self, shards: Sequence[Shard]) -> None:
        """Raises ValueError, once and in all processes, if those that have parts have other parameters or options."""
        if shards and not self._has_agreed:
            found = [shard.mesh.get_group(place) for shard in shards for place in range(shard.mesh.ndim)]
            groups = {id(group): group for group in found}  # of several meshes often the same
            check_agreement(type(self).__name__, self.rule, self.param_groups, list(groups.values()))
            self._has_agreed = True

    @property
    def _refuser(self) -> str | None:
        return None if self.rule.takes_shards else type(self).__name__

    def _check_groups(self) -> None:
        for index, group in enumerate(self.param_groups):
            check_scheduled(group, f"param group {index}", self.rule)

    def _check(self, update: Update) -> None:
        check_param(update.param, update.name)
        check_sharding(update.param, update.group, update.name, self._refuser)
        update.check(self.state.get(update.param))

    def listed(self) -> list[Update]:
        """All parameters, unchecked."""
        everything = [(*entry, self._layout(*entry[2:])) for entry in self._named_params()]
        gradients = {id(gradient.carrier): gradient for gradient in self._carried}
        stored = {id(gradient.weight) for gradient in self._carried}  # which others carry the gradients of
        projected = [
            (index, (gradients[id(param)].weight if id(param) in gradients else param).numel())
            for index, _, param, _, layout in everything
            if layout.rank is not None and id(param) not in stored
        ]
        phase = dict(zip([index for index, _ in projected], phases([size for _, size in projected]), strict=True))
        return [
            Update(
                param,
                group,
                index,
                name,
                layout,
                phase.get(index, 0.0),
                gradients.get(id(param)),
                is_packed=param in self.packed,
            )
            for index, name, param, group, layout in everything
        ]

    def _with_chosen_ranks(self, updates: list[Update], unscaling: Unscaling) -> list[Update]:
        """``updates``, with ``rank="auto"`` decided where it wasn't; without the matrices for which it can't be yet."""
        first = 0
        for index, group in enumerate(self.param_groups):
            own = [update for update in updates if update.group is group and update.layout.rank is not None]
            if undecided(group) and own:
                if multi_tensor.capturing({update.param.device for update in own}):
                    raise RuntimeError(
                        f"{own[0].name}: its rank is not chosen yet, which a CUDA graph can't hold; take this step "
                        "outside of the capture"
                    )
                overflow = any(bool(found != 0) for u in own for found in unscaling.found_inf(u.param.device))
                if not overflow and finite(own):
                    group["chosen_ranks"] = chosen_ranks(group, self._layout, first)
                elif not overflow:
                    self._put_off[index] = self._put_off.get(index, 0) + 1
                decided = not undecided(group)
                fitting = [replace(update, layout=self._layout(update.param, group)) for update in own if decided]
                there = {update.index: update for update in fitting}
                gone = {update.index for update in own} - there.keys()
                updates = [there.get(update.index, update) for update in updates if update.index not in gone]
            first += len(group["params"])
        return updates

    def _report_put_off(self, before: Mapping[int, int]) -> None:
        for index, count in self._put_off.items():
            if worth_telling(before.get(index, 0), count):
                warn_caller(
                    f"param group {index}: a gradient is NaN or infinite, so that no ranks can be chosen; the step of "
                    f"its matrices was skipped ({count} so far)"
                )

    def _resume_interrupted(self) -> set[int]:
        """Parameters to leave out because an interrupted step with these very gradients has updated them."""
        if not self._interrupted:
            return set()
        if any(p.grad is not g or g._version != version for p, g, version in self._interrupted):
            self._interrupted = []
        return {id(param) for param, _, _ in self._interrupted}

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch.optim's. Also gives up an interrupted step: the gradients it would continue with are gone."""
        self._interrupted = []
        self.packed.clear()
        for gradient in self._prepared:
            gradient.factors = []
        super().zero_grad(set_to_none)
