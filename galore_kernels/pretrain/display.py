"""What a person sees while a run goes: plain lines here, a live table in ``live.py``."""

from __future__ import annotations

import math
import sys
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, Protocol

__all__ = [
    "Display",
    "PlainDisplay",
    "choose_display",
    "describe_subspaces",
    "format_bytes",
    "format_seconds",
    "time_left",
    "title",
]


class Display(AbstractContextManager[Any], Protocol):
    """Receives the lines of the log as they are written, between entering and leaving its context."""

    def start(self, header: dict[str, Any], step: int) -> None:
        """The run begins, or goes on after ``step``; ``header`` is the first line of its log."""

    def show(self, entry: dict[str, Any]) -> None:
        """A line of the log: ``kind`` is "train", "validation", "subspaces" or "final"; or "saved", with a ``path``."""


def choose_display() -> Display:
    """Live on a terminal, plain lines where output goes to a file or a pipe."""
    if sys.stdout.isatty():
        from .live import LiveDisplay  # needs rich, which a batch job does not

        return LiveDisplay()
    return PlainDisplay()


class PlainDisplay:
    """One line for each line of the log."""

    def __enter__(self) -> PlainDisplay:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def start(self, header: dict[str, Any], step: int) -> None:
        """Print what runs, and on which text."""
        config, corpus = header["config"], header["corpus"]
        self._steps = int(config["steps"])
        self._memory = header["machine"]["peak_memory_of"]
        self._print(title(header))
        self._print(
            f"{corpus['description']}: {corpus['training_windows']:,} training and {corpus['validation_windows']:,} "
            f"validation windows of {config['sequence']} tokens, split by {config['split']}"
        )
        if step:
            self._print(f"resumed at step {step} of {self._steps}")

    def show(self, entry: dict[str, Any]) -> None:
        """Print one line."""
        if entry["kind"] == "train":
            self._print(
                f"{self._at(entry)}  loss {entry['loss']:.4f}  lr {entry['lr']:.2e}  "
                f"{entry['tokens_per_second']:,.0f} tokens/s  "
                f"optimizer state {format_bytes(entry['optimizer_state_bytes'])}  "
                f"peak memory {format_bytes(entry['peak_memory_bytes'])} ({self._memory})  "
                f"{format_seconds(entry['seconds'])} elapsed  {format_seconds(time_left(entry, self._steps))} left"
            )
        elif entry["kind"] == "validation":
            self._print(f"{self._at(entry)}  validation loss {entry['loss']:.4f}")
        elif entry["kind"] == "subspaces":
            self._print(f"{self._at(entry)}  subspaces: {describe_subspaces(entry)}")
        elif entry["kind"] == "saved":
            self._print(f"{self._at(entry)}  saved {entry['path']}")
        else:
            self._print(
                f"done: validation loss {entry['validation_loss']:.4f} after {entry['step']} steps, "
                f"{format_seconds(entry['seconds'])}"
            )

    def _at(self, entry: dict[str, Any]) -> str:
        return f"step {entry['step']:>{len(str(self._steps))}}/{self._steps}"

    def _print(self, line: str) -> None:
        print(line, flush=True)


class NoDisplay(PlainDisplay):
    """Says nothing, as the processes behind a run's first."""

    def _print(self, line: str) -> None:
        """Prints nothing."""


def title(header: dict[str, Any]) -> str:
    """What runs, from the header of its log."""
    config, machine = header["config"], header["machine"]
    threads = "" if machine["peak_memory_of"] == "device" else f", {machine['threads']} threads"
    return (
        f"{config['preset']} Llama, {header['parameters'] / 1e6:.1f} M parameters, {config['optimizer']}, "
        f"{config['dtype']} on {machine['device']} ({machine['name']}{threads})"
    )


def describe_subspaces(entry: dict[str, Any]) -> str:
    """The layers' means of captured energy and overlap where bases are found, and the range of their intervals."""
    captured, overlaps, intervals = (
        [layer[key] for layer in entry["layers"].values() if layer[key] is not None]
        for key in ("captured", "overlap", "interval")
    )
    low, high = min(intervals), max(intervals)
    interval = f"interval {low}" if low == high else f"interval {low} to {high}"
    if not captured:
        return f"drawn at random  {interval}"
    overlap = _mean(overlaps) if overlaps else math.nan
    return f"captured {_mean(captured):.3f}  overlap {overlap:.2f}  {interval}"


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def time_left(entry: dict[str, Any], steps: int) -> float:
    """Seconds that the rest of ``steps`` takes at the pace so far."""
    return float(entry["seconds"] / entry["step"] * (steps - entry["step"]))


def format_bytes(count: float) -> str:
    """1536000 -> "1.54 MB" (powers of 1000, as papers give memory)."""
    for unit in ("B", "kB", "MB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} GB" if count < 999.5 else f"{count:,.0f} GB"


def format_seconds(seconds: float) -> str:
    """75 -> "1:15", 3700 -> "1:01:40"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
