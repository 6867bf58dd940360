"""Ours against each rival of the same row, and against the goals that the project set itself."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from floor import Limits, dtype_name, floor_seconds
from harness import Result, quartiles
from problem import ADAFACTOR, APOLLO, Case
from rivals import APOLLO_ADAMW, BNB_8BIT, GALORE_8BIT, GALORE_ADAFACTOR, TWO_PRODUCTS


@dataclass(frozen=True)
class Row:
    """A case and everything that was measured in it."""

    case: Case
    results: list[Result]

    def timed(self, name: str) -> Result | None:
        """The result of that name if it was timed."""
        return next((r for r in self.results if r.name == name and r.seconds), None)


@dataclass(frozen=True)
class Ratio:
    """How many times as long the other takes: ratio of medians, quartiles of the ratios within rounds."""

    row: str
    ours: str
    other: str
    family: str
    ratio: float
    first_quartile: float
    third_quartile: float

    @property
    def verdict(self) -> str:
        """Of a rival: win, LOSS, or even if the quartiles lie on both sides of 1; of others: what they are."""
        if self.family != "rival":
            return self.family
        if self.first_quartile < 1 < self.third_quartile:
            return "even"
        return "win" if self.ratio > 1 else "LOSS"


@dataclass(frozen=True)
class Goal:
    """A goal on one row: ``value`` must be at least (or at most) ``bound``; None for a ``reason``.

    ``at_floor`` is the value if ours took no longer than its floor: what this machine allows at most.
    """

    text: str
    row: str
    ours: str
    value: float | None
    bound: float
    at_least: bool
    at_floor: float | None = None
    reason: str = ""

    @property
    def verdict(self) -> str:
        """One of met, missed, unknown."""
        if self.value is None:
            return "unknown"
        met = self.value >= self.bound if self.at_least else self.value <= self.bound
        return "met" if met else "missed"


def fastest_ours(row: Row, names: Sequence[str]) -> Result | None:
    """The kernel that backend="auto" would take: the first of ``names`` that was timed."""
    return next((found for name in names if (found := row.timed(name)) is not None), None)


def compare(ours: Result, other: Result, row: str) -> Ratio:
    """Divides other by ours. Rounds are paired, so noise that lasts a round cancels in the quartiles."""
    paired = [b / a for a, b in zip(ours.seconds, other.seconds, strict=True)]
    first, third = quartiles(paired)
    return Ratio(row, ours.name, other.name, other.family, other.median / ours.median, first, third)


def all_ratios(rows: Sequence[Row], names: Sequence[str]) -> list[Ratio]:
    """Our kernel against every other timed entry of each row, wins and losses alike."""
    found = []
    for row in rows:
        ours = fastest_ours(row, names)
        if ours is not None:
            found += [compare(ours, r, row.case.title) for r in row.results if r.seconds and r.name != ours.name]
    return found


def goals(
    rows: Sequence[Row], kernels: Sequence[str], optimizers: Sequence[str], limits: Limits, device: str
) -> list[Goal]:
    """The goals that apply to these rows on that type of device, for each of our kernels and optimizers in the row."""
    found = []
    for row in rows:
        for name in (*kernels, *optimizers):
            ours = row.timed(name)
            if ours is not None:
                found += [_goal(row, ours, limits, *goal) for goal in _apply_to(row.case, device)]
    return found


def _apply_to(case: Case, device: str) -> list[tuple[str, str, float, bool]]:
    """(text, against whom, bound, at least?) of the goals for a case."""
    if case.operation == "adam8bit_update":
        return [(f"at least 8 x faster than {BNB_8BIT}", BNB_8BIT, 8.0, True)]
    if case.operation in APOLLO:
        if device == "cuda":
            return [(f"at least 3 x faster than {APOLLO_ADAMW}", APOLLO_ADAMW, 3.0, True)]
        return [(f"no slower than {APOLLO_ADAMW}", APOLLO_ADAMW, 1.0, True)]
    if case.operation == ADAFACTOR:
        return [(f"no slower than {GALORE_ADAFACTOR}", GALORE_ADAFACTOR, 1.0, True)]
    if case.operation != "galore_update":
        return []
    found = [(f"no slower than {GALORE_8BIT}", GALORE_8BIT, 1.0, True)]
    if case.shapes == ((1024, 4096),) and case.rank == 128:
        found.append(("within 1.3 x of its two products", TWO_PRODUCTS, 1.3, False))
        bound = {"fp32": 1.8, "bf16": 4.0}.get(dtype_name(case.dtype))
        if bound is not None:
            found.append((f"at least {bound:g} x faster than {GALORE_8BIT}", GALORE_8BIT, bound, True))
    return found


def _goal(row: Row, ours: Result, limits: Limits, text: str, other: str, bound: float, at_least: bool) -> Goal:
    against = row.timed(other)
    if against is None:
        result = next((r for r in row.results if r.name == other), None)
        reason = "not in this run" if result is None else f"{result.status}: {result.reason}"
        return Goal(text, row.case.title, ours.name, None, bound, at_least, reason=reason)
    ratio = against.median / ours.median
    floor = against.median / floor_seconds(ours.work, limits, dtype_name(row.case.dtype))
    value, possible = (ratio, floor) if at_least else (1 / ratio, 1 / floor)
    return Goal(text, row.case.title, ours.name, value, bound, at_least, possible)


def geometric_mean(ratios: Sequence[float]) -> float:
    """Mean of ratios that treats 2 x and 1/2 x alike."""
    return statistics.geometric_mean(ratios)
