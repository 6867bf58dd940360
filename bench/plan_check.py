"""The memory planner against measured steps: bytes of live tensors at the peak, predicted and counted.

``python bench/plan_check.py --out bench/results/plan_check.json``. Each row builds Transformers' ``LlamaForCausalLM``
(sdpa attention, its own loss) on the CPU, takes steps under ``galore_kernels.plan.live.LiveBytes`` and compares the
peak of one that refreshes bases, or of one that does not, with ``galore_kernels.plan``. Exit status 1 if a row is off
by more than 5 %.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from report import write_json
from rich.console import Console
from rich.table import Table

from galore_kernels import (
    APOLLOFusedAdam8bit,
    GaLoreFusedAdafactor,
    GaLoreFusedAdam8bit,
    GaLoreFusedAdamW,
    LayerwiseOptimizer,
    galore_param_groups,
    prepare,
)
from galore_kernels.plan import LlamaShape, Plan, plan
from galore_kernels.plan.live import LiveBytes
from galore_kernels.plan.shapes import MODELS
from galore_kernels.pretrain.optimizers import package_versions

#: Ours, by the planner's names.
_OURS: dict[str, Any] = {
    "galore8bit": GaLoreFusedAdam8bit,
    "galore": GaLoreFusedAdamW,
    "galore_adafactor": GaLoreFusedAdafactor,
    "apollo8bit": APOLLOFusedAdam8bit,
}

#: How far a prediction may be off.
TOLERANCE = 0.05

#: Fewer heads of keys and values than of queries, wide heads, one table for embedding and head.
_GROUPED = LlamaShape("grouped", 256, 688, 3, 4, 2, 512, tied=True, head_width=96)

#: "exact": at half of the smaller dimension bases are found by exact decompositions.
SHAPES = {
    "tiny": MODELS["tiny"],
    "60m": MODELS["60m"],
    "130m": replace(MODELS["130m"], layers=3),
    "grouped": _GROUPED,
    "exact": replace(_GROUPED, name="exact"),
}
RANKS = {"tiny": 64, "60m": 128, "130m": 256, "grouped": 32, "exact": 128}

LIGHT = {"gradients": "factored", "updates": "layerwise"}


@dataclass(frozen=True)
class Case:
    """One row: ``options`` are the planner's."""

    shape: str
    optimizer: str
    batch: int
    sequence: int
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """For tables and tests."""
        options = (f"{key}={value}" for key, value in self.options.items() if key != "step")
        return " ".join((self.shape, self.optimizer, f"{self.batch}x{self.sequence}", *options))

    def predicted(self) -> Plan:
        """What the planner says."""
        sizes = {"rank": RANKS[self.shape], "tokens": self.batch * self.sequence, "sequence": self.sequence}
        return plan(SHAPES[self.shape], self.optimizer, device="cpu", **sizes, **self.options)


@dataclass(frozen=True)
class Row:
    """What a case came to, in bytes; ``tensors`` at the measured peak."""

    case: Case
    predicted: Plan
    measured: int
    phase: str
    tensors: str

    @property
    def ratio(self) -> float:
        """Predicted over measured."""
        return self.predicted.peak / self.measured


def cases(*, quick: bool = False) -> Iterator[Case]:
    """Shapes and optimizers in every mode; ``quick``: of the smallest models alone."""
    optimizers = ("adamw", "galore8bit", "galore")
    for shape in ("tiny", "grouped") if quick else ("tiny", "60m", "130m", "grouped"):
        batch, sequence = (2, 128) if shape in ("60m", "130m") else (4, 128)
        for weights in ("fp32", "bf16"):
            for checkpointing in ("none", "layer"):
                options = {"weights": weights, "checkpointing": checkpointing}
                for optimizer in optimizers:
                    yield Case(shape, optimizer, batch, sequence, {**options, "step": "ordinary"})
                yield Case(shape, "galore8bit", batch, sequence, {**options, "step": "refresh"})
                for step in ("ordinary", "refresh"):
                    for mode in ({"gradients": "factored"}, {"updates": "layerwise"}, LIGHT):
                        yield Case(shape, "galore8bit", batch, sequence, {**options, **mode, "step": step})
        # So few tokens that the update is the fullest moment: its workspace, and the refresh's, are seen.
        for weights in ("fp32", "bf16"):
            for optimizer in ("adamw", "galore8bit"):
                yield Case(shape, optimizer, 1, 8, {"weights": weights, "step": "ordinary"})
            for mode in ({}, {"gradients": "factored"}, {"updates": "layerwise"}, LIGHT):
                yield Case(shape, "galore8bit", 1, 8, {"weights": weights, **mode, "step": "refresh"})
        yield Case(shape, "galore8bit", 1, 8, {"weights": "bf16", "basis_format": "int8", "step": "refresh"})
        for step in ("ordinary", "refresh"):
            for mode in ({"gradients": "factored"}, LIGHT, {**LIGHT, "checkpointing": "layer", "basis_format": "int8"}):
                yield Case(shape, "galore8bit", batch, sequence, {"weights": "int8", **mode, "step": step})
            yield Case(shape, "galore8bit", 1, 8, {"weights": "int8", **LIGHT, "step": step})
        for tokens in (8, 128):
            for updates in ("whole", "layerwise"):
                for optimizer in ("galore8bit", "apollo8bit"):
                    yield Case(shape, optimizer, 1, tokens, {"weights": "int8", "updates": updates, "step": "refresh"})
    for weights in ("fp32", "bf16"):
        for tokens in (8, 300):
            for mode in ({}, {"gradients": "factored"}, LIGHT):
                yield Case("exact", "galore8bit", 1, tokens, {"weights": weights, **mode, "step": "refresh"})
    for weights in ("fp32", "bf16"):
        for mode in ({}, LIGHT):
            yield Case("grouped", "galore_adafactor", 4, 128, {"weights": weights, **mode, "step": "ordinary"})
            yield Case("grouped", "galore_adafactor", 1, 8, {"weights": weights, **mode, "step": "ordinary"})
    for optimizer in ("adamw8bit", "galore_torch", "galore_torch8bit"):
        yield Case("tiny", optimizer, 4, 128, {"weights": "bf16", "step": "ordinary"})
        yield Case("tiny", optimizer, 1, 8, {"weights": "bf16", "step": "refresh"})


def build_model(case: Case) -> torch.nn.Module:
    """The case's model, initialised, on the CPU."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = SHAPES[case.shape]
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_width,
        tie_word_embeddings=shape.tied,
        max_position_embeddings=case.sequence,
        use_cache=False,
        attn_implementation="sdpa",  # type: ignore[call-arg]  # one of all models' options
    )
    torch.manual_seed(0)
    model: torch.nn.Module = LlamaForCausalLM(config)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(case.predicted().settings.dtype)
    model.train()
    factored, weights = case.options.get("gradients") == "factored", case.options["weights"]
    if factored or weights == "int8":
        prepare(model, rank=RANKS[case.shape] if factored else None, weights=weights if weights == "int8" else None)
    if case.options.get("checkpointing") == "layer":
        settings = {"use_reentrant": False}
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)  # type: ignore[operator]
    return model


def build_optimizer(case: Case, model: torch.nn.Module, gap: int) -> torch.optim.Optimizer:
    """The case's optimizer; ``gap``: steps between refreshes."""
    if case.optimizer == "adamw":
        return torch.optim.AdamW(model.parameters())
    if case.optimizer in _OURS:
        options: dict[str, Any] = {
            "rank": RANKS[case.shape],
            "update_proj_gap": gap,
            "basis_format": case.options.get("basis_format"),
        }
        own = _OURS[case.optimizer](galore_param_groups(model, **options))
        return LayerwiseOptimizer(own) if case.options.get("updates") == "layerwise" else own
    from galore_kernels.pretrain import rivals

    if case.optimizer == "adamw8bit":
        optimizer: torch.optim.Optimizer = rivals.import_rival("bitsandbytes", "bitsandbytes").optim.AdamW8bit(
            model.parameters()
        )
        return optimizer
    projected, rest = galore_param_groups(model, rank=RANKS[case.shape], update_proj_gap=gap, scale=0.25)
    groups: list[dict[str, Any]] = [
        {**projected, "params": [param for _, param in projected["params"]], "proj_type": "std"},
        {"params": [param for _, param in rest["params"]]},
    ]
    if case.optimizer == "galore_torch":
        rival: Any = rivals.import_rival("galore_torch", "galore-torch").GaLoreAdamW
        settings = {"no_deprecation_warning": True}
    else:
        rival, settings = rivals.patched_galore_torch_adamw8bit(), {}
    found: torch.optim.Optimizer = rival(groups, **settings)
    return found


def measure(case: Case) -> Row:
    """Takes three steps and looks at the last, in which bases are refreshed if the case says so."""
    predicted = case.predicted()
    counter = LiveBytes()
    with counter:
        model = build_model(case)
        optimizer = build_optimizer(case, model, gap=2 if case.options.get("step") == "refresh" else 1000)
        tokens = torch.randint(0, SHAPES[case.shape].vocabulary, (case.batch, case.sequence))
        for _ in range(3):
            optimizer.zero_grad(set_to_none=True)
            gc.collect()
            counter.reset_peak()
            counter.phase = "forward"
            loss = model(input_ids=tokens, labels=tokens).loss
            counter.phase = "backward"
            loss.backward()
            counter.phase = "update"
            optimizer.step()
            del loss
    return Row(case, predicted, counter.peak, counter.peak_phase, counter.describe_peak())


def table_of(rows: list[Row]) -> Table:
    """Predicted and measured megabytes side by side."""
    table = Table(title="peak of a step: live tensors in MB", title_justify="left")
    for column in ("case", "step", "predicted at"):
        table.add_column(column)
    for column in ("predicted", "measured", "ratio"):
        table.add_column(column, justify="right")
    for row in rows:
        style = None if abs(row.ratio - 1) <= TOLERANCE else "red"
        sizes = (f"{row.predicted.peak / 1e6:.1f}", f"{row.measured / 1e6:.1f}", f"{row.ratio:.3f}")
        table.add_row(row.case.name, row.predicted.settings.step, row.predicted.moment, *sizes, style=style)
    return table


def main(arguments: list[str]) -> int:
    """Prints the table, writes the JSON."""
    parser = argparse.ArgumentParser(description="The memory planner against measured steps.")
    parser.add_argument("--out", type=Path, help="JSON file")
    parser.add_argument("--quick", action="store_true", help="the smallest models alone")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--tensors", action="store_true", help="print what lived at each peak, predicted and measured")
    options = parser.parse_args(arguments)
    console = Console(width=None if Console().is_terminal else 140)
    rows = []
    for case in cases(quick=options.quick):
        if options.only not in case.name:
            continue
        rows.append(measure(case))
        if options.tensors:
            console.print(case.name, rows[-1].predicted.settings.step, style="bold")
            for name, size in sorted(rows[-1].predicted.tensors.items(), key=lambda item: -item[1]):
                console.print(f"{size:>14,} {name}")
            console.print(f"measured in {rows[-1].phase}\n{rows[-1].tensors}", highlight=False)
    console.print(table_of(rows))
    worst = max((abs(row.ratio - 1) for row in rows), default=0.0)
    console.print(f"{len(rows)} rows, the worst off by {100 * worst:.1f} %")
    if options.out is not None:
        found = [
            {
                "case": asdict(row.case),
                "predicted_bytes": row.predicted.peak,
                "measured_bytes": row.measured,
                "ratio": row.ratio,
                "moment": row.predicted.moment,
                "measured_in": row.phase,
                "parts": row.predicted.parts,
            }
            for row in rows
        ]
        write_json(options.out, {"format": 1, "tolerance": TOLERANCE, "versions": package_versions(), "rows": found})
        console.print(f"wrote {options.out}")
    return 0 if worst <= TOLERANCE else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
