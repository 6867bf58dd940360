"""The tables on the terminal and the JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from floor import ZERO, Limits, dtype_name, floor_seconds
from harness import Result
from machine import summary
from ratios import Goal, Ratio, Row, geometric_mean
from rich.console import Console
from rich.table import Table

FORMAT = 1


def milliseconds(seconds: float) -> str:
    """Three significant digits, in ms."""
    return f"{seconds * 1e3:.3g}" if seconds < 1 else f"{seconds * 1e3:.0f}"


def fraction_of_floor(result: Result, row: Row, limits: Limits) -> float:
    """Floor time of the implementation's own work over its median: 1 is the limit of the machine."""
    return floor_seconds(result.work, limits, dtype_name(row.case.dtype)) / result.median


def print_head(console: Console, facts: dict[str, Any], limits: Limits, method: dict[str, Any]) -> None:
    """Machine, method and measured limits."""
    console.print(summary(facts))
    rates = ", ".join(f"{name} {rate / 1e9:.0f} GFLOP/s" for name, rate in limits.rate.items())
    console.print(
        f"measured limits: copy {limits.copy / 1e9:.1f}, read {limits.read / 1e9:.1f}, "
        f"add {limits.add / 1e9:.1f}, scale {limits.scale / 1e9:.1f} GB/s; products {rates}"
    )
    console.print(
        f"method: {method['rounds']} rounds, every implementation once a round in shuffled order, caches "
        f"flushed before each call by reading {method['flush_bytes'] / 2**20:.0f} MiB; median and quartiles"
    )


def print_row(console: Console, row: Row, limits: Limits) -> None:
    """One table: every implementation of a row, also those that could not be timed."""
    table = Table(title=row.case.title, title_justify="left", title_style="bold")
    table.add_column("implementation")
    for name in ("median ms", "quartiles", "MB", "MFLOP", "floor ms", "of floor"):
        table.add_column(name, justify="right")
    table.add_column("notes", overflow="fold")
    for result in row.results:
        if not result.seconds:
            table.add_row(result.name, result.status, "", "", "", "", "", result.reason, style="yellow")
            continue
        first, third = result.quartiles()
        floor = floor_seconds(result.work, limits, dtype_name(row.case.dtype))
        table.add_row(
            result.name,
            milliseconds(result.median),
            f"{milliseconds(first)} - {milliseconds(third)}",
            f"{result.work.bytes_moved / 1e6:.2f}",
            f"{result.work.operations / 1e6:.0f}",
            milliseconds(floor),
            f"{fraction_of_floor(result, row, limits):.0%}",
            result.notes,
            style={"ours": "green", "yardstick": "cyan"}.get(result.family),
        )
    console.print(table)


def print_ratios(console: Console, ratios: Sequence[Ratio]) -> None:
    """Ours against each other entry, wins and losses in one table."""
    table = Table(title="times as long as ours (kernel): above 1 ours is faster", title_justify="left")
    for name in ("row", "against"):
        table.add_column(name)
    for name in ("ratio", "quartiles", ""):
        table.add_column(name, justify="right")
    for r in ratios:
        verdict = r.verdict
        spread = f"{r.first_quartile:.2f} - {r.third_quartile:.2f}"
        style = "red" if verdict == "LOSS" else None
        table.add_row(r.row, r.other, f"{r.ratio:.2f}", spread, verdict, style=style)
    console.print(table)
    rivals = [r for r in ratios if r.family == "rival"]
    if rivals:
        tally = {name: sum(r.verdict == name for r in rivals) for name in ("win", "even", "LOSS")}
        console.print(f"against rivals: {tally['win']} wins, {tally['LOSS']} losses, {tally['even']} within the spread")
        for other in sorted({r.other for r in rivals}):
            mean = geometric_mean([r.ratio for r in rivals if r.other == other])
            console.print(f"  {other}: geometric mean {mean:.2f} x as long as ours")


def print_goals(console: Console, goals: Sequence[Goal]) -> None:
    """Every goal that applies to the rows of this run."""
    table = Table(title="goals", title_justify="left")
    for name in ("goal", "row", "ours"):
        table.add_column(name)
    for name in ("measured", "at our floor"):
        table.add_column(name, justify="right")
    table.add_column("verdict")
    styles = {"missed": "red", "unknown": "yellow"}
    for goal in goals:
        value = goal.reason if goal.value is None else f"{goal.value:.2f}"
        possible = "" if goal.at_floor is None else f"{goal.at_floor:.2f}"
        style = styles.get(goal.verdict)
        table.add_row(goal.text, goal.row, goal.ours, value, possible, goal.verdict, style=style)
    console.print(table)


def as_json(
    facts: dict[str, Any],
    method: dict[str, Any],
    limits: Limits,
    rows: Sequence[Row],
    ratios: Sequence[Ratio],
    goals: Sequence[Goal],
) -> dict[str, Any]:
    """Everything that the tables show, and every sample."""
    return {
        "format": FORMAT,
        "machine": facts,
        "method": method,
        "limits": limits.as_dict(),
        "rows": [_row_json(row, limits) for row in rows],
        "ratios": [{**asdict(r), "verdict": r.verdict} for r in ratios],
        "goals": [{**asdict(g), "verdict": g.verdict} for g in goals],
    }


def _row_json(row: Row, limits: Limits) -> dict[str, Any]:
    case = row.case
    return {
        "operation": case.operation,
        "label": case.label,
        "shapes": [list(s) for s in case.shapes],
        "rank": case.rank,
        "dtype": dtype_name(case.dtype),
        "results": [result_json(result, row, limits) for result in row.results],
    }


def result_json(result: Result, row: Row, limits: Limits) -> dict[str, Any]:
    """What the JSON holds of one implementation in one row."""
    facts: dict[str, Any] = {
        "name": result.name,
        "family": result.family,
        "status": result.status,
        "reason": result.reason,
        "notes": result.notes,
    }
    if result.work != ZERO:
        facts |= {**asdict(result.work), "bytes_moved": result.work.bytes_moved}
        facts["floor_ms"] = floor_seconds(result.work, limits, dtype_name(row.case.dtype)) * 1e3
    if result.seconds:
        first, third = result.quartiles()
        facts |= {
            "median_ms": result.median * 1e3,
            "first_quartile_ms": first * 1e3,
            "third_quartile_ms": third * 1e3,
            "min_ms": min(result.seconds) * 1e3,
            "fraction_of_floor": fraction_of_floor(result, row, limits),
            "samples_ms": [round(s * 1e3, 5) for s in result.seconds],
        }
    return facts


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Writes ``data`` and creates the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=1) + "\n")
