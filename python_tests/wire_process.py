"""What each of the processes of ``test_wire.py`` does: a few steps of a small Llama, whose collectives are counted."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from galore_kernels import GaLoreFusedAdamW, galore_param_groups, prepare
from galore_kernels.distributed import reduce_lowrank
from galore_kernels.plan import LlamaShape

# Keys and values are narrower than the rest, so that they are projected on the left; 301 rows don't divide by 2 or 4.
SHAPE = LlamaShape("small", hidden=64, intermediate=301, layers=2, heads=4, kv_heads=2, vocabulary=99)
RANK, GAP, STEPS = 8, 2, 3


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
    "sharded, exact": Case("sharded", rank=48),
}


class Layer(nn.Module):
    """A Llama's, in its order."""

    def __init__(self) -> None:
        super().__init__()
        width, wide = SHAPE.hidden, SHAPE.intermediate
        outputs = {"q": SHAPE.query_width, "k": SHAPE.kv_width, "v": SHAPE.kv_width}
        self.attn = nn.ModuleDict({name: nn.Linear(width, size, bias=False) for name, size in outputs.items()})
        self.attn["o"] = nn.Linear(SHAPE.query_width, width, bias=False)
        self.mlp = nn.ModuleDict({name: nn.Linear(width, wide, bias=False) for name in ("gate", "up")})
        self.mlp["down"] = nn.Linear(wide, width, bias=False)
        self.norms = nn.ModuleList([nn.RMSNorm(width), nn.RMSNorm(width)])

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norms[0](x)
        q, k, v = (self.attn[name](normed).unflatten(-1, (-1, SHAPE.head_width)).transpose(1, 2) for name in "qkv")
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.attn["o"](mixed.transpose(1, 2).flatten(2))
        normed = self.norms[1](x)
        return x + self.mlp["down"](F.silu(self.mlp["gate"](normed)) * self.mlp["up"](normed))


class Llama(nn.Module):
    """Without positions; importing Transformers in every process would take most of the test's time."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(SHAPE.vocabulary, SHAPE.hidden)
        self.layers = nn.ModuleList([Layer() for _ in range(SHAPE.layers)])
        self.norm = nn.RMSNorm(SHAPE.hidden)
        self.head = nn.Linear(SHAPE.hidden, SHAPE.vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1).float(), tokens.flatten())


def steps(case: Case, rank: int) -> list[list[tuple[str, int]]]:
    """The collectives of each step: forward and backward pass, and update."""
    torch.manual_seed(0)
    model = Llama().to(case.dtype)
    if case.scheme == "sharded":
        return sharded_steps(model, case, rank)
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


def sharded_steps(model: Llama, case: Case, rank: int) -> list[list[tuple[str, int]]]:
    for layer in model.layers:
        fully_shard(layer)
    fully_shard(model)
    groups = galore_param_groups(model, ["attn", "mlp"], rank=case.rank, update_proj_gap=GAP)
    return taken(model, GaLoreFusedAdamW(groups, lr=1e-3), rank)


def taken(model: nn.Module, optimizer: Any, rank: int) -> list[list[tuple[str, int]]]:
    found = []
    for step in range(STEPS):
        tokens = torch.randint(0, SHAPE.vocabulary, (2, 16), generator=torch.Generator().manual_seed(10 * step + rank))
        with counting() as calls:
            model(tokens).backward()
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
