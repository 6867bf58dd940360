"""The tables, pictures and verdicts of ``gpu_check.py``, made from what its JSON holds."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import gpu_goals
import machine
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from gpu_entries import STRONGEST, grouped_name, single_name
from gpu_plan import LAYERWISE_GOAL, ROOFLINE_GOALS, Plan
from matplotlib.figure import Figure
from picture import COLORS, FLOOR_COLOR
from ratios import Goal
from report import milliseconds
from rich import box
from rich.console import Console
from rich.table import Table

Found = Mapping[str, Any]


def _goals(found: Found, plan: Plan) -> list[Goal]:
    units = found["measurements"]
    return [*gpu_goals.correct(units, plan), *gpu_goals.speed(units, plan), *gpu_goals.refresh(units, plan)]


def goals(found: Found, plan: Plan) -> list[dict[str, Any]]:
    """Every goal with its verdict, as plain data."""
    return [{**asdict(goal), "verdict": goal.verdict} for goal in _goals(found, plan)]


def failures(found: Found, plan: Plan) -> list[str]:
    """What is wrong whatever the times."""
    return gpu_goals.failures(found["measurements"], plan)


# --- tables


def show(console: Console, found: Found, plan: Plan) -> None:
    """The stages, each row, and the goals last: what is cut off at the front is in the JSON."""
    if plan.dry_run:
        console.print("DRY RUN: a rehearsal on a CPU with tiny matrices; no number below is a result", style="bold red")
    else:
        console.print(machine.summary(found["machine"]))
    _show_stages(console, found["stages"])
    _show_correctness(console, found["measurements"].get("correctness", {}).get("cases", []))
    for name, unit in found["measurements"].items():
        if unit["status"] != "ok":
            console.print(f"{name}: {unit['status']}: {unit['reason']}", style="red", markup=False)
        elif "results" in unit:
            _show_row(console, name, unit)
    _show_goals(console, _goals(found, plan))


def _table(*columns: str, title: str = "") -> Table:
    return Table(*columns, title=title, title_justify="left", box=box.SIMPLE, padding=(0, 1), pad_edge=False)


def _show_stages(console: Console, stages: Found) -> None:
    table = _table("stage", "status", "s", "what")
    for name, stage in stages.items():
        what = str(stage.get("reason", ""))
        if "passed" in stage:
            what = f"{stage['passed']} passed, {stage['failed']} failed, {stage['skipped']} skipped {what}"
        elif "summary" in stage:
            what = f"{stage['cases']} cases, {stage['summary']} {what}"
        style = {"ok": "green", "failed": "red", "stopped": "red"}.get(stage["status"], "yellow")
        table.add_row(name, stage["status"], f"{stage['seconds']:.0f}", what[:200], style=style)
        for failure in stage.get("failures", [])[:2]:
            table.add_row("", "", "", f"{failure['test']}: {failure['text'][-600:]}", style="red")
    console.print(table)


def _show_correctness(console: Console, cases: list[Found]) -> None:
    if not cases:
        return
    columns = ("backend", "case", "codes equal", "apart", "> 2 ulps", "reference's", "worst ulps", "same bits")
    table = _table(*columns, title="against float64 and the reference")
    for case in cases:
        rows, cols = case["shape"]
        table.add_row(
            case["backend"],
            f"{rows} x {cols} r={case['rank']}"
            + (f" {case['basis']}" if case.get("basis") else "")
            + (", int8 weight" if case.get("int8_weight") else ""),
            f"{case['codes_equal']:.5%}",
            str(case["codes_apart"]),
            f"{case['weights_beyond_two_ulps'] / case['weights_compared']:.1e}",
            f"{case['weights_of_the_reference_beyond_two_ulps'] / case['weights_compared']:.1e}",
            f"{case['worst_ulps']:.2f}",
            "yes" if case["bit_identical"] else "NO",
        )
    console.print(table)


def _show_row(console: Console, name: str, unit: Found) -> None:
    floor = "" if unit["roofline_ms"] is None else f", roofline {unit['roofline_ms']:.3g} ms"
    table = _table(title=f"{name}: {unit['row']}{floor}")
    for column in ("implementation", "median ms", "quartiles", "own GB/s", "of roofline", "host ms"):
        table.add_column(column, justify="left" if column == "implementation" else "right")
    for result in unit["results"]:
        if "median_ms" not in result:
            table.add_row(result["name"], result["status"], result["reason"][:60], style="yellow")
            continue
        quartiles = [result[key] * 1e-3 for key in ("first_quartile_ms", "third_quartile_ms")]
        table.add_row(
            result["name"],
            milliseconds(result["median_ms"] * 1e-3),
            " - ".join(map(milliseconds, quartiles)),
            f"{result['own_gb_per_s']:.0f}",
            f"{result['of_roofline']:.1%}" if "of_roofline" in result else "",
            f"{result['host_ms']:.2f}",
            style="green" if result["family"] == "ours" else None,
        )
    console.print(table)


def _show_goals(console: Console, goals: list[Goal]) -> None:
    # Lines without a table's padding: where output is cut, these are to be left.
    styles = {"missed": "red", "unknown": "yellow"}
    for goal in goals:
        bound = f"{'>=' if goal.at_least else '<='} {goal.bound:g}"
        value = "" if goal.value is None else f"{goal.value:.4g}"
        text = goal.text if goal.value is not None else f"{goal.text} ({goal.reason[:80]})"
        line = f"{goal.verdict:8}{value:>10} {bound:9}{goal.row:17}{goal.ours:29}{text}"
        console.print(line, style=styles.get(goal.verdict), markup=False, soft_wrap=True, highlight=False)


# --- pictures


def draw(folder: Path, found: Found, plan: Plan) -> None:
    """Three PNGs, as far as there is something to draw."""
    units = found["measurements"]
    first = units.get(f"step r={plan.ranks[0]}", {})
    if _timed(first):
        _save(_step_picture(first, plan), folder / "step.png", found)
    ranks = {
        rank: [result for kind in ("step", "chain") for result in _timed(units.get(f"{kind} r={rank}", {}))]
        for rank in plan.ranks
    }
    if any(ranks.values()):
        _save(_rank_picture(ranks, plan), folder / "ranks.png", found)
    single = {name: unit for name, unit in units.items() if name.startswith("layerwise") and _timed(unit)}
    if single:
        _save(_layerwise_picture(single, plan), folder / "layerwise.png", found)


def _timed(unit: Found) -> list[Found]:
    return [result for result in unit.get("results", []) if "median_ms" in result]


def _step_picture(unit: Found, plan: Plan) -> Figure:
    shown = list(reversed(_timed(unit)))
    figure, axis = plt.subplots(figsize=(9, 0.6 + 0.5 * len(shown)), layout="constrained")
    for y, result in enumerate(shown):
        median = result["median_ms"]
        error = [[median - result["first_quartile_ms"]], [result["third_quartile_ms"] - median]]
        axis.barh(y, median, xerr=error, color=COLORS[result["family"]], height=0.7, capsize=2)
        axis.text(result["third_quartile_ms"] * 1.02, y, f" {median:.1f} ms", va="center", size=9)
    axis.axvline(unit["roofline_ms"], color=FLOOR_COLOR, linewidth=2, label=f"roofline {unit['roofline_ms']:.2f} ms")
    axis.set_yticks(range(len(shown)), [result["name"] for result in shown])
    axis.set_xlim(0, max(result["third_quartile_ms"] for result in shown) * 1.2)
    axis.set_xlabel("ms for one step, median and quartiles")
    matrices = sum(count for _, _, count in unit["shapes"])
    axis.set_title(f"Llama-7B's {matrices} matrices, bf16, rank {plan.ranks[0]}, no refresh", loc="left")
    axis.legend(frameon=False, loc="lower right")
    axis.spines[["top", "right"]].set_visible(False)
    return figure


def _rank_picture(ranks: Mapping[int, list[Found]], plan: Plan) -> Figure:
    figure, axis = plt.subplots(figsize=(7.5, 4.5), layout="constrained")
    for name in (*map(grouped_name, plan.ours), STRONGEST):
        first = {
            rank: next((result["of_roofline"] for result in results if result["name"] == name), None)
            for rank, results in ranks.items()
        }
        points = [(rank, share) for rank, share in first.items() if share is not None]
        if points:
            axis.plot(*zip(*points, strict=True), marker="o", label=name)
    axis.plot(plan.ranks, ROOFLINE_GOALS, "_", markersize=28, color=FLOOR_COLOR, label="goal")
    axis.set_xscale("log", base=2)
    axis.set_xticks(plan.ranks, [str(rank) for rank in plan.ranks])
    axis.set_ylim(bottom=0)
    axis.set_xlabel("rank")
    axis.set_ylabel("share of the roofline (memory or arithmetic)")
    axis.set_title("one step over all matrices", loc="left")
    axis.legend(frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    return figure


def _layerwise_picture(units: Mapping[str, Found], plan: Plan) -> Figure:
    figure, axes = plt.subplots(1, len(units), figsize=(5.5 * len(units), 4), squeeze=False, layout="constrained")
    names = [single_name(backend, graph) for backend in plan.ours for graph in (False, True)]
    for axis, unit in zip(axes[0], units.values(), strict=True):
        shares = {result["name"]: result["of_roofline"] for result in _timed(unit)}
        shown = [name for name in names if name in shares]
        axis.bar(range(len(shown)), [shares[name] for name in shown], color=COLORS["ours"], width=0.6)
        axis.axhline(LAYERWISE_GOAL, color=FLOOR_COLOR, linewidth=2, label="goal")
        axis.set_xticks(range(len(shown)), [name.replace(", ", "\n") for name in shown], size=8)
        axis.set_ylabel("share of the roofline")
        rows, cols, _ = unit["shapes"][0]
        axis.set_title(f"one {rows} x {cols} at a time, rank {plan.ranks[0]}", loc="left")
        axis.legend(frameon=False)
        axis.spines[["top", "right"]].set_visible(False)
    return figure


def _save(figure: Figure, path: Path, found: Found) -> None:
    footer = textwrap.fill(machine.summary(found["machine"]), int(figure.get_figwidth() * 15))
    if found["dry_run"]:
        figure.text(0.5, 0.5, "DRY RUN", size=60, color="red", alpha=0.35, rotation=25, ha="center", va="center")
        footer = "DRY RUN on a CPU with tiny matrices: not a result\n" + footer
    figure.supxlabel(footer, size=7, color="red" if found["dry_run"] else "#606060")
    figure.savefig(path, dpi=110)
    plt.close(figure)
