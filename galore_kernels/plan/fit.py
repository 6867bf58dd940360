"""What fits: the largest rank, or the most tokens, with which a step stays within a budget of bytes."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from galore_kernels.plan.errors import PlanError
from galore_kernels.plan.estimate import Plan, plan
from galore_kernels.plan.settings import check_choice
from galore_kernels.plan.shapes import LlamaShape, find_model
from galore_kernels.subspace import RANK_MULTIPLE

__all__ = ["SOLVABLE", "Fit", "parse_bytes", "solve"]

SOLVABLE = ("rank", "tokens")

_UNITS = {"": 1, "B": 1, **{f"{p}B": 1000**n for n, p in enumerate("KMGT", 1)}}
_UNITS |= {f"{p}IB": 1024**n for n, p in enumerate("KMGT", 1)}

#: No budget in sight holds a step of so many tokens.
_MOST_TOKENS = 2**28


@dataclass(frozen=True)
class Fit:
    """``unknown`` may be ``value`` and no more: the plan with it, and that with the next value, if there is one."""

    unknown: str
    value: int
    plan: Plan
    next_value: int
    next_plan: Plan | None


def parse_bytes(text: str) -> int:
    """ "24GB" is 24 * 10^9, "24GiB" 24 * 2^30.

    Raises:
        PlanError: it is no size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    unit = match.group(2).upper() if match else None
    if match is None or unit not in _UNITS:
        raise PlanError(f"{text!r}: expected a size like 24GB, 16.5GiB or 800MB; add a unit of B, KB, MB, GB, GiB, ...")
    return int(float(match.group(1)) * _UNITS[unit])


def solve(model: str | Path | LlamaShape, optimizer: str, unknown: str, budget: int, **options: Any) -> Fit:
    """The largest value of ``unknown`` whose plan takes at most ``budget`` bytes.

    Args:
        unknown: "rank", in multiples of 16; or "tokens", in multiples of ``sequence`` if that is given.
        options: as of ``plan``; ``unknown`` need not be among them.

    Raises:
        PlanError: not even the smallest value fits; an argument out of range.
    """
    check_choice("solve", unknown, SOLVABLE)
    shape = find_model(model)
    unit = RANK_MULTIPLE if unknown == "rank" else (options.get("sequence") or 1)
    narrowest = max(min(matrix.rows, matrix.cols) for matrix in shape.linears())
    limit = max(1, narrowest // RANK_MULTIPLE) if unknown == "rank" else _MOST_TOKENS // unit

    def planned(count: int) -> Plan:
        return plan(shape, optimizer, **{**options, unknown: count * unit})

    least = planned(1)
    if least.peak > budget:
        raise PlanError(
            f"{unknown}={unit} takes {least.peak / 1e9:.2f} GB ({least.moment}): expected at most "
            f"{budget / 1e9:.2f} GB; try gradients=factored, updates=layerwise, weights=int8 or checkpointing=layer, "
            "or a larger card"
        )
    most = _largest(lambda count: planned(count).peak <= budget, limit)
    following = planned(most + 1) if most < limit else None
    return Fit(unknown, most * unit, planned(most), (most + 1) * unit, following)


def _largest(fits: Callable[[int], bool], limit: int) -> int:
    """The largest number up to ``limit`` that fits, if 1 does and what fits has no gaps."""
    low, high = 1, 2
    while high <= limit and fits(high):
        low, high = high, 2 * high
    high = min(high, limit + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
