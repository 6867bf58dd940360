"""Keeps ``gpu_measure.py`` going: starts it again without whatever has taken it down, or made it stand still."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gpu_processes
from gpu_stages import BENCH, Workplace

#: Without any progress for so long, what is being tried hangs. Compiling a chain of torch calls is the longest step.
STALLED_SECONDS = 150.0
#: Bad implementations that a run puts up with.
MOST_RESTARTS = 6


class Measurement:
    """The measuring process, watched.

    Args:
        seconds: for everything. changed: called with the state whenever there is more of it.
    """

    def __init__(self, place: Workplace, seconds: float, changed: Callable[[dict[str, Any]], None]) -> None:
        self._place, self._changed = place, changed
        self._deadline = time.monotonic() + seconds
        self.state_file = place.folder / "state.json"
        self._now_file = self.state_file.with_suffix(".now")
        self._seen = 0.0
        self.stalled_seconds = STALLED_SECONDS

    def state(self) -> dict[str, Any]:
        """What has been measured."""
        if not self.state_file.exists():
            return {"units": {}, "without": {}}
        return dict(json.loads(self.state_file.read_text()))

    def _watch(self) -> str | None:
        if self.state_file.exists() and (modified := self.state_file.stat().st_mtime) != self._seen:
            self._seen = modified
            self._changed(self.state())
        last = max(path.stat().st_mtime for path in (self._now_file, self._place.folder) if path.exists())
        if time.time() - last > self.stalled_seconds:
            return f"made no progress for {self.stalled_seconds:.0f} s"
        return None

    def _blame(self, reason: str) -> str:
        """Leaves out what was being tried, or the unit where that is all that is known."""
        now = json.loads(self._now_file.read_text()) if self._now_file.exists() else {"unit": "limits", "entry": None}
        state = self.state()
        if now["entry"] is None or now["entry"] in state["without"].get(now["unit"], {}):
            state["units"][now["unit"]] = {"status": "failed", "reason": reason, "seconds": 0.0}
        else:
            state["without"].setdefault(now["unit"], {})[now["entry"]] = reason
        self.state_file.write_text(json.dumps(state, indent=1))
        return f"{now['unit']}: {now['entry']}: {reason}"

    def run(self) -> dict[str, Any]:
        """The stage's result; the units are in the state."""
        blamed: list[str] = []
        command: list[str | Path] = [sys.executable, BENCH / "gpu_measure.py", self.state_file]
        if self._place.plan.dry_run:
            command.append("--dry-run")
        while len(blamed) <= MOST_RESTARTS:
            name = f"measure {len(blamed)}"
            ended = gpu_processes.run(
                command,
                log=self._place.log(name),
                environment=self._place.environment(),
                folder=self._place.folder,
                seconds=self._deadline - time.monotonic(),
                watch=self._watch,
            )
            self._changed(self.state())
            result = {"restarted_without": blamed, "output": ended.tail}
            if ended.status == 0:
                return {"status": "ok", **result}
            if time.monotonic() > self._deadline:
                return {"status": "incomplete", "reason": f"out of time; {ended.stopped}", **result}
            reason = ended.stopped or f"took the process down (exit status {ended.status}): {_last_error(ended.tail)}"
            blamed.append(self._blame(reason))
            self._changed(self.state())
        return {"status": "failed", "reason": f"restarted {MOST_RESTARTS} times", **result}


def _last_error(output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if "rror" in line]
    return lines[-1][:300] if lines else "no message"
