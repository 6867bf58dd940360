"""Refreshes of factored gradients: bases found in the factors that layers have kept, for the steps that follow.

A basis that is found in a step's factors can't serve that step, whose low-rank gradients were taken in the old one. So
it is searched before the weights are updated, and taken over after, as an asynchronous refresh's is; the layer has to
be told a step ahead to keep its factors.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from torch import Tensor

from galore_kernels.nn import LowRankGradient
from galore_kernels.optim.counters import Counters
from galore_kernels.optim.options import AUTO
from galore_kernels.optim.processes import factors_of
from galore_kernels.optim.refresh import Found, changes, due_at, find_bases, take_over
from galore_kernels.optim.state import Layout
from galore_kernels.optim.update import Update
from galore_kernels.subspace import projection_side

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


def check_dense(carrier: Tensor, layout: Layout, group: Mapping[str, Any], where: str) -> None:
    """Raises ValueError unless an int8 weight with a gradient of full size is projected in its group."""
    if layout.rank is None:
        raise ValueError(
            f"rank={group['rank']!r} in {where}: a layer of shape {tuple(carrier.shape)} has int8 weights, "
            "which no full-rank update takes; give it a group with a rank, as galore_param_groups(model, rank=...) does"
        )


def check_owner(gradients: Iterable[LowRankGradient], optimizer: object) -> None:
    """Raises RuntimeError unless the layers take their low-rank gradients in the bases of ``optimizer``."""
    for gradient in gradients:
        if gradient.owner is None or gradient.owner() is not optimizer:
            raise RuntimeError(
                f"a layer of shape {tuple(gradient.weight.shape)} that was prepared has another optimizer now, made "
                "later, in whose basis its gradient is; step with the optimizer that was made last, or load this one's "
                "state_dict into itself to return to it"
            )


def find(updates: Iterable[Update], states: Mapping[Tensor, Mapping[str, Any]], done: Collection[int]) -> list[Finding]:
    """What the factors of this step hold for parameters that are due. Changes nothing.

    ``done``: ids of parameters that this step has updated already.
    """
    found: list[Finding] = []
    for update in updates:
        factored, state = update.factored, states.get(update.param)
        if factored is None or not factored.keeps_factors or not state or id(update.param) in done:
            continue
        step = int(state["step"])
        factors = factors_of(update, factored.factors) if step >= due_at(update, state) else None
        if factors is not None:
            found.append((update, find_bases([update], [state], [factors])[0], step))
    return found


def take_over_bases(findings: list[Finding], states: Mapping[Tensor, dict[str, Any]], backend: str) -> None:
    """Puts what was found into the states of parameters whose step was taken; leaves ``findings`` empty."""
    while findings:
        update, found, step = findings[0]
        state = states[update.param]
        if int(state["step"]) > step:
            take_over(state, changes(update, state, found, step, backend))
        del findings[0]


def tell_layers(updates: Iterable[Update], states: Mapping[Tensor, dict[str, Any]], counters: Counters) -> float:
    """Gives layers the bases of the states, and asks those that may be due in the next step to keep their factors.

    Returns the call of the optimizer before which they have to be told again.
    """
    earliest = math.inf
    for update in updates:
        factored, state = update.factored, states.get(update.param)
        if factored is None:
            continue
        call = call_of_refresh(update, state, counters) if state else counters.calls
        factored.begin_step(state, keeps_factors=call <= counters.calls)
        earliest = min(earliest, call)
    return earliest


def call_of_refresh(update: Update, state: Mapping[str, Any], counters: Counters) -> int:
    """The earliest call in which the parameter may be due."""
    due, counter = due_at(update, state), counters.of(state)
    if counter is None:
        return counters.calls + max(0, due - int(state["step"]))
    return counters.calls if counter.captured else counter.call_of(due)  # a graph's replays count unseen
