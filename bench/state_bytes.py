"""Optimizer state of the papers' Llamas, counted by the optimizers themselves on the meta device.

``python bench/state_bytes.py --out bench/results/state_bytes.json``. Nothing is allocated: the models are
Transformers' ``LlamaForCausalLM`` on the meta device in bfloat16, the optimizers are this library's own, and
``optimizer.state_bytes()`` counts the tensors that a step would make, scalars and absmax included. AdamW's
rows are arithmetic: two moments per parameter.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from report import write_json
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from galore_kernels import (
    APOLLOFusedAdam8bit,
    APOLLOFusedAdamW,
    GaLoreFusedAdam8bit,
    GaLoreFusedAdamW,
    galore_param_groups,
    prepare,
)
from galore_kernels.nn import carried_gradient_of
from galore_kernels.plan import plan
from galore_kernels.plan.shapes import MODELS as SHAPES
from galore_kernels.pretrain.presets import PRESETS
from galore_kernels.quantizers import BASIS_FORMATS

MODELS = ("60m", "130m", "350m", "1b", "7b")
COUNTED = "optimizer.state_bytes() on the meta device"

#: What the paper says of 7B at rank 1024, against bf16 Adam's state (Zhao et al., arXiv 2403.03507).
PAPER_PERCENT = {"GaLore, bf16 moments": -65.5, "8-bit GaLore": -82.5}


@dataclass(frozen=True)
class Count:
    """State of one optimizer on one model; ``percent`` is relative to AdamW with bf16 moments."""

    model: str
    parameters: int
    optimizer: str
    rank: int | None
    bytes: int
    percent: float
    source: str


def meta_llama(name: str) -> nn.Module:
    """The model in bfloat16 on the meta device, embedding and output head untied as in the papers."""
    shape = SHAPES[name]
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        model: nn.Module = LlamaForCausalLM(config)
    return model.to(torch.bfloat16)


def counts(name: str) -> list[Count]:
    """Every optimizer's state for one of ``MODELS``; attention and MLP are projected."""
    model, rank = meta_llama(name), PRESETS[name].rank
    total = sum(param.numel() for param in model.parameters())
    full_rank = [{"params": list(model.parameters()), "rank": None}]
    found: list[tuple[str, int | None, int, str]] = [
        ("AdamW, fp32 moments", None, 8 * total, "arithmetic"),
        ("AdamW, bf16 moments", None, 4 * total, "arithmetic"),
        ("GaLoreFusedAdam8bit, full rank", None, GaLoreFusedAdam8bit(full_rank).state_bytes(), COUNTED),
    ]
    for cls in (GaLoreFusedAdamW, GaLoreFusedAdam8bit):
        optimizer = cls(galore_param_groups(model, rank=rank))
        found.append((cls.__name__, rank, optimizer.state_bytes(), COUNTED))
    for basis_format in BASIS_FORMATS:
        optimizer = GaLoreFusedAdam8bit(galore_param_groups(model, rank=rank, basis_format=basis_format))
        found.append((f"GaLoreFusedAdam8bit, {basis_format} basis", rank, optimizer.state_bytes(), COUNTED))
    for label, own_rank, apollo in apollos(model, rank):
        found.append((label, own_rank, apollo.state_bytes(), COUNTED))
    return [
        Count(name, total, label, of_rank, size, 100 * (size / (4 * total) - 1), source)
        for label, of_rank, size, source in found
    ]


def apollos(model: nn.Module, rank: int) -> list[tuple[str, int, APOLLOFusedAdamW | APOLLOFusedAdam8bit]]:
    """APOLLO's optimizers of a model, with their names and ranks."""
    return [
        (f"{cls.__name__}{', Mini' if own == 1 else ''}", own, cls(galore_param_groups(model, rank=own)))
        for own in (rank, 1)
        for cls in (APOLLOFusedAdamW, APOLLOFusedAdam8bit)
    ]


@dataclass(frozen=True)
class Replica:
    """What a process holds, in bytes: ``buckets`` are copies of all gradients that DDP makes of several processes'."""

    model: str
    optimizer: str
    weights: int
    gradients: int
    buckets: int
    state: int
    activations: int

    @property
    def total(self) -> int:
        """All of it, as at the end of a backward pass, but with the activations of its beginning."""
        return self.weights + self.gradients + self.buckets + self.state + self.activations


#: Tokens of a micro-batch of the papers: one sequence.
TOKENS = 256
CARD = 80 * 2**30


def replicas(name: str) -> list[Replica]:
    """A model in bfloat16 under DDP, which keeps a second copy of the gradients unless they are views of it."""
    model = meta_llama(name)
    size = sum(param.numel() * param.element_size() for param in model.parameters())
    found = []
    mini = [(label, optimizer) for label, rank, optimizer in apollos(model, 256)]
    adamw = [("AdamW, bf16 moments", 2 * size)]
    for label, state in [*adamw, *((label, optimizer.state_bytes()) for label, optimizer in mini)]:
        # At its fullest when updates are layerwise, where few gradients are there: all that it saves for backward.
        parts = plan(name, "apollo_mini", tokens=TOKENS, updates="layerwise", step="ordinary").parts
        activations = parts["activations"] + parts["logits"]
        for buckets in (size, 0):
            kind = "DDP" if buckets else "DDP, gradient_as_bucket_view=True"
            found.append(Replica(name, f"{label}; {kind}", size, size, buckets, state, activations))
    return found


#: What APOLLO's paper says of pre-training LLaMA-7B with Q-APOLLO-Mini (Zhu et al., arXiv 2412.05270): less than this.
PAPER_Q_APOLLO_MINI = 12e9


def q_apollos(name: str) -> list[Replica]:
    """A model with int8 weights under layerwise updates, which hold one gradient at a time: the largest is counted."""
    model = prepare(meta_llama(name), rank=None, weights="int8")
    carried = {id(param) for param in model.parameters() if carried_gradient_of(param) is not None}
    weights = sum(param.nbytes for param in model.parameters() if id(param) not in carried)
    gradient = max(param.nbytes for param in model.parameters() if param.requires_grad)
    found = []
    for label, rank, optimizer in apollos(model, 256):
        options: dict[str, Any] = {"tokens": TOKENS, "weights": "int8", "updates": "layerwise"}
        parts = plan(name, "apollo8bit", rank=rank, step="ordinary", **options).parts
        activations = parts["activations"] + parts["logits"]
        found.append(Replica(name, label, weights, gradient, 0, optimizer.state_bytes(), activations))
    return found


def projected_counts(name: str) -> list[Count]:
    """The same of the projected matrices alone, without embedding, head and norms."""
    model, rank = meta_llama(name), PRESETS[name].rank
    found = []
    for basis_format in (None, *BASIS_FORMATS):
        group = galore_param_groups(model, rank=rank, basis_format=basis_format)[0]
        total = sum(param.numel() for _, param in group["params"])
        size = GaLoreFusedAdam8bit([group]).state_bytes()
        label = "GaLoreFusedAdam8bit" + (f", {basis_format} basis" if basis_format else "")
        percent = 100 * (size / (4 * total) - 1)
        found.append(Count(f"{name}, projected matrices", total, label, rank, size, percent, COUNTED))
    return found


def replica_table(title: str, found: list[Replica], most: float) -> Table:
    """One row each, in GiB, as cards are sold; whether it takes less than ``most``."""
    table = Table(title=title, title_justify="left")
    table.add_column("optimizer")
    for column in ("weights", "gradients", "buckets", "state", "activations", "total", "fits"):
        table.add_column(column, justify="right")
    for one in found:
        parts = (one.weights, one.gradients, one.buckets, one.state, one.activations, one.total)
        table.add_row(one.optimizer, *(f"{part / 2**30:.1f}" for part in parts), "yes" if one.total < most else "no")
    return table


def main(arguments: list[str]) -> int:
    """Prints the table and writes the JSON."""
    parser = argparse.ArgumentParser(description="Bytes of optimizer state at the papers' Llama shapes.")
    parser.add_argument("--out", type=Path, help="JSON file")
    options = parser.parse_args(arguments)
    found = [count for name in MODELS for count in counts(name)] + projected_counts("7b")
    table = Table(title="optimizer state; weights and, unless said, bases in bfloat16", title_justify="left")
    for column in ("model", "optimizer"):
        table.add_column(column)
    for column in ("rank", "GB", "bytes/parameter", "against bf16 Adam"):
        table.add_column(column, justify="right")
    for index, count in enumerate(found):
        table.add_row(
            count.model,
            count.optimizer,
            str(count.rank or ""),
            f"{count.bytes / 1e9:.3f}",
            f"{count.bytes / count.parameters:.3f}",
            f"{count.percent:+.1f} %",
            end_section=index + 1 == len(found) or found[index + 1].model != count.model,
        )
    for label, percent in PAPER_PERCENT.items():
        table.add_row("7b", f"paper: {label}", "1024", "", "", f"{percent:+.1f} %", style="cyan")
    console = Console(width=None if Console().is_terminal else 120)
    console.print(table)
    under_ddp = replicas("13b")
    console.print(replica_table(f"LLaMA-13B in bfloat16, {TOKENS} tokens, on a card of 80 GiB", under_ddp, CARD))
    int8 = q_apollos("7b")
    title = f"LLaMA-7B with int8 weights, {TOKENS} tokens, layerwise, in the 12 GB of Q-APOLLO's paper"
    console.print(replica_table(title, int8, PAPER_Q_APOLLO_MINI))
    if options.out is not None:
        data = {
            "format": 1,
            "baseline": "AdamW with bf16 moments: 4 bytes per parameter",
            "paper_percent_7b_rank_1024": PAPER_PERCENT,
            "counts": [asdict(count) for count in found],
            "ddp_13b": [{**asdict(replica), "total": replica.total} for replica in under_ddp],
            "ddp_card_bytes": CARD,
            "int8_7b": [{**asdict(replica), "total": replica.total} for replica in int8],
            "paper_q_apollo_mini_7b_bytes": PAPER_Q_APOLLO_MINI,
            "ddp_tokens": TOKENS,
        }
        write_json(options.out, data)
        console.print(f"wrote {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
