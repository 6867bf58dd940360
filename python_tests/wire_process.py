"""What each of the processes of ``test_wire.py`` does: a few steps of a small Llama, whose collectives are counted."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

from galore_kernels import GaLoreFusedAdamW, galore_param_groups, prepare
from galore_kernels.distributed import reduce_lowrank
from galore_kernels.plan import LlamaShape

# Keys and values are narrower than the rest, so that they are projected on the left; 301 rows don't divide by 2 or 4.
SHAPE = LlamaShape("small", hidden=64, intermediate=301, layers=2, heads=4, kv_heads=2, vocabulary=99)
RANK, GAP, STEPS = 8, 3, 5


@dataclass(frozen=True)
class Case:
    """``scheme``: of ``galore_kernels.plan.wire``, or "sharded". ``bucket_mb``: DDP's; None for its default."""

    scheme: str
    dtype: torch.dtype = torch.float32
    rank: int = RANK
    bucket_mb: float | None = None
    schedule: str = "periodic"


# 0.02 MiB hold about a matrix; at rank 48 of 64 bases are found exactly.
CASES = {
    "full": Case("full"),
    "lowrank": Case("lowrank"),
    "lowrank, bf16, small buckets": Case("lowrank", torch.bfloat16, bucket_mb=0.02),
    "full, small buckets": Case("full", bucket_mb=0.02),
    "lowrank, staggered": Case("lowrank", schedule="staggered"),
    "lowrank, exact": Case("lowrank", rank=48),
    "factored": Case("factored"),
    "factored, bf16, small buckets": Case("factored", torch.bfloat16, bucket_mb=0.001),
    "factored, exact": Case("factored", rank=48),
    "sharded": Case("sharded"),
}


def llama(dtype: torch.dtype) -> nn.Module:
    config = LlamaConfig(
        vocab_size=SHAPE.vocabulary,
        hidden_size=SHAPE.hidden,
        intermediate_size=SHAPE.intermediate,
        num_hidden_layers=SHAPE.layers,
        num_attention_heads=SHAPE.heads,
        num_key_value_heads=SHAPE.kv_heads,
        use_cache=False,
    )
    torch.manual_seed(0)
    model: nn.Module = LlamaForCausalLM(config)
    return model.to(dtype)


def steps(case: Case, rank: int) -> list[list[tuple[str, int]]]:
    """The collectives of each step: forward and backward pass, and update."""
    model = llama(case.dtype)
    if case.scheme == "sharded":
        return sharded_steps(model, rank)
    if case.scheme == "factored":
        prepare(model, rank=case.rank)
    groups = galore_param_groups(
        model, ["attn", "mlp"], rank=case.rank, update_proj_gap=GAP, refresh_schedule=case.schedule
    )
    optimizer = GaLoreFusedAdamW(groups, lr=1e-3)
    wrapped = DistributedDataParallel(model, bucket_cap_mb=case.bucket_mb)
    if case.scheme == "lowrank":
        reduce_lowrank(wrapped, optimizer)
    else:
        wrapped.register_comm_hook(None, allreduce_hook)
    return taken(wrapped, optimizer, rank)


def sharded_steps(model: Any, rank: int) -> list[list[tuple[str, int]]]:
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    return taken(model, torch.optim.SGD(model.parameters(), lr=1e-3), rank)


def taken(model: nn.Module, optimizer: Any, rank: int) -> list[list[tuple[str, int]]]:
    found = []
    for step in range(STEPS):
        tokens = torch.randint(0, SHAPE.vocabulary, (2, 16), generator=torch.Generator().manual_seed(10 * step + rank))
        with counting() as calls:
            model(input_ids=tokens, labels=tokens).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append(list(calls))
    return found


@contextlib.contextmanager
def counting() -> Iterator[list[tuple[str, int]]]:
    """Every collective that Python asks for, with the bytes of the tensor that is reduced, or that is gathered."""
    calls: list[tuple[str, int]] = []

    def counted(kind: str, original: Any, place: int, name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            tensor: Tensor = kwargs[name] if name in kwargs else args[place]
            calls.append((kind, tensor.nbytes))
            return original(*args, **kwargs)

        return call

    watched = {
        "all_reduce": ("all_reduce", 0, "tensor"),
        "all_gather_single": ("all_gather", 0, "output_tensor"),  # FSDP2's names for them in PyTorch 2.13
        "reduce_scatter_single": ("reduce_scatter", 1, "input"),
        "all_gather_into_tensor": ("all_gather", 0, "output_tensor"),  # and before
        "reduce_scatter_tensor": ("reduce_scatter", 1, "input"),
    }
    originals = {name: getattr(dist, name) for name in watched if hasattr(dist, name)}
    for name, original in originals.items():
        kind, place, argument = watched[name]
        setattr(dist, name, counted(kind, original, place, argument))
    try:
        yield calls
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


def work(rank: int, world: int, folder: str, cases: list[str]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world, timeout=timedelta(seconds=60)
    )
    torch.save({name: steps(CASES[name], rank) for name in cases}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()
