"""The processes of a run: what ``torchrun`` starts, each with its share of every batch."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from galore_kernels.distributed import reduce_lowrank

from .config import GALORE, Config, PretrainError

__all__ = ["ALONE", "PARALLEL", "Processes", "own_part", "processes"]

PARALLEL = ("none", "ddp", "fsdp2")

#: What a process waits for the others: more than the first one takes to save a checkpoint.
TIMEOUT = timedelta(minutes=30)

#: Of a run whose parameters are divided; the rest needs more of a parameter, or of a layer, than a part.
_DIVISIBLE = {
    "optimizer": ("galore8bit", "galore", "adamw"),
    "proj_type": ("std", "reverse_std", "left", "right"),
    "moments_on_refresh": ("keep", "rotate"),
    "gradients": ("dense",),
    "updates": ("whole",),
    "weights": ("float",),
}


@dataclass(frozen=True)
class Processes:
    """This process among those of the run. The first alone displays, logs and saves."""

    rank: int = 0
    world: int = 1
    parallel: str = "none"

    @property
    def is_first(self) -> bool:
        """Whether it is the first."""
        return self.rank == 0

    @property
    def divides(self) -> bool:
        """Whether each has a part of every parameter (FSDP2's DTensors)."""
        return self.parallel == "fsdp2"

    def divide(self, model: Any, device: torch.device) -> None:
        """Before its optimizer is made: leaves each process its part of the parameters, if that is how they train."""
        if not self.divides:
            return
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(device.type, (self.world,))
        for block in model.model.layers:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)

    def wrap(self, model: torch.nn.Module, optimizer: Any, config: Config) -> torch.nn.Module:
        """The model as it is trained. Under DDP GaLore's dense gradients are averaged as projections."""
        if self.parallel != "ddp":
            return model
        wrapped = DistributedDataParallel(model)
        if config.optimizer in GALORE and config.gradients == "dense" and config.weights == "float":
            reduce_lowrank(wrapped, optimizer)
        return wrapped

    def share(self, rows: Tensor) -> Tensor:
        """This process' rows of a batch, as many as each of the others has: all of them if there is a remainder."""
        return rows if len(rows) % self.world else rows[self.rank :: self.world]

    @contextlib.contextmanager
    def accumulates(self, model: Any, *, last: bool) -> Iterator[None]:
        """The context of a backward pass; only in the last of a step gradients are averaged."""
        if self.divides:
            model.set_requires_gradient_sync(last)
        with model.no_sync() if self.parallel == "ddp" and not last else contextlib.nullcontext():
            yield

    @contextlib.contextmanager
    def evaluates(self, model: Any) -> Iterator[None]:
        """The context of forward passes without backward passes, which leave gathered what is divided."""
        model.eval()
        with torch.no_grad():
            yield
        model.train()
        if self.divides:
            model.reshard()

    def mean(self, loss: Tensor) -> float:
        """The mean of all processes' losses, the same number everywhere."""
        if self.world > 1:
            dist.all_reduce(loss)
        return float(loss) / self.world

    def largest(self, number: int) -> int:
        """The largest of all processes' numbers."""
        if self.world == 1:
            return number
        largest = torch.tensor([number])
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return int(largest)


ALONE = Processes()


@contextlib.contextmanager
def processes(parallel: str, config: Config, device: torch.device) -> Iterator[Processes]:
    """The processes that ``torchrun`` has started, or this one alone.

    Raises:
        PretrainError: ``torchrun`` without ``--parallel``, or the other way round; a batch that can't be shared, or an
            option that can't be divided; another process has ended.
    """
    started = "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1
    if parallel == "none":
        if started:
            raise PretrainError("torchrun has started several processes: add --parallel ddp or fsdp2, or start one")
        yield ALONE
        return
    if not started:
        raise PretrainError(f"--parallel {parallel}: expected processes of torchrun: torchrun --nproc-per-node 2 ...")
    if device.type != "cpu":
        raise PretrainError(f"--parallel {parallel}: expected --device cpu, got {device}: on GPUs it is not tested yet")
    if parallel == "fsdp2":
        _expect_divisible(config)
    try:
        dist.init_process_group("gloo", timeout=TIMEOUT)
        found = Processes(dist.get_rank(), dist.get_world_size(), parallel)
        if config.batch % found.world:
            raise PretrainError(
                f"--batch {config.batch}: expected a multiple of the number of processes, {found.world}"
            )
        yield found
    except RuntimeError as error:
        if isinstance(error, PretrainError) or not _tells_of_another(error):
            raise
        cause = str(error).partition("\n")[0].partition(". ")[0]
        raise PretrainError(
            f"another process of the run has ended, or doesn't answer ({cause}): see what it has said; start the "
            "processes again, in any number, with --resume, which goes on from the last checkpoint"
        ) from error
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def own_part(tensor: Tensor) -> Tensor:
    """What this process has of a tensor: all of it, but of a DTensor."""
    part: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return part


def _expect_divisible(config: Config) -> None:
    for key, accepted in _DIVISIBLE.items():
        value = getattr(config, key)
        if value not in accepted:
            raise PretrainError(
                f"--parallel fsdp2: expected --{key.replace('_', '-')} {' or '.join(accepted)}, got {value}, which "
                "needs more than the part of a parameter that each process has; choose one of these, or --parallel ddp"
            )


def _tells_of_another(error: RuntimeError) -> bool:
    """Whether it is that of a collective: gloo's have no class of their own."""
    return isinstance(error, dist.DistError) or "gloo" in str(error).lower()
