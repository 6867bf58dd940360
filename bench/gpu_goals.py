"""The issue's goals, judged on what ``gpu_check.py`` has written; whatever is missing makes a goal unknown, not met."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import gpu_refresh
import rivals
from gpu_entries import STRONGEST, UNFUSED, grouped_name, single_name
from gpu_plan import (
    COLD_STEPS_GOAL,
    EQUAL_CODES_GOAL,
    LAYERWISE_GOAL,
    ROOFLINE_GOALS,
    SVD_GOAL,
    WARM_STEPS_GOAL,
    Plan,
)
from ratios import Goal

#: Against whom, and how many times faster a step at the first rank is to be.
FASTER_THAN = (
    (rivals.BNB_8BIT, 1.3),
    (rivals.TORCH_FUSED, 1.5),
    (UNFUSED, 2.0),
    (STRONGEST, 2.0),
    (rivals.GALORE_8BIT, 5.0),
)

Units = Mapping[str, Any]


def _result(units: Units, unit: str, name: str) -> tuple[Mapping[str, Any] | None, str]:
    """One implementation's result, or why there is none."""
    found = units.get(unit)
    if found is None or found["status"] != "ok":
        return None, "not measured" if found is None else str(found["reason"])
    for result in found["results"]:
        if result["name"] == name:
            return (result, "") if "median_ms" in result else (None, f"{result['status']}: {result['reason']}")
    return None, "not in this run"


def _of_roofline(units: Units, unit: str, name: str, text: str, bound: float) -> Goal:
    result, reason = _result(units, unit, name)
    value = None if result is None else float(result["of_roofline"])
    return Goal(f"share of the roofline, {text}", unit, name, value, bound, True, reason=reason)


def _faster(units: Units, unit: str, name: str, other: str, bound: float) -> Goal:
    text = f"times as fast as {other}"
    mine, reason = _result(units, unit, name)
    theirs, their_reason = _result(units, unit, other)
    if mine is None or theirs is None:
        return Goal(text, unit, name, None, bound, True, reason=reason or their_reason)
    return Goal(text, unit, name, theirs["median_ms"] / mine["median_ms"], bound, True)


def speed(units: Units, plan: Plan) -> list[Goal]:
    """The goals of time, for each backend of ours."""
    goals = []
    first = f"step r={plan.ranks[0]}"
    for backend in plan.ours:
        name = grouped_name(backend)
        for rank, bound in zip(plan.ranks, ROOFLINE_GOALS, strict=True):
            goals.append(_of_roofline(units, f"step r={rank}", name, "the whole set", bound))
        goals += [_faster(units, first, name, other, bound) for other, bound in FASTER_THAN]
        for unit in ("layerwise square", "layerwise wide"):
            for graph in (False, True):
                goals.append(
                    _of_roofline(units, unit, single_name(backend, graph), "one matrix at a time", LAYERWISE_GOAL)
                )
    return goals


def refresh(units: Units, plan: Plan) -> list[Goal]:
    """The goals of a refresh, against the fused step of the same row."""
    unit, step = f"refresh r={plan.ranks[0]}", grouped_name(plan.ours[0])
    one, why = _result(units, unit, step)
    goals = []
    for name, bound in ((gpu_refresh.COLD, COLD_STEPS_GOAL), (gpu_refresh.WARM, WARM_STEPS_GOAL)):
        found, reason = _result(units, unit, name)
        value = None if found is None or one is None else found["median_ms"] / one["median_ms"]
        goals.append(Goal("fused steps that it takes", unit, name, value, bound, False, reason=reason or why))
    return [*goals, _faster(units, unit, gpu_refresh.COLD, gpu_refresh.SVD, SVD_GOAL)]


def correct(units: Units, plan: Plan) -> list[Goal]:
    """The figures of correctness, each by its worst case; a backend that did not get through has missed them."""
    found = units.get("correctness")
    goals = []
    for backend in plan.ours:
        cases = [] if found is None or found["status"] != "ok" else found["cases"]
        own = [case for case in cases if case["backend"] == backend]

        def goal(text: str, value: float, bound: float, at_least: bool, backend: str = backend) -> Goal:
            return Goal(text, "correctness", grouped_name(backend), value, bound, at_least)

        if not own:
            reason = "not measured"
            for source in ("left_out", "refused"):
                reason = str((found or {}).get(source, {}).get(backend, reason))
            reason = str((found or {}).get("reason", reason))
            goals.append(Goal("correct", "correctness", grouped_name(backend), None, 1.0, True, reason=reason))
            continue
        beyond = "weights_beyond_two_ulps_and_the_directions_rounding"
        goals += [
            goal(
                "share of codes equal to the reference's",
                min(c["codes_equal"] for c in own),
                EQUAL_CODES_GOAL,
                True,
            ),
            goal("the others: codes apart, at most", max(c["codes_apart"] for c in own), 1, False),
            goal(
                "weights further than 2 bf16 ulps (and U's rounding) from float64",
                sum(c[beyond] for c in own),
                0,
                False,
            ),
            goal("share of cases all finite", sum(c["weights_finite"] for c in own) / len(own), 1.0, True),
            goal(
                "share of cases with the same bits every time", sum(c["bit_identical"] for c in own) / len(own), 1, True
            ),
        ]
    return goals


def failures(units: Units, plan: Plan) -> list[str]:
    """What is wrong, whatever the times: figures of correctness that are missed, and ours that broke."""
    refused = units.get("correctness", {}).get("refused", {})
    absent = [grouped_name(backend) for backend in plan.ours[1:] if backend in refused]  # not part of this machine
    found = [
        f"{goal.ours}: {goal.text}: {goal.verdict} {goal.reason or goal.value}"
        for goal in correct(units, plan)
        if goal.verdict != "met" and goal.ours not in absent
    ]
    for name, unit in units.items():
        if unit["status"] != "ok":
            found.append(f"{name}: {unit['status']}: {unit['reason']}")
        found += [
            f"{name}: {result['name']}: {result['status']}: {result['reason']}"
            for result in unit.get("results", [])
            if result["family"] == "ours" and result["status"] in ("broken", "failed")
        ]
    return found
