"""The live display on a terminal: a progress bar over the run's figures and its loss curve, redrawn in place."""

from __future__ import annotations

import itertools
from types import TracebackType
from typing import Any

from .config import PretrainError
from .display import describe_subspaces, format_bytes, format_seconds, time_left, title

try:
    from rich.console import Console, Group
    from rich.live import Live
    from rich.panel import Panel
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.table import Table
    from rich.text import Text
except ImportError as error:
    raise PretrainError(
        "the live display needs the package rich: pip install rich (or send the output through a pipe, for plain lines)"
    ) from error

__all__ = ["LiveDisplay", "sparkline"]

_BARS = "▁▂▃▄▅▆▇█"
_COLUMNS = 4


class LiveDisplay:
    """A panel that shows the latest of everything; the final state stays on the screen."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console()
        self._bar = Progress(TextColumn("[bold]step"), BarColumn(bar_width=None), MofNCompleteColumn(), expand=True)
        self._live = Live(console=self._console, refresh_per_second=4)
        self._losses: list[float] = []
        self._train: dict[str, Any] = {}
        self._validation = "-"
        self._subspaces = "-"
        self._saved = "-"

    def __enter__(self) -> LiveDisplay:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def start(self, header: dict[str, Any], step: int) -> None:
        """Draw the panel."""
        self._header = header
        self._steps = int(header["config"]["steps"])
        self._task = self._bar.add_task("", total=self._steps, completed=step)
        self._live.update(self._panel())

    def show(self, entry: dict[str, Any]) -> None:
        """Redraw the panel with one more line of the log."""
        if entry["kind"] == "train":
            self._train = entry
            self._losses.append(entry["loss"])
            self._bar.update(self._task, completed=entry["step"])
        elif entry["kind"] == "validation":
            self._validation = f"{entry['loss']:.4f} (step {entry['step']})"
        elif entry["kind"] == "subspaces":
            self._subspaces = describe_subspaces(entry)
        elif entry["kind"] == "saved":
            self._saved = entry["path"]
        self._live.update(self._panel())

    def _panel(self) -> Panel:
        figures = Table.grid(padding=(0, 2), expand=True)
        for _ in range(_COLUMNS):
            figures.add_column(ratio=1)
        cells = [Text.assemble((f"{name}\n", "dim"), (value, "bold")) for name, value in self._figures()]
        for begin in range(0, len(cells), _COLUMNS):
            figures.add_row(*cells[begin : begin + _COLUMNS])
        corpus = f"{self._header['corpus']['description']}, split by {self._header['config']['split']}"
        curve = sparkline(self._losses, max(10, self._console.width - 4))
        subspaces = Text(f"subspaces  {self._subspaces}", style="dim", no_wrap=True, overflow="ellipsis")
        checkpoint = Text(f"checkpoint  {self._saved}", style="dim", no_wrap=True, overflow="ellipsis")
        content = Group(Text(corpus, style="dim"), self._bar, figures, Text(curve, style="cyan"), subspaces, checkpoint)
        return Panel(content, title=title(self._header))

    def _figures(self) -> list[tuple[str, str]]:
        entry = self._train
        memory = f"peak memory ({self._header['machine']['peak_memory_of']})"
        return [
            ("loss", f"{entry['loss']:.4f}" if entry else "-"),
            ("validation loss", self._validation),
            ("learning rate", f"{entry['lr']:.2e}" if entry else "-"),
            ("tokens/s", f"{entry['tokens_per_second']:,.0f}" if entry else "-"),
            ("optimizer state", format_bytes(entry["optimizer_state_bytes"]) if entry else "-"),
            (memory, format_bytes(entry["peak_memory_bytes"]) if entry else "-"),
            ("elapsed", format_seconds(entry["seconds"]) if entry else "-"),
            ("left", format_seconds(time_left(entry, self._steps)) if entry else "-"),
        ]


def sparkline(values: list[float], width: int) -> str:
    """Values as a line of at most ``width`` bars, each the mean of its share of them."""
    if not values:
        return ""
    count = min(width, len(values))
    edges = [round(index * len(values) / count) for index in range(count + 1)]
    means = [sum(values[begin:end]) / (end - begin) for begin, end in itertools.pairwise(edges)]
    low, high = min(means), max(means)
    span = (high - low) or 1.0
    return "".join(_BARS[round((mean - low) / span * (len(_BARS) - 1))] for mean in means)
