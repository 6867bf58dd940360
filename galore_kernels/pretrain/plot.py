"""The runs of a folder side by side: a picture of their losses and a table."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .config import PretrainError
from .display import format_bytes, format_seconds
from .runlog import LOG_NAME, read_log, series

__all__ = ["PICTURE_NAME", "RunRecord", "comparison_table", "plot_runs", "read_runs"]

PICTURE_NAME = "loss_curves.png"

# Smoothing of the training curves: each point is the mean over this share of the run around it.
_SMOOTHING_SHARE = 0.05


@dataclass(frozen=True)
class RunRecord:
    """A run as its log tells it. ``final`` is the log's last line, or None for a run that has not finished."""

    name: str
    header: dict[str, Any]
    train: tuple[list[int], list[float]]
    validation: tuple[list[int], list[float]]
    last_train: dict[str, Any] | None
    final: dict[str, Any] | None
    subspaces: list[dict[str, Any]]

    @property
    def validation_loss(self) -> float | None:
        """The last one measured."""
        return self.validation[1][-1] if self.validation[1] else None


def read_runs(folder: Path) -> list[RunRecord]:
    """Runs in the subfolders of ``folder``, lowest validation loss first.

    Raises:
        PretrainError: there is none, or a log is damaged.
    """
    runs = [_read_run(path) for path in sorted(folder.glob(f"*/{LOG_NAME}"))]
    if not runs:
        raise PretrainError(f'no runs in "{folder}" (no */{LOG_NAME}); train one first, or give another --out')
    return sorted(runs, key=lambda run: (run.validation_loss is None, run.validation_loss, run.name))


def _read_run(path: Path) -> RunRecord:
    entries = read_log(path)
    training = [entry for entry in entries if entry["kind"] == "train"]
    final = entries[-1] if entries[-1]["kind"] == "final" else None
    return RunRecord(
        path.parent.name, entries[0], series(entries, "train", "loss"), series(entries, "validation", "loss"),
        training[-1] if training else None, final, [entry for entry in entries if entry["kind"] == "subspaces"],
    )  # fmt: skip


def comparison_table(runs: list[RunRecord]) -> str:
    """One row a run: name, steps, final validation loss, optimizer state, peak memory, speed, time."""
    head = ("run", "steps", "lr", "validation", "optimizer state", "peak memory", "tokens/s", "time")
    rows = [head, *(_row(run) for run in runs)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    lines = [_table_line(row, widths) for row in rows]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def _table_line(row: tuple[str, ...], widths: list[int]) -> str:
    cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
    return "  ".join([row[0].ljust(widths[0]), *cells[1:]])


def _row(run: RunRecord) -> tuple[str, ...]:
    config = run.header["config"]
    last = run.final or run.last_train
    steps = last["step"] if last else 0
    loss = f"{run.validation_loss:.4f}" if run.validation_loss is not None else "-"
    beginning = (run.name, f"{steps}/{config['steps']}", f"{config['lr']:g}", loss)
    if last is None:
        return (*beginning, "-", "-", "-", "-")
    seconds = last["seconds"]
    return (
        *beginning,
        format_bytes(last["optimizer_state_bytes"]),
        f"{format_bytes(last['peak_memory_bytes'])} ({run.header['machine']['peak_memory_of']})",
        f"{steps * config['batch'] * config['accumulate'] * config['sequence'] / seconds:,.0f}",
        format_seconds(seconds),
    )


def plot_runs(runs: list[RunRecord], path: Path) -> None:
    """Draw the curves of ``runs`` (at least one) to a PNG: losses over steps, and the optimizers' state in bytes.

    Raises:
        PretrainError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise PretrainError(f"the picture needs the package matplotlib ({error}): pip install matplotlib") from error
    height = max(5.0, 2.4 + 0.45 * len(runs))
    with_subspaces = any(run.subspaces for run in runs)
    figure = Figure(figsize=(13, height + 3.6 * with_subspaces), layout="constrained", dpi=120)
    FigureCanvasAgg(figure)
    colors = [f"C{index % 10}" for index in range(len(runs))]
    above: Any = figure
    if with_subspaces:
        rows: Any = figure.subfigures(2, 1, height_ratios=(height, 3.6))
        above, below = rows
        _draw_subspaces(below, runs, colors)
    curves, bars = above.subplots(1, 2, width_ratios=(3, 1.25))
    for run, color in zip(runs, colors, strict=True):
        _draw_curve(curves, run, color)
    _finish_curves(curves, runs)
    _draw_state(bars, runs, colors)
    figure.suptitle(_heading(runs), fontsize=11)
    temporary = path.with_name(f".{path.name}.tmp")
    figure.savefig(temporary, format="png")
    temporary.replace(path)


def _draw_curve(axes: Any, run: RunRecord, color: str) -> None:
    steps, losses = run.train
    loss = "no validation yet" if run.validation_loss is None else f"{run.validation_loss:.3f}"
    unfinished = "" if run.final is not None else " (unfinished)"
    if steps:
        axes.plot(steps, losses, color=color, alpha=0.15, linewidth=0.8)
        axes.plot(steps, _smoothed(losses), color=color, linewidth=1.5, alpha=0.9)
    axes.plot(*run.validation, color=color, marker="o", markersize=4.5, markeredgecolor="white", linewidth=0,
              label=f"{loss}  {run.name}{unfinished}")  # fmt: skip


def _finish_curves(axes: Any, runs: list[RunRecord]) -> None:
    axes.set_xlabel("step")
    bytewise = all(run.header["config"]["tokenizer"] is None for run in runs)
    axes.set_ylabel("loss, nats per byte" if bytewise else "loss, nats per token")
    values = [value for run in runs for value in (*_smoothed(run.train[1]), *run.validation[1])]
    if values:
        low, high = min(values), max(values)
        # The first steps fall from log(vocabulary); the end is what is compared, and gets the room.
        settled = sorted(values)[int(0.93 * (len(values) - 1))]
        axes.set_ylim(low - 0.04 * (settled - low), min(high, settled + 0.15 * (settled - low)) + 1e-3)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(title="final validation loss (dots); lines: training, smoothed", loc="upper right", frameon=True)


def _draw_subspaces(figure: Any, runs: list[RunRecord], colors: list[str]) -> None:
    """Of the layers' subspaces over the steps: the median, and between the lowest and highest layer a band."""
    quantities = (("captured", "gradient energy captured"), ("overlap", "overlap with the basis before"),
                  ("interval", "steps between refreshes"))  # fmt: skip
    for axes, (key, label) in zip(figure.subplots(1, len(quantities)), quantities, strict=True):
        for run, color in zip(runs, colors, strict=True):
            points = [(entry["step"], _layer_values(entry, key)) for entry in run.subspaces]
            points = [(step, values) for step, values in points if values]
            steps = [step for step, _ in points]
            axes.plot(steps, [statistics.median(values) for _, values in points], color=color, marker=".")
            axes.fill_between(steps, [min(v) for _, v in points], [max(v) for _, v in points], color=color, alpha=0.08)
        axes.set_xlabel("step")
        axes.set_ylabel(label)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)


def _layer_values(entry: dict[str, Any], key: str) -> list[float]:
    return [layer[key] for layer in entry["layers"].values() if layer[key] is not None]


def _draw_state(axes: Any, runs: list[RunRecord], colors: list[str]) -> None:
    sizes = [(run.last_train or {}).get("optimizer_state_bytes", 0) for run in runs]
    places = list(range(len(runs)))
    axes.barh(places, [size / 1e6 for size in sizes], color=colors, height=0.6)
    for place, size in zip(places, sizes, strict=True):
        axes.annotate(format_bytes(size), (size / 1e6, place), xytext=(4, 0), textcoords="offset points", va="center")
    axes.set_yticks(places, [run.name for run in runs])
    axes.set_ylim(max(4, len(runs)) - 0.4, -0.6)  # the best run on top; one run alone does not fill the panel
    axes.margins(x=0.25)
    axes.set_xlabel("optimizer state, MB")
    axes.spines[["top", "right"]].set_visible(False)


def _heading(runs: list[RunRecord]) -> str:
    corpora = {run.header["corpus"]["description"] + ", split by " + run.header["config"]["split"] for run in runs}
    models = {f"{run.header['config']['preset']} Llama, {run.header['parameters'] / 1e6:.1f} M" for run in runs}
    return f"{' / '.join(sorted(models))}\n{' / '.join(sorted(corpora))}"


def _smoothed(values: list[float]) -> list[float]:
    half = max(1, round(len(values) * _SMOOTHING_SHARE / 2))
    windows = (values[max(0, index - half) : index + half + 1] for index in range(len(values)))
    return [sum(window) / len(window) for window in windows]
