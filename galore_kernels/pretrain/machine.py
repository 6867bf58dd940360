"""The process and its machine: who trains in a folder, which signal arrived, what memory was used."""

from __future__ import annotations

import contextlib
import fcntl
import os
import platform
import resource
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch

from .config import PretrainError

__all__ = ["SignalWatch", "machine_facts", "peak_memory", "sole_trainer"]


@contextlib.contextmanager
def sole_trainer(folder: Path) -> Iterator[None]:
    """Hold ``folder`` for this process: two would interleave their logs and delete each other's checkpoints.

    Raises:
        PretrainError: another process holds it. (A killed process holds nothing.)
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise PretrainError(
                f"another process is training in {folder}: wait for it, or give this run its own --name"
            ) from error
        yield
    finally:
        os.close(descriptor)


class SignalWatch:
    """Remembers SIGINT or SIGTERM, so that the step can be finished and saved; a second one takes effect at once."""

    received: int | None = None

    def __enter__(self) -> SignalWatch:
        self._previous: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        self._restore()

    def _restore(self) -> None:
        while self._previous:
            signal.signal(*self._previous.popitem())


def machine_facts(device: torch.device) -> dict[str, Any]:
    """What a log says about where its run was made; ``peak_memory_of`` names what :func:`peak_memory` measures."""
    cuda = device.type == "cuda"
    return {
        "device": str(device),
        "name": torch.cuda.get_device_name(device) if cuda else platform.machine(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "peak_memory_of": "device" if cuda else "process",
    }


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that torch has allocated on a CUDA device, or the largest resident size of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
