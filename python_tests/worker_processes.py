"""Processes that a test starts, and what they end with."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import torch


def run(module: str, world: int, folder: Path, *arguments: object, timeout: float = 240) -> list[Any]:
    """Calls ``work(rank, *arguments)`` of ``module`` in each of ``world`` processes.

    Returns what they have saved as ``folder/RANK.pt``, when all have ended well.
    """
    # Where the tests find the package, whether it is installed or on a path.
    program = f"import sys; sys.path[:] = {sys.path!r}; import {module} as own; "
    commands = [[sys.executable, "-c", f"{program}own.work({rank}, *{arguments!r})"] for rank in range(world)]
    workers = [subprocess.Popen(command) for command in commands]
    try:
        assert [worker.wait(timeout=timeout) for worker in workers] == [0] * world
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]
