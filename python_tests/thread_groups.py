"""Threads that stand for processes, and all-reduces between them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class Threads:
    """All-reduces between as many threads; ``numbers``: of elements in those of the first."""

    def __init__(self, count: int) -> None:
        self._barrier, self._given = threading.Barrier(count, timeout=5), [torch.empty(0)] * count
        self.numbers: list[int] = []

    def of(self, rank: int) -> Any:
        def all_reduce(tensor: Tensor, *, largest: bool = False) -> None:
            self._given[rank] = tensor.clone()
            if rank == 0:
                self.numbers.append(tensor.numel())
            self._barrier.wait()
            together = torch.stack(self._given)
            self._barrier.wait()
            tensor.copy_(together.amax(0) if largest else together.sum(0))

        return all_reduce


def in_threads(work: Callable[[int, Any], T], count: int, threads: Threads | None = None) -> list[T]:
    """What ``work`` of a rank and its all-reduce returns, of each rank."""
    group, found = threads or Threads(count), {}

    def run(rank: int) -> None:
        found[rank] = work(rank, group.of(rank))

    workers = [threading.Thread(target=run, args=(rank,)) for rank in range(count)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return [found[rank] for rank in range(count)]
