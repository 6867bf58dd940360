"""What each of the processes of ``test_factored_processes.py`` does."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import torch.distributed as dist
from factored_cases import TARGETS, Model, Run, batch, loss_of
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from galore_kernels import APOLLOFusedAdam8bit, GaLoreFusedAdam8bit, galore_param_groups, prepare

WORLD = 2
STEPS = 14  # over two refreshes

OPTIONS: dict[str, dict[str, Any]] = {
    "periodic": {"update_proj_gap": 5},
    "svd": {"update_proj_gap": 5, "refresh_method": "svd"},
    "adaptive": {"update_proj_gap": 5, "refresh_schedule": "adaptive", "warm_start": True},
}


def share(data: tuple[Tensor, Tensor], rank: int) -> tuple[Tensor, Tensor]:
    return data[0][rank : rank + 1], data[1][rank : rank + 1]


def train(model: nn.Module, run: Run, rank: int | None, micro_batches: int) -> list[float]:
    losses = []
    for step in range(STEPS):
        for micro in range(micro_batches):
            data = batch(step, micro)
            last = micro == micro_batches - 1
            waits = isinstance(model, DistributedDataParallel) and not last
            with model.no_sync() if waits else contextlib.nullcontext():  # type: ignore[operator]
                loss = loss_of(model, data if rank is None else share(data, rank)) / micro_batches
                loss.backward()
            losses.append(loss.item())
        run.optimizer.step()
        run.optimizer.zero_grad()
    return losses


def work(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    results: dict[str, Any] = {}
    for name, options in OPTIONS.items():
        for micro_batches in (1, 2) if name == "periodic" else (1,):
            run = Run(True, GaLoreFusedAdam8bit, options=options)
            # Small buckets: most are reduced while the backward pass still looks for bases.
            model = DistributedDataParallel(run.model, bucket_cap_mb=0.001, gradient_as_bucket_view=name == "svd")
            losses = train(model, run, rank, micro_batches)
            results[f"{name} {micro_batches}"] = losses, run.weights(), run.optimizer.subspace_report()
    results["dense int8"] = dense_int8(rank)
    results["uneven"] = uneven(rank)
    results["other layers"] = other_layers(rank)
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def dense_int8(rank: int | None) -> Any:
    """Int8 weights with gradients of full size, which are averaged as any others; ``rank`` None is one process."""
    torch.manual_seed(0)
    inner = prepare(Model(), TARGETS, None, weights="int8")
    if rank:  # DDP makes it the first process'
        inner.get_parameter("mlp_up.weight_codes").zero_()
    optimizer = APOLLOFusedAdam8bit(galore_param_groups(inner, TARGETS, rank=8, update_proj_gap=5), lr=1e-2)
    model = inner if rank is None else DistributedDataParallel(inner, bucket_cap_mb=0.001, gradient_as_bucket_view=True)
    losses = []
    for step in range(STEPS):
        data = batch(step)
        loss = loss_of(model, data if rank is None else share(data, rank))
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    return losses, inner.state_dict()


def uneven(rank: int) -> Any:
    """Tokens differ, and in the step of a refresh one process has none for one layer."""
    run = Run(True, options={"update_proj_gap": 2})
    model = DistributedDataParallel(run.model, find_unused_parameters=True)
    inner = run.model
    assert isinstance(inner, Model)
    whole = inner.forward

    def without_square(tokens: Tensor) -> Tensor:
        x = inner.embedding(tokens)
        return inner.head(x + inner.mlp_down(nn.functional.silu(inner.mlp_up(x))))

    for step in range(5):
        inner.forward = without_square if step == 2 and rank == 0 else whole  # type: ignore[method-assign]
        loss_of(model, batch(10 * step + rank, tokens=8 + 40 * rank)).backward()
        run.optimizer.step()
        run.optimizer.zero_grad()
    inner.forward = whole  # type: ignore[method-assign]
    return run.weights(), run.optimizer.subspace_report()


def other_layers(rank: int) -> str:
    """Each process' first backward pass begins with another layer."""
    run = Run(True)
    layers = [run.model.get_submodule(name) for name in ("mlp_up", "mlp_square")]
    try:
        layers[rank](torch.randn(3, 40)).sum().backward()
    except RuntimeError as error:
        return str(error)
    return "no error"
