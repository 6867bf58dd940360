"""What each of the processes of ``test_wrapped_processes.py`` does."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from factored_cases import TARGETS, Model, loss_of
from lowrank_ddp_process import backward, raised, samples
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel

from galore_kernels import GaLoreFusedAdamW, galore_param_groups

STEPS = 8


def made(model: nn.Module) -> GaLoreFusedAdamW:
    return GaLoreFusedAdamW(galore_param_groups(model, TARGETS, rank=8, update_proj_gap=3), lr=1e-2)


def new_model() -> Model:
    torch.manual_seed(0)
    return Model()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        backward(model, step)
        optimizer.step()
        optimizer.zero_grad()


# ---------------------------------------------------------------------- DDP


def ddp(rank: int) -> dict[str, Any]:
    """The weights of optimizers that were made before and after the wrapping; checkpoints go from each to the other."""
    inner = new_model()
    before = made(inner)
    train(DistributedDataParallel(inner), before, range(STEPS))
    weights = {"before": inner.state_dict()}

    inner = new_model()
    model = DistributedDataParallel(inner)
    after = made(model)
    train(model, after, range(STEPS // 2))
    saved = copy.deepcopy((inner.state_dict(), after.state_dict()))
    train(model, after, range(STEPS // 2, STEPS))
    weights["after"] = inner.state_dict()

    inner = new_model()
    resumed = made(inner)
    model = DistributedDataParallel(inner)
    inner.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    train(model, resumed, range(STEPS // 2, STEPS))
    weights["resumed before"] = inner.state_dict()
    return weights


def train_alone() -> dict[str, Any]:
    """One process with the samples of both."""
    model = new_model()
    optimizer = made(model)
    for step in range(STEPS):
        loss_of(model, samples(step, 0)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.state_dict()


# ---------------------------------------------------------------------- FSDP1


def fsdp1(rank: int) -> dict[bool, dict[str, str]]:
    return {use_orig_params: fsdp1_errors(use_orig_params) for use_orig_params in (False, True)}


def fsdp1_errors(use_orig_params: bool) -> dict[str, str]:
    """The messages: of an optimizer made after the wrapping, of one made before, of one that has been used before."""

    def wrapped(model: nn.Module) -> nn.Module:
        return FullyShardedDataParallel(model, use_orig_params=use_orig_params, device_id=torch.device("cpu"))

    model = wrapped(new_model())
    messages = {
        "after": raised(ValueError, lambda: GaLoreFusedAdamW(model.named_parameters(), rank=8)),
        "after, groups": raised(ValueError, lambda: made(model)),
    }
    for steps in (0, 2):
        inner = new_model()
        optimizer = made(inner)
        train(inner, optimizer, range(steps))
        model = wrapped(inner)
        backward(model, steps)
        shard = [param.detach().clone() for param in model.parameters()]
        messages[f"before, {steps}"] = raised(ValueError if use_orig_params else RuntimeError, optimizer.step)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), shard, strict=True))
    return messages


# ---------------------------------------------------------------------- Accelerate


def accelerate(rank: int) -> dict[str, Any]:
    """Weights at the end, and after a return to a checkpoint; before ``prepare`` as everywhere."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    inner = new_model()
    model, optimizer = accelerator.prepare(inner, made(inner))

    def steps(numbers: range) -> None:
        for step in numbers:
            inputs, targets = samples(step, 0)
            accelerator.backward(loss_of(model, (inputs[rank::2], targets[rank::2])))
            optimizer.step()
            optimizer.zero_grad()

    steps(range(STEPS // 2))
    accelerator.save_state(f"{FOLDER[0]}/accelerate")
    steps(range(STEPS // 2, STEPS))
    whole = copy.deepcopy(inner.state_dict())
    accelerator.load_state(f"{FOLDER[0]}/accelerate")
    steps(range(STEPS // 2, STEPS))
    return {
        "kind": (accelerator.distributed_type.value, accelerator.num_processes, type(model).__name__),
        "whole": whole,
        "resumed": inner.state_dict(),
    }


# ---------------------------------------------------------------------- DeepSpeed


def zero(rank: int) -> dict[str, Any]:
    """The weights of stage 0 in float32 and bfloat16; of the others the messages, and whether nothing has changed."""
    os.environ |= {"DS_ACCELERATOR": "cpu"}
    import deepspeed

    def engine_of(model: nn.Module, stage: int, dtype: torch.dtype) -> Any:
        config = {
            "train_micro_batch_size_per_gpu": 4,
            "gradient_clipping": 0.0,  # which is 1.0 unless it is said
            "zero_optimization": {"stage": stage},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "bf16": {"enabled": dtype == torch.bfloat16},
        }
        optimizer = made(model)
        return deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)[0]

    def step(engine: Any, number: int) -> None:
        inputs, targets = samples(number, 0)
        engine.backward(loss_of(engine, (inputs[rank::2], targets[rank::2])))
        engine.step()

    results: dict[str, Any] = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = new_model()
        engine = engine_of(model, 0, dtype)
        for number in range(STEPS):
            step(engine, number)
        results[str(dtype).removeprefix("torch.")] = {
            name: weight.float() for name, weight in model.state_dict().items()
        }
    for stage in (1, 2, 3):
        model = new_model()
        engine = engine_of(model, stage, torch.float32)
        before = [param.detach().clone() for param in model.parameters()]
        results[f"stage {stage}"] = raised(ValueError, partial(step, engine, 0))
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
    with deepspeed.zero.Init(
        config_dict_or_path={"train_micro_batch_size_per_gpu": 4, "zero_optimization": {"stage": 3}}
    ):
        partitioned = Model()
    results["made partitioned"] = raised(ValueError, lambda: GaLoreFusedAdamW(partitioned.named_parameters(), rank=8))
    model = new_model()
    engine = engine_of(model, 2, torch.float32)
    results["made afterwards"] = raised(ValueError, lambda: GaLoreFusedAdamW(engine.named_parameters(), rank=8))
    return results


FOLDER: list[str] = []
PARTS: dict[str, Callable[[int], Any]] = {
    "ddp": ddp,
    "fsdp1": fsdp1,
    "accelerate": accelerate,
    "zero": zero,
}


def work(rank: int, world: int, folder: str, parts: list[str]) -> None:
    """A process: what it saw in each part."""
    FOLDER.append(folder)
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world, timeout=timedelta(seconds=60)
    )
    torch.save({part: PARTS[part](rank) for part in parts}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()
