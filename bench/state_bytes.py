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

import torch
from report import write_json
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from galore_kernels import GaLoreFusedAdam8bit, GaLoreFusedAdamW, galore_param_groups
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
    """The preset's model in bfloat16 on the meta device, embedding and output head untied as in the paper."""
    preset = PRESETS[name]
    config = LlamaConfig(
        vocab_size=preset.vocabulary,
        hidden_size=preset.hidden,
        intermediate_size=preset.intermediate,
        num_hidden_layers=preset.layers,
        num_attention_heads=preset.heads,
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
    return [
        Count(name, total, label, of_rank, size, 100 * (size / (4 * total) - 1), source)
        for label, of_rank, size, source in found
    ]


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
    if options.out is not None:
        data = {
            "format": 1,
            "baseline": "AdamW with bf16 moments: 4 bytes per parameter",
            "paper_percent_7b_rank_1024": PAPER_PERCENT,
            "counts": [asdict(count) for count in found],
        }
        write_json(options.out, data)
        console.print(f"wrote {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
