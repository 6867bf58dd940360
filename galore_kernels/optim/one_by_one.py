"""Steps taken parameter by parameter, while a backward pass is under way: what layerwise updates need."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

from galore_kernels.optim import factored, multi_tensor
from galore_kernels.optim.counters import Counter
from galore_kernels.optim.multi_tensor import Plan
from galore_kernels.optim.options import matrix_shape
from galore_kernels.optim.refresh import Found, find_bases, is_asynchronous, is_due, projected
from galore_kernels.optim.scalars import Unscaling
from galore_kernels.optim.step import SteppingOptimizer
from galore_kernels.optim.update import Update
from galore_kernels.subspace import Gradient


class OneByOne(SteppingOptimizer):
    """The step of each parameter by itself, between ``begin_step`` and ``end_step``."""

    def _forget(self) -> None:
        super()._forget()
        self._singles: dict[int, Plan] = {}

    @torch.no_grad()
    def begin_step(self) -> dict[int, Update]:
        """Checks the groups, takes over what asynchronous refreshes have found. All parameters, by their ids."""
        self._check_groups()
        self.check_held()
        self.take_pending()
        self._everything = {id(update.param): update for update in self.listed()}
        return self._everything

    @torch.no_grad()
    def step_of(self, update: Update, unscaling: Unscaling) -> None:
        """Updates one parameter by its gradient.

        Raises:
            ValueError: the gradient or the state doesn't fit. Nothing has changed.
        """
        self._check(update)
        plan = self._single_plan(update, unscaling)
        findings = factored.find(plan.factored, self.state, ())
        if update.factored is not None:
            update.factored.factors = []
        self._update(plan, {update.index: update.grad}, unscaling, set(), [], capture=False)
        factored.take_over_bases(findings, self.state, self._backend)

    @torch.no_grad()
    def lowrank_step_of(self, update: Update, unscaling: Unscaling, lowrank: Tensor) -> None:
        """Updates one parameter by its gradient in the subspace that it has, (L, r)."""
        options = self._options(update.group, update.param.device, unscaling)
        self._report_skip(update.name, *self._apply(update, options, None, [], lowrank))

    def _single_plan(self, update: Update, unscaling: Unscaling) -> Plan:
        param, state = update.param, self.state.get(update.param)
        states = {} if state is None else {param: state}
        group = {**update.group, "params": [param]}
        carriers = {id(param)} if update.factored is not None else ()
        weights = (param,) if update.carried is None else update.carried.stored
        seen = multi_tensor.observe(self.options_of, [group], states, [param.grad], weights, carriers)
        plan = self._singles.get(id(param))
        if plan is None or not plan.holds(seen, self._select):
            plan = self._plan_of([update], unscaling, capture=False)
            if plan.groups:
                plan.rest_on(seen, states)
                self._singles[id(param)] = plan
        return plan

    def keeps_gradient(self, update: Update) -> bool:
        """Whether several micro-batches' gradients must be added up at full size for the step under way.

        They needn't if their projections suffice: if there is a subspace, which isn't due to be found anew.
        """
        state = self.state.get(update.param)
        if (
            not self.rule.takes_lowrank
            or update.layout.rank is None
            or update.factored is not None
            or not state
            or state["refreshes"] == 0
        ):
            return True
        return factored.call_of_refresh(update, state, self._counters) <= self._counters.calls

    @torch.no_grad()
    def find_first_basis_of(self, update: Update) -> None:
        """Finds a projected parameter's first basis in its gradient, if it has none; it takes no step.

        Raises:
            ValueError: the gradient doesn't fit.
        """
        self._check(update)
        if update.layout.rank is not None and update.factored is None:
            self._has_first_basis(update, update.grad.reshape(matrix_shape(update.grad.shape)))

    def is_due(self, update: Update) -> bool:
        """Whether a projected parameter's basis has to be found in the gradient of the step under way."""
        state = self.state.get(update.param)
        return self.keeps_gradient(update) and (not state or is_due(update, state))

    @torch.no_grad()
    def find(self, update: Update, gradient: Gradient) -> Found:
        """What a search for the parameter's bases finds in ``gradient``. Changes nothing."""
        return find_bases([update], [self._state_of(update)], [gradient])[0]

    @torch.no_grad()
    def projected(self, update: Update, grad: Tensor, found: Found | None = None) -> Tensor:
        """The parameter's gradient ``grad`` in its subspace, (L, r) float32.

        ``found``: in this step, and not for the next one; then in that.
        """
        state, of = self._state_of(update), update.layout
        if found is not None and not is_asynchronous(update, state) and all(one.found for one in found.values()):
            stored = (of.stored_basis(name, one.basis, update.param.dtype) for name, one in found.items())
            state = {**state, **{key: value for basis in stored for key, value in basis.items()}}
        return projected(update, grad, state)

    def _state_of(self, update: Update) -> dict[str, Any]:
        """The parameter's state; before its first step the one that it will begin with."""
        return self.state.get(update.param) or update.layout.new_state(update.param)

    @torch.no_grad()
    def end_step(self) -> None:
        """Counts the step, reports skipped ones, and tells prepared layers what the next one needs of them."""
        watched: dict[torch.device, list[tuple[str, Counter]]] = defaultdict(list)
        for plan in self._singles.values():
            for device, own in plan.watched.items():
                watched[device] += own
        self._look_at_skips(watched)
        self._counters.keep(multi_tensor.own_states(self.state))
        self._counters.calls += 1
        factored.tell_layers(self._everything.values(), self.state, self._counters)
        self._everything = {}
