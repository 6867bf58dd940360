"""The processes of a run: what ``torchrun`` starts, each with its share of every batch."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from galore_kernels.distributed import reduce_lowrank

from .config import GALORE, Config, PretrainError

__all__ = ["ALONE", "PARALLEL", "Processes", "processes"]

PARALLEL = ("none", "ddp")


@dataclass(frozen=True)
class Processes:
    """This process among those of the run. The first alone displays, logs and saves."""

    rank: int = 0
    world: int = 1

    @property
    def is_first(self) -> bool:
        """Whether it is the first."""
        return self.rank == 0

    def wrap(self, model: torch.nn.Module, optimizer: Any, config: Config) -> torch.nn.Module:
        """The model as it is trained. GaLore's dense gradients are averaged as projections."""
        if self.world == 1:
            return model
        wrapped = DistributedDataParallel(model)
        if config.optimizer in GALORE and config.gradients == "dense" and config.weights == "float":
            reduce_lowrank(wrapped, optimizer)
        return wrapped

    def share(self, rows: Tensor) -> Tensor:
        """This process' rows of a micro-batch."""
        return rows[self.rank :: self.world]

    def waits(self, model: torch.nn.Module, *, last: bool) -> contextlib.AbstractContextManager[Any]:
        """The context of a backward pass; only in the last of a step gradients are averaged."""
        if last or not isinstance(model, DistributedDataParallel):
            return contextlib.nullcontext()
        context: contextlib.AbstractContextManager[Any] = model.no_sync()
        return context

    def mean(self, loss: Tensor) -> float:
        """The mean of all processes' losses, the same number everywhere."""
        if self.world > 1:
            dist.all_reduce(loss)
        return float(loss) / self.world

    def agree(self, number: int | None) -> int | None:
        """A signal's number if any process has received one."""
        if self.world == 1:
            return number
        largest = torch.tensor([number or 0])
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return int(largest) or None


ALONE = Processes()


@contextlib.contextmanager
def processes(parallel: str, batch: int, device: torch.device) -> Iterator[Processes]:
    """The processes that ``torchrun`` has started, or this one alone.

    Raises:
        PretrainError: ``torchrun`` without ``--parallel``, or the other way round; a batch that can't be shared.
    """
    started = "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1
    if parallel == "none":
        if started:
            raise PretrainError("torchrun has started several processes: add --parallel ddp, or start one")
        yield ALONE
        return
    if not started:
        raise PretrainError(f"--parallel {parallel}: expected processes of torchrun: torchrun --nproc-per-node 2 ...")
    if device.type != "cpu":
        raise PretrainError(f"--parallel {parallel}: expected --device cpu, got {device}: on GPUs it is not tested yet")
    dist.init_process_group("gloo")
    try:
        found = Processes(dist.get_rank(), dist.get_world_size())
        if batch % found.world:
            raise PretrainError(f"--batch {batch}: expected a multiple of the number of processes, {found.world}")
        yield found
    finally:
        dist.destroy_process_group()
