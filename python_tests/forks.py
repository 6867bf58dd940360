"""Processes forked from a test: their imports are done, unlike those of a new interpreter."""

from __future__ import annotations

import os
import signal
import socket
import time
import traceback
import warnings
from collections.abc import Callable

import torch


def fork(work: Callable[[], int]) -> int:
    """A child whose exit status is what ``work`` returns, or 70 if that raises; returns its process id."""
    with warnings.catch_warnings():  # Python 3.12 warns of forking beside idle threads; the child uses none of them
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child:
        return child
    status = 70
    try:
        torch.set_num_threads(1)
        status = work()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def exit_status(child: int) -> int:
    """What the child returned, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def run_ranks(world: int, work: Callable[[int], int], timeout: float = 60) -> list[int]:
    """The exit statuses of ``work(rank)`` in so many processes, which meet as those of torchrun do.

    What has not ended after ``timeout`` seconds fails the test.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def of_rank(rank: int) -> int:
        meeting = {"RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update({key: str(value) for key, value in meeting.items()})
        return work(rank)

    children = [fork(lambda rank=rank: of_rank(rank)) for rank in range(world)]  # type: ignore[misc]
    statuses: dict[int, int] = {}
    deadline = time.monotonic() + timeout
    try:
        while len(statuses) < world and time.monotonic() < deadline:
            for child in set(children) - set(statuses):
                ended, status = os.waitpid(child, os.WNOHANG)
                if ended:
                    statuses[child] = os.waitstatus_to_exitcode(status)
            time.sleep(0.01)
    finally:
        for child in set(children) - set(statuses):
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    assert len(statuses) == world, f"after {timeout} s only {len(statuses)} of {world} processes had ended"
    return [statuses[child] for child in children]
