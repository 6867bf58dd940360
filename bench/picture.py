"""The PNG next to the JSON: horizontal bars per row, or, for a sweep, the speed-up over rank and shape."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from floor import Limits, dtype_name, floor_seconds
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from ratios import Row, compare, fastest_ours
from report import milliseconds

COLORS = {"ours": "#1b7f5c", "yardstick": "#4a78b5", "rival": "#b0b0b0"}
FLOOR_COLOR = "#e07b00"
LABELS = {"ours": "galore-kernels", "yardstick": "yardstick: products alone", "rival": "rival"}


def draw_rows(path: Path, rows: Sequence[Row], limits: Limits, footer: str) -> None:
    """A panel per row, median with quartiles on a logarithmic axis; what was not timed shows its status."""
    columns = min(2, len(rows))
    lines = [rows[i : i + columns] for i in range(0, len(rows), columns)]
    heights = [0.9 + 0.24 * max(len(row.results) for row in line) for line in lines]
    figure, grid = plt.subplots(
        len(lines),
        columns,
        figsize=(8.2 * columns, sum(heights) + 1.0),
        gridspec_kw={"height_ratios": heights},
        squeeze=False,
        layout="constrained",
    )
    for line, axes in zip(lines, grid, strict=True):
        for row, axis in zip(line, axes, strict=False):
            _bars(axis, row, limits)
        for axis in axes[len(line) :]:
            axis.axis("off")
    handles = [Patch(color=COLORS[family], label=label) for family, label in LABELS.items()]
    floor = Line2D([], [], color=FLOOR_COLOR, linewidth=2, label="its floor on this machine")
    figure.legend(handles=[*handles, floor], loc="outside upper center", ncols=4, frameon=False)
    _save(figure, path, footer)


def _bars(axis: Axes, row: Row, limits: Limits) -> None:
    shown = list(reversed(row.results))
    dtype = dtype_name(row.case.dtype)
    timed = [1e3 * t for r in shown if r.seconds for t in (r.median, floor_seconds(r.work, limits, dtype))]
    if timed:
        axis.set_xscale("log")
        axis.set_xlim(min(timed) / 2, max(timed) * 3)
    for y, result in enumerate(shown):
        if not result.seconds:
            axis.text(
                0.01,
                y,
                result.status,
                transform=axis.get_yaxis_transform(),
                va="center",
                color="#a03030",
                size=8,
            )
            continue
        first, third = result.quartiles()
        median = result.median * 1e3
        axis.barh(y, median, color=COLORS[result.family], height=0.72)
        error = [[max(0.0, median - first * 1e3)], [max(0.0, third * 1e3 - median)]]
        axis.errorbar(median, y, xerr=error, color="black", linewidth=0.8, capsize=2)
        floor = floor_seconds(result.work, limits, dtype) * 1e3
        axis.vlines(floor, y - 0.36, y + 0.36, color=FLOOR_COLOR, linewidth=2)
        axis.text(max(third * 1e3, floor) * 1.12, y, milliseconds(result.median), va="center", size=8)
    axis.set_yticks(range(len(shown)), [r.name for r in shown], size=8)
    axis.set_ylim(-0.6, len(shown) - 0.4)
    axis.set_title(row.case.title, loc="left", size=10, fontweight="bold")
    axis.tick_params(axis="x", labelsize=8)
    axis.set_xlabel("ms per step, median and quartiles (logarithmic)", size=8)
    axis.spines[["top", "right"]].set_visible(False)


def draw_sweep(path: Path, rows: Sequence[Row], ours: Sequence[str], other: str, footer: str) -> None:
    """A panel per dtype: how many times as long ``other`` takes, over the rank; a line per shape."""
    dtypes = list(dict.fromkeys(dtype_name(row.case.dtype) for row in rows))
    figure, grid = plt.subplots(1, len(dtypes), figsize=(7.5 * len(dtypes), 5), squeeze=False, layout="constrained")
    for dtype, axis in zip(dtypes, grid[0], strict=True):
        lines: dict[str, list[tuple[int, float]]] = {}
        for row in rows:
            kernel, rival = fastest_ours(row, ours), row.timed(other)
            if dtype_name(row.case.dtype) == dtype and row.case.rank and kernel and rival:
                lines.setdefault(row.case.label, []).append((row.case.rank, compare(kernel, rival, "").ratio))
        for label, points in lines.items():
            axis.plot(*zip(*points, strict=True), marker="o", markersize=4, label=label)
        axis.axhline(1, color="#a03030", linestyle="--", linewidth=1)
        axis.set_xscale("log", base=2)
        ranks = sorted({rank for points in lines.values() for rank, _ in points})
        axis.set_xticks(ranks, [str(rank) for rank in ranks])
        axis.set_yscale("log", base=2)
        axis.set_yticks([0.5, 1, 2, 4, 8, 16], ["0.5", "1", "2", "4", "8", "16"])
        axis.set_xlabel("rank")
        axis.set_ylabel(f"times as long as ours: {other}")
        axis.set_title(f"galore_update, {dtype}; below the dashed line ours is slower", loc="left", size=10)
        if lines:
            axis.legend(frameon=False, fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
    _save(figure, path, footer)


def _save(figure: Figure, path: Path, footer: str) -> None:
    wide = int(figure.get_figwidth() * 15)
    figure.supxlabel("\n".join(textwrap.wrap(footer, wide)), size=7, color="#606060")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
