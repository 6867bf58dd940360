"""Processes of a test: each calls ``work`` of a module beside the tests, and leaves what it found in a file."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def run(module: str, folder: Path, world: int, *arguments: Any, timeout: float = 240) -> list[Any]:
    """What each of the processes has ended with: ``module.work(rank, world, folder, *arguments)``."""
    # Where the tests find the package, whether it is installed or on a path.
    program = f"import sys; sys.path[:] = {sys.path!r}; import {module} as own; "
    rest = "".join(f", {argument!r}" for argument in arguments)
    commands = [
        [sys.executable, "-c", f"{program}own.work({rank}, {world}, {str(folder)!r}{rest})"] for rank in range(world)
    ]
    workers = [subprocess.Popen(command) for command in commands]
    try:
        assert [worker.wait(timeout=timeout) for worker in workers] == [0] * world
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]


def difference(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    """The largest relative difference of two models' weights, tensor by tensor."""
    return max(float((first[name] - second[name]).norm() / second[name].norm()) for name in second)


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []
