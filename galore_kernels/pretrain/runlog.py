"""The log of a run: one JSON object a line.

``{"kind": "header"}`` first (configuration, versions, parameter count), then ``train`` lines (means over the steps
since the one before), ``validation`` lines, a ``resume`` line wherever the run was continued, and ``final`` last.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from .config import PretrainError

__all__ = ["LOG_NAME", "RunLog", "read_log"]

LOG_NAME = "log.jsonl"


class RunLog:
    """Appends lines, each flushed as it is written; a kill can cut the last line short, never an earlier one."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    @classmethod
    def begin(cls, folder: Path, header: dict[str, Any]) -> RunLog:
        """Start the log of a new run with its header."""
        path = folder / LOG_NAME
        temporary = path.with_name(path.name + ".tmp")
        # By a rename: a kill in between must not leave a log without its header among the runs.
        with cls(temporary.open("w", encoding="utf-8")) as log:
            log.write("header", **header)
        os.replace(temporary, path)
        return cls(path.open("a", encoding="utf-8"))

    @classmethod
    def resume(cls, folder: Path, step: int) -> RunLog:
        """Continue the log of a run from ``step``: later lines, which will be written again, are dropped."""
        path = folder / LOG_NAME
        kept = [
            line for line in read_log(path)
            if line["kind"] == "header" or (line["step"] <= step and line["kind"] != "final")
        ]  # fmt: skip
        temporary = path.with_name(path.name + ".tmp")
        with open(temporary, "w", encoding="utf-8") as file:
            file.writelines(map(_line, kept))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        return cls(path.open("a", encoding="utf-8"))

    def write(self, kind: str, **values: Any) -> dict[str, Any]:
        """Append one line and return it as a dict."""
        entry = {"kind": kind, **values}
        self._file.write(_line(entry))
        self._file.flush()
        return entry

    def sync(self) -> None:
        """Put all lines on the disk: done before a checkpoint, whose step promises that they are there."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def read_log(path: Path) -> list[dict[str, Any]]:
    """Lines of a log as dicts, header first; an incomplete last line (of a run that was killed) is left out.

    Raises:
        PretrainError: there is no log, or a line of it is no JSON object.
    """
    if not path.exists():
        raise PretrainError(f'there is no log "{path}"; give the folder of a run')
    text = path.read_text(encoding="utf-8")
    complete = text[: text.rfind("\n") + 1].splitlines()
    entries = [_parse(line, number, path) for number, line in enumerate(complete, start=1)]
    if not entries or entries[0]["kind"] != "header":
        raise PretrainError(f'"{path}": expected a header in the first line; the file is no log of a run')
    return entries


def _parse(line: str, number: int, path: Path) -> dict[str, Any]:
    try:
        entry = json.loads(line)
        if not isinstance(entry, dict) or "kind" not in entry:
            raise ValueError("not an object with a kind")
    except ValueError as error:
        raise PretrainError(
            f'"{path}", line {number}: {error}; restore the file, or remove that line if you know why it is there'
        ) from error
    return entry


def _line(entry: dict[str, Any]) -> str:
    return json.dumps(entry, allow_nan=False) + "\n"


def series(entries: Iterable[dict[str, Any]], kind: str, key: str) -> tuple[list[int], list[float]]:
    """Steps and values of one quantity of the lines of one kind."""
    chosen = [entry for entry in entries if entry["kind"] == kind]
    return [entry["step"] for entry in chosen], [entry[key] for entry in chosen]
