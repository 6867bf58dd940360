"""Processes of a test that find one another through a file."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import torch


def run(module: str, folder: Path, world: int, tasks: list[str]) -> list[dict[str, Any]]:
    """What each of the processes has ended with, which ``work`` of a module of tests has saved."""
    program = f"import sys; sys.path[:] = {sys.path!r}; import {module} as own; "
    commands = [
        [sys.executable, "-c", f"{program}own.work({rank}, {world}, {str(folder)!r}, {tasks!r})"]
        for rank in range(world)
    ]
    workers = [subprocess.Popen(command) for command in commands]
    try:
        assert [worker.wait(timeout=400) for worker in workers] == [0] * world
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    return [torch.load(folder / f"{world}-{rank}.pt", weights_only=False) for rank in range(world)]
