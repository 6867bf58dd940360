"""Processes with a time limit, whose output goes to a file, and of which nothing is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_TAIL = 4000
_PERIOD = 0.2


@dataclass(frozen=True)
class Ended:
    """How a process ended: its exit status, or None with the reason why it was stopped."""

    status: int | None
    output: str
    stopped: str = ""

    @property
    def tail(self) -> str:
        """The end of what it has printed."""
        return self.output[-_TAIL:]


def run(
    command: Sequence[str | Path],
    *,
    log: Path,
    environment: Mapping[str, str],
    folder: Path,
    seconds: float,
    watch: Callable[[], str | None] = lambda: None,
) -> Ended:
    """Runs a command, with all it starts.

    Args:
        log: where its output goes. folder: where it runs.
        seconds: after so many it is killed. watch: called all the while; a reason that it returns has it killed.
    """
    with log.open("wb") as output:
        process = subprocess.Popen(
            [str(part) for part in command],
            cwd=folder,
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a group of its own, to be killed with its children
        )
        deadline, stopped = time.monotonic() + seconds, ""
        try:
            while process.poll() is None and not stopped:
                time.sleep(_PERIOD)
                late = f"stopped after {seconds:.0f} s" if time.monotonic() > deadline else ""
                stopped = watch() or late
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    return Ended(None if stopped else process.returncode, log.read_text(errors="replace"), stopped)
