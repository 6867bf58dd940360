"""The comparison as a table, a JSON file and a picture."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.table import Table

__all__ = ["Row", "as_table", "draw"]

BYTES = {"weight_bytes": "weights", "gradient_bytes": "gradients", "state_bytes": "optimizer state"}


@dataclass(frozen=True)
class Row:
    """A method's runs.

    Attributes:
        sweep: those of the first seed, one for each learning rate.
        runs: those that count, one for each seed, all with the learning rate that validated best.
    """

    name: str
    sweep: Sequence[dict[str, Any]]
    runs: Sequence[dict[str, Any]]

    @property
    def lr(self) -> float:
        """The chosen one."""
        return float(self.runs[0]["lr"])

    @property
    def at_edge(self) -> bool:
        """Whether it is the smallest or largest of the sweep, so that a wider one might have done better."""
        rates = [run["lr"] for run in self.sweep]
        return len(rates) > 1 and self.lr in (min(rates), max(rates))

    def accuracies(self, part: str = "test") -> list[float]:
        """By seed."""
        return [run[f"{part}_accuracy"] for run in self.runs]

    def times(self, key: str) -> list[float]:
        """Of the steps of all runs, in ms."""
        different = {id(run): run for run in (*self.sweep, *self.runs)}
        return [seconds * 1e3 for run in different.values() for seconds in run[key]]

    def to_dict(self) -> dict[str, Any]:
        """What the JSON holds: of the steps' times, those of all runs in a few figures."""
        wall, cpu = self.times("step_seconds"), self.times("step_cpu_seconds")
        return {
            "method": self.name,
            "lr": self.lr,
            "lr_at_edge_of_sweep": self.at_edge,
            "test_accuracy_mean": statistics.mean(self.accuracies()),
            "step_ms_median": statistics.median(wall),
            "step_ms_quartiles": statistics.quantiles(wall, n=4)[::2],
            "step_cpu_ms_median": statistics.median(cpu),
            "step_cpu_ms_quartiles": statistics.quantiles(cpu, n=4)[::2],
            "step_cpu_ms_mean": statistics.mean(cpu),
            **{key: self.runs[0][key] for key in ("trained_parameters", *BYTES)},
            "sweep": [_without_times(run) for run in self.sweep],
            "runs": [_without_times(run) for run in self.runs],
        }


def _without_times(run: dict[str, Any]) -> dict[str, Any]:
    keys = ("lr", "seed", "steps", "validation_accuracy", "test_accuracy", "load")
    return {key: run[key] for key in keys}


def as_table(rows: Sequence[Row], baselines: dict[str, float], title: str) -> Table:
    """One row a method, and below what needs no training of an encoder."""
    table = Table(title=title, title_justify="left")
    table.add_column("method")
    for column in ("test accuracy", "by seed", "validation", "lr", "trained", "weights", "gradients",
                   "optimizer state", "step, ms", "CPU, ms", "mean"):  # fmt: skip
        table.add_column(column, justify="right")
    for row in rows:
        facts = row.to_dict()
        table.add_row(
            row.name,
            f"{facts['test_accuracy_mean']:.1%}",
            " ".join(f"{accuracy * 100:.1f}" for accuracy in row.accuracies()),
            f"{statistics.mean(row.accuracies('validation')):.1%}",
            f"{row.lr:g}{' (edge)' if row.at_edge else ''}",
            f"{facts['trained_parameters']:,}",
            *(_megabytes(facts[key]) for key in BYTES),
            f"{facts['step_ms_median']:.0f}",
            f"{facts['step_cpu_ms_median']:.0f}",
            f"{facts['step_cpu_ms_mean']:.0f}",
        )
    table.add_section()
    for name, accuracy in baselines.items():
        table.add_row(name, f"{accuracy:.1%}")
    return table


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.3f} MB"


def draw(rows: Sequence[Row], baselines: dict[str, float], title: str, path: Path) -> None:
    """Test accuracy against bytes of optimizer state, and what training keeps in memory, to a PNG."""
    figure = Figure(figsize=(13, 5.5), layout="constrained", dpi=110)
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(1.3, 1))
    colors = [f"C{number}" for number in range(len(rows))]
    _draw_accuracy(left, rows, colors, baselines)
    _draw_memory(right, rows)
    figure.suptitle(title, fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")


def _draw_accuracy(axes: Axes, rows: Sequence[Row], colors: Sequence[str], baselines: dict[str, float]) -> None:
    for row, color in zip(rows, colors, strict=True):
        size = row.runs[0]["state_bytes"] / 1e6
        accuracies = row.accuracies()
        axes.plot([size] * len(accuracies), accuracies, ".", color=color, alpha=0.5)
        axes.plot(size, statistics.mean(accuracies), "o", color=color, markersize=8, label=row.name)
    name, accuracy = max(baselines.items(), key=lambda item: item[1])
    axes.axhline(accuracy, color="grey", linestyle="--", linewidth=1)
    axes.annotate(name, (0.01, accuracy), xycoords=("axes fraction", "data"), xytext=(0, 3),
                  textcoords="offset points", color="grey", fontsize=8)  # fmt: skip
    axes.set_xscale("log")
    axes.set_xlabel("optimizer state, MB (logarithmic)")
    axes.set_ylabel("test accuracy: dots by seed, circles their mean")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_memory(axes: Axes, rows: Sequence[Row]) -> None:
    begin = [0.0] * len(rows)
    places = range(len(rows))
    for key, label in BYTES.items():
        sizes = [row.runs[0][key] / 1e6 for row in rows]
        axes.barh(places, sizes, left=begin, label=label, height=0.6)
        begin = [before + size for before, size in zip(begin, sizes, strict=True)]
    axes.set_yticks(places, [row.name for row in rows])
    axes.invert_yaxis()
    axes.set_xlabel("kept in training, MB (activations not counted)")
    axes.legend(fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
