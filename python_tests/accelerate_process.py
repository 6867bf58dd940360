"""What each of the processes of ``test_accelerate.py`` does."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, FullyShardedDataParallelPlugin, PartialState
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DistributedType
from factored_cases import TARGETS, loss_of
from fsdp_process import whole
from hf_models import RANK, arguments, llama, texts
from hf_models import TARGETS as LLAMA_TARGETS
from lowrank_ddp_process import Wide, counting, raised, samples
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from galore_kernels import APOLLOFusedAdamW, GaLoreFusedAdam8bit, GaLoreFusedAdamW, galore_param_groups, prepare
from galore_kernels.distributed import reduce_lowrank
from galore_kernels.integrations.huggingface import SubspaceCallback, trainer_optimizer

STEPS, HALF = 8, 4
MICRO = 2  # backward passes to a step
CLIP = 0.5


def new_model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return Wide()


def made(model: nn.Module, kind: Callable[..., Any] = GaLoreFusedAdamW, rank: int = 4) -> Any:
    return kind(galore_param_groups(model, TARGETS, rank=rank, update_proj_gap=3), lr=1e-2)


#: By the kind of state dict, the optimizer that it is tried with; 288 x 32 moments are 8-bit in halves too.
OPTIMIZERS: dict[str, Callable[[nn.Module], Any]] = {
    "SHARDED_STATE_DICT": made,
    "FULL_STATE_DICT": partial(made, kind=GaLoreFusedAdam8bit, rank=32),
}


def weights_of(model: nn.Module | None) -> dict[str, Tensor]:
    assert model is not None
    return {name: whole(param).clone() for name, param in model.named_parameters()}


def use_fsdp2(state: AcceleratorState, plugin: FullyShardedDataParallelPlugin) -> None:
    """What Accelerate does itself on every device but the CPU, where it takes no notice of the plugin."""
    assert state.distributed_type == DistributedType.MULTI_CPU
    assert not hasattr(state, "fsdp_plugin")
    state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    state.fsdp_plugin = plugin
    assert state.is_fsdp2


def new_accelerator(state_dict_type: str | None = None) -> Accelerator:
    """Of FSDP2 with that kind of state dict; without one of DDP."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    if state_dict_type is None:
        return Accelerator(cpu=True, gradient_accumulation_steps=MICRO)
    options = {"auto_wrap_policy": "no_wrap", "state_dict_type": state_dict_type}
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, **options)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=MICRO, fsdp_plugin=plugin)
    use_fsdp2(accelerator.state, plugin)
    return accelerator


def train(accelerator: Accelerator, model: nn.Module, optimizer: Any, steps: range, clip: float | None = CLIP) -> None:
    rank = accelerator.process_index
    for step in steps:
        for micro in range(MICRO):
            inputs, targets = samples(step, micro)
            with accelerator.accumulate(model):
                accelerator.backward(loss_of(model, (inputs[rank::2], targets[rank::2])))
                if accelerator.sync_gradients and clip is not None:
                    accelerator.clip_grad_norm_(model.parameters(), clip)
                optimizer.step()
                optimizer.zero_grad()


def train_alone(clip: float | None = CLIP) -> dict[str, Tensor]:
    """One process with the samples of both, and without Accelerate."""
    model = new_model()
    optimizer = made(model)
    for step in range(STEPS):
        for micro in range(MICRO):
            (loss_of(model, samples(step, micro)) / MICRO).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
    return weights_of(model)


# ---------------------------------------------------------------------- FSDP2


def fsdp2(folder: str) -> dict[str, Any]:
    """By the kind of state dict, what became of it."""
    return {kind: trained_fsdp2(f"{folder}/{kind}", kind) for kind in OPTIMIZERS}


def trained_fsdp2(checkpoint: str, state_dict_type: str) -> dict[str, Any]:
    """Weights at the end, after a return to a checkpoint, and those of another model that has loaded it."""
    accelerator, make = new_accelerator(state_dict_type), OPTIMIZERS[state_dict_type]
    inner = new_model()
    model, optimizer = accelerator.prepare(inner, make(inner))
    train(accelerator, model, optimizer, range(HALF))
    accelerator.save_state(checkpoint)
    train(accelerator, model, optimizer, range(HALF, STEPS))
    values = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    results: dict[str, Any] = {
        "parameters": {type(param).__name__ for group in optimizer.param_groups for param in group["params"]},
        "is 8-bit": torch.uint8 in {value.dtype for value in values},
        "refreshes": [entry["refreshes"] for entry in optimizer.optimizer.subspace_report().values()],
        "whole": weights_of(model),
    }
    accelerator.load_state(checkpoint)
    train(accelerator, model, optimizer, range(HALF, STEPS))
    results["returned"] = weights_of(model)
    accelerator.free_memory()
    inner = new_model(seed=1)
    model, optimizer = accelerator.prepare(inner, make(inner))
    accelerator.load_state(checkpoint)
    train(accelerator, model, optimizer, range(HALF, STEPS))
    return {**results, "resumed": weights_of(model)}


def refused(folder: str) -> dict[str, str]:
    """The messages: of what needs whole matrices, of prepared layers, of optimizers that it gets late or never."""

    def step(inner: nn.Module, optimizer: Any) -> None:
        accelerator = new_accelerator("SHARDED_STATE_DICT")
        model, optimizer = accelerator.prepare(inner, optimizer)
        train(accelerator, model, optimizer, range(1))

    def apollo() -> None:
        step(model := new_model(), made(model, APOLLOFusedAdamW))

    def prepared() -> None:
        step(model := prepare(new_model(), TARGETS, rank=4), made(model))

    def left_out() -> None:
        model = new_model()
        other = made(model)
        step(model, made(model))
        other.step()

    def trained_before() -> None:
        model = new_model()
        optimizer = made(model)
        loss_of(model, samples(0, 0)).backward()
        optimizer.step()
        optimizer.zero_grad()
        step(model, optimizer)

    errors = ValueError, RuntimeError
    return {call.__name__: raised(errors, call) for call in (apollo, prepared, left_out, trained_before)}


# ---------------------------------------------------------------------- DDP with reduce_lowrank


def reduced(folder: str) -> dict[str, Any]:
    """Weights with plain DDP, and with ``reduce_lowrank``; the message about Accelerate's wrapper."""
    found: dict[str, Any] = {}
    for name in ("plain", "reduced"):
        accelerator = new_accelerator()
        inner = new_model()
        model, optimizer = accelerator.prepare(inner, made(inner))
        if name == "reduced":
            found["wrapper"] = raised(TypeError, partial(reduce_lowrank, model, optimizer))
            reduce_lowrank(model, optimizer.optimizer)
        with counting() as sent:
            train(accelerator, model, optimizer, range(STEPS), clip=None)
        found[name] = weights_of(inner)
        found[f"bytes, {name}"] = sum(sent)
    return found


# ---------------------------------------------------------------------- the Trainer


class OnCpu(Trainer):
    """Which shards the model on the CPU too, where the arguments ask for it."""

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        if self.args.fsdp:
            use_fsdp2(self.accelerator.state, FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args))
            self.is_fsdp_enabled = True


class ReduceLowrank(TrainerCallback):
    """As a user has it: once the Trainer has wrapped the model."""

    trainer: Trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        optimizer: Any = self.trainer.optimizer
        reduce_lowrank(self.trainer.model_wrapped, optimizer.optimizer)  # type: ignore[arg-type]


def trained(folder: str, *callbacks: TrainerCallback, resume: bool = False, **changes: Any) -> dict[str, Any]:
    """Weights and logs of a Trainer's six steps; it leaves a checkpoint after the fourth, or goes on from there."""
    args = trainer_arguments(folder, 1, save_strategy="steps", save_steps=4, **changes)
    trainer = OnCpu(**trainer_kwargs(args), callbacks=[SubspaceCallback(), *callbacks])
    for callback in callbacks:
        callback.trainer = trainer  # type: ignore[attr-defined]
    trainer.train(resume_from_checkpoint=f"{folder}/checkpoint-4" if resume else None)
    return {
        "model": type(trainer.model_wrapped).__name__,
        "weights": weights_of(trainer.model),
        "refreshes": [entry["subspace_refreshes"] for entry in trainer.state.log_history if "loss" in entry],
    }


def trainer_arguments(folder: str | Path, batch: int, **changes: Any) -> TrainingArguments:
    return arguments(folder, per_device_train_batch_size=batch, **changes)


def trainer_kwargs(args: TrainingArguments) -> dict[str, Any]:
    optimizer = trainer_optimizer(args, target_modules=LLAMA_TARGETS, rank=RANK, update_proj_gap=2)
    model = llama(attention_dropout=0.0)
    return {"model": model, "args": args, "train_dataset": texts(), "optimizer_cls_and_kwargs": optimizer}


def trainer(folder: str) -> dict[str, Any]:
    layers = {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
    found = {}
    hosts: dict[str, dict[str, Any]] = {"ddp": {}, "fsdp2": {"fsdp": True, "fsdp_config": layers}}
    for name, changes in hosts.items():
        own = f"{folder}/trainer-{name}"
        found[name] = trained(own, **copy.deepcopy(changes))
        found[f"{name}, resumed"] = trained(own, resume=True, **copy.deepcopy(changes))
    found["reduced"] = trained(f"{folder}/trainer-reduced", ReduceLowrank(), max_grad_norm=0.0)
    return found


def work(rank: int, world: int, folder: str) -> None:
    """A process: what it saw in each part."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world, timeout=timedelta(seconds=60)
    )
    torch.save({part.__name__: part(folder) for part in (fsdp2, refused, reduced, trainer)}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()
