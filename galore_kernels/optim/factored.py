"""Refreshes of factored gradients: bases found in the factors that layers have kept, for the steps that follow.

A basis that is found in a step's factors can't serve that step, whose low-rank gradients were taken in the old one. So
it is searched before the weights are updated, and taken over after, as an asynchronous refresh's is; the layer has to
be told a step ahead to keep its factors.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from torch import Tensor

from galore_kernels.nn import LowRankGradient
from galore_kernels.optim.counters import Counters
from galore_kernels.optim.options import AUTO
from galore_kernels.optim.refresh import Found, changes, due_at, find_bases, take_over
from galore_kernels.optim.update import Update
from galore_kernels.subspace import Factors, projection_side

#: A parameter, what was found for it, and the number of the step in whose factors.
Finding = tuple[Update, Found, int]


def check_factored(factored: LowRankGradient, group: Mapping[str, Any], where: str) -> None:
    """Raises ValueError unless a group's options fit a layer that was prepared."""
    shape = tuple(factored.weight.shape)
    rank, explicit = group["rank"], group["rank_is_explicit"]
    if rank == AUTO:
        raise ValueError(
            f'rank="auto" in {where}: a prepared layer has the rank {factored.rank}; give prepared layers a group with '
            "that rank, or prepare the model with another"
        )
    if explicit and rank is not None and min(rank, *shape) != factored.rank:
        raise ValueError(
            f"rank={rank} in {where}: a layer of shape {shape} was prepared with rank {factored.rank}; pass that, or "
            "prepare the model with another"
        )
    if projection_side(group["proj_type"], *shape) != factored.side:
        raise ValueError(
            f"proj_type={group['proj_type']!r} in {where}: a layer of shape {shape} was prepared for side "
            f"{factored.side}; pass the same proj_type to prepare"
        )


def find(updates: Iterable[Update], states: Mapping[Tensor, Mapping[str, Any]], done: Collection[int]) -> list[Finding]:
    """What the factors of this step hold for parameters that are due. Changes nothing.

    ``done``: ids of parameters that this step has updated already.
    """
    found: list[Finding] = []
    for update in updates:
        factored, state = update.factored, states.get(update.param)
        if factored is None or not factored.factors or not state or id(update.param) in done:
            continue
        step = int(state["step"])
        if step >= due_at(update, state):
            found.append((update, find_bases([update], [state], [Factors(factored.factors)])[0], step))
    return found


def take_over_bases(findings: list[Finding], states: Mapping[Tensor, dict[str, Any]], backend: str) -> bool:
    """Puts what was found into the states of parameters whose step was taken; leaves ``findings`` empty.

    Returns whether a step counter was set back.
    """
    reset = False
    while findings:
        update, found, step = findings[0]
        state = states[update.param]
        if int(state["step"]) > step:
            changed = changes(update, state, found, step, backend)
            take_over(state, changed)
            reset |= "step" in changed
        del findings[0]
    return reset


def tell_layers(updates: Iterable[Update], states: Mapping[Tensor, dict[str, Any]], counters: Counters) -> None:
    """Gives layers the bases of the states, and asks those that may be due in the next step to keep their factors."""
    for update in updates:
        factored, state = update.factored, states.get(update.param)
        if factored is None:
            continue
        factored.use(state)
        factored.factors = []
        factored.keeps_factors = factored.basis is not None and bool(state) and _may_be_due(update, state, counters)


def _may_be_due(update: Update, state: Mapping[str, Any] | None, counters: Counters) -> bool:
    if state is None:
        return False
    due, counter = due_at(update, state), counters.of(state)
    return int(state["step"]) >= due if counter is None else counter.call_of(due) <= counters.calls
