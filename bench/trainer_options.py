"""What of TrainingArguments the Trainer's own ``optim="galore_adamw"`` honours, and what ours does: seen, not read.

    python bench/trainer_options.py
    python bench/trainer_options.py --json bench/results/trainer_options.json

The same tiny job, a Llama with biases on random tokens, is run by Hugging Face's Trainer again and again with one
argument changed. An argument is honoured if the weights say so: a changed ``adam_beta2`` has to change them, two
micro-batches of two have to give what one batch of four gives, a resumed run has to end where an uninterrupted one
does. Where a run raises, the first line of its error stands in the table.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import machine
import torch
from report import write_json
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
from transformers.utils import logging

from galore_kernels.integrations.huggingface import trainer_optimizer

VOCABULARY = 64
TARGETS = ["attn", "mlp"]
LOW_RANK = "rank=4, update_proj_gap=2, scale=1.0"

#: In an error of torch.load.
COLOURS = re.compile(r"\x1b\[[0-9;]*m")

Weights = dict[str, Tensor]
#: Starts a run with some arguments changed and gives the weights at its end. The keyword ``resume`` continues another.
Run = Callable[..., Weights]

#: Of two runs that add the same numbers up in another order, the greatest relative difference of their updates.
SAME_BUT_FOR_ROUNDING = 1e-2

#: What is compared: TrainingArguments, options of ``trainer_optimizer`` (None: the Trainer makes its own).
OPTIMIZERS: dict[str, tuple[dict[str, Any], dict[str, Any] | None]] = {
    'optim="galore_adamw"': ({"optim": "galore_adamw"}, None),
    'optim="galore_adamw_layerwise"': ({"optim": "galore_adamw_layerwise"}, None),
    "GaLoreFusedAdamW": ({}, {"optimizer": "GaLoreFusedAdamW"}),
    "GaLoreFusedAdam8bit": ({}, {"optimizer": "GaLoreFusedAdam8bit"}),
    "GaLoreFusedAdam8bit, layerwise": ({}, {"optimizer": "GaLoreFusedAdam8bit", "layerwise": True}),
}


@dataclass(frozen=True)
class Finding:
    """What a probe has seen: "honoured", "in part", "ignored", "wrong" or "raises", and what it has seen it by."""

    verdict: str
    seen: str


# ---------------------------------------------------------------------- the job


def model() -> LlamaForCausalLM:
    """The same in every run. Its biases begin at 1, so that their decay would be seen."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=80, num_hidden_layers=2, num_attention_heads=2,
        attention_bias=True, mlp_bias=True, use_cache=False,
    )  # fmt: skip
    made = LlamaForCausalLM(config)
    for name, param in made.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.ones_(param)
    return made


def runner(optimizer: str, folder: Path) -> Run:
    """Runs of one optimizer."""
    own_arguments, options = OPTIMIZERS[optimizer]

    def run(*, resume: str | None = None, **changes: Any) -> Weights:
        tokens = torch.randint(VOCABULARY, (32, 16), generator=torch.Generator().manual_seed(1))
        plain = {"learning_rate": 1e-2, "lr_scheduler_type": "constant", "max_steps": 2, "save_strategy": "no"}
        quiet = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "logging_strategy": "no"}
        lowrank = {"optim_target_modules": TARGETS, "optim_args": LOW_RANK}
        batch = {"per_device_train_batch_size": 4}
        # layerwise updates clip too, by the norm of the step before; what is not about clipping leaves it off.
        given = {**plain, **quiet, **lowrank, **batch, "max_grad_norm": 0.0, **own_arguments, **changes}
        args = TrainingArguments(output_dir=str(folder), **given)
        trained = model()
        trainer = Trainer(
            trained,
            args,
            train_dataset=[{"input_ids": row, "labels": row} for row in tokens],
            optimizer_cls_and_kwargs=None if options is None else trainer_optimizer(args, **options),
        )
        trainer.train(resume_from_checkpoint=resume)
        return {name: value.detach().clone() for name, value in trained.named_parameters()}

    return run


def difference(left: Weights, right: Weights) -> float:
    """The norm of the difference, relative to that of the left one's distance from the initial weights."""
    start = dict(model().named_parameters())
    moved = sum(float((left[name] - start[name].detach()).double().square().sum()) for name in left)
    apart = sum(float((left[name] - right[name]).double().square().sum()) for name in left)
    return (apart / moved) ** 0.5 if moved else float(apart > 0)


# ---------------------------------------------------------------------- the probes


def changes_the_weights(**changes: Any) -> Callable[[Run, Path], Finding]:
    """The probe that compares two runs."""

    def probe(run: Run, folder: Path) -> Finding:
        apart = difference(run(), run(**changes))
        return Finding("honoured" if apart else "ignored", f"updates differ by {apart:.1%}")

    return probe


def decay(run: Run, folder: Path) -> Finding:
    """Matrices lose lr * weight_decay * w in a step, w being the weight before the update or after it."""
    rate, weight_decay = 1e-2, 0.5
    without, with_decay = run(max_steps=1), run(max_steps=1, learning_rate=rate, weight_decay=weight_decay)
    matrices = [name for name in without if without[name].dim() == 2]
    if all(torch.equal(without[name], with_decay[name]) for name in matrices):
        return Finding("ignored", "nothing decays")
    start = {name: value.detach() for name, value in model().named_parameters()}
    apart = min(
        max(float((without[n] - with_decay[n] - rate * weight_decay * weights[n]).abs().max()) for n in matrices)
        for weights in (start, without)
    )
    return Finding("honoured" if apart < 1e-6 else "wrong", f"at most {apart:.1e} from lr * weight_decay * w")


def undecayed(run: Run, folder: Path) -> Finding:
    """Biases and norms are the same with and without decay after one step, where matrices aren't."""
    without, with_decay = run(max_steps=1), run(max_steps=1, weight_decay=0.5)
    vectors = [name for name in without if without[name].dim() == 1]
    decays = [name for name in vectors if not torch.equal(without[name], with_decay[name])]
    if all(torch.equal(without[name], with_decay[name]) for name in without):
        return Finding("ignored", "nothing decays")
    return Finding("wrong" if decays else "honoured", f"{len(decays)} of {len(vectors)} biases and norms decay")


def schedule(run: Run, folder: Path) -> Finding:
    """Nothing moves in a step whose warm-up rate is 0; the steps that follow are those of the schedule's rate."""
    start = {name: value.detach() for name, value in model().named_parameters()}
    warm = {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 1}
    still = all(torch.equal(value, start[name]) for name, value in run(max_steps=1, **warm).items())
    moved = any(not torch.equal(value, start[name]) for name, value in run(max_steps=2, **warm).items())
    falls = difference(run(max_steps=2), run(max_steps=2, lr_scheduler_type="linear"))
    honoured = still and moved and falls > 0
    seen = f"the step at rate 0 moves {'nothing' if still else 'weights'}; linear against constant {falls:.1%}"
    return Finding("honoured" if honoured else "ignored", seen)


def clipping(run: Run, folder: Path) -> Finding:
    """Gradients clipped far below Adam's eps, the built-in's too, give smaller updates."""
    apart = difference(run(), run(max_grad_norm=1e-7))
    return Finding("honoured" if apart > SAME_BUT_FOR_ROUNDING else "ignored", f"updates differ by {apart:.1%}")


def accumulation(run: Run, folder: Path) -> Finding:
    """Two micro-batches of two are one batch of four."""
    whole = run(max_steps=1)
    parts = run(max_steps=1, gradient_accumulation_steps=2, per_device_train_batch_size=2)
    targets = {name for name in whole if any(t in name for t in TARGETS) and whole[name].dim() == 2}
    projected, rest = (
        difference(*({name: end[name] for name in end if (name in targets) is wanted} for end in (whole, parts)))
        for wanted in (True, False)
    )
    same = [apart < SAME_BUT_FOR_ROUNDING for apart in (projected, rest)]
    verdict = "honoured" if all(same) else "in part" if any(same) else "wrong"
    return Finding(verdict, f"updates differ by {projected:.2%} where projected, {rest:.2%} elsewhere")


def resume(run: Run, folder: Path) -> Finding:
    """Resumed from a checkpoint in mid-run, the weights at the end are bitwise those of the run that wrote it."""
    whole = run(max_steps=5, save_strategy="steps", save_steps=3)
    resumed = run(max_steps=5, resume=str(folder / "checkpoint-3"))
    same = all(torch.equal(value, resumed[name]) for name, value in whole.items())
    seen = "bitwise equal" if same else f"updates differ by {difference(whole, resumed):.1%}"
    return Finding("honoured" if same else "wrong", seen)


PROBES: dict[str, Callable[[Run, Path], Finding]] = {
    "learning_rate": changes_the_weights(learning_rate=5e-3),
    "adam_beta1": changes_the_weights(adam_beta1=0.5),
    "adam_beta2": changes_the_weights(adam_beta2=0.5),
    "adam_epsilon": changes_the_weights(adam_epsilon=1e-2),
    "weight_decay": decay,
    "no decay of biases and norms": undecayed,
    "lr_scheduler_type, warmup_steps": schedule,
    "max_grad_norm": clipping,
    "gradient_accumulation_steps": accumulation,
    "resume_from_checkpoint": resume,
}


def probed(optimizer: str, name: str) -> Finding:
    """What a probe sees, or the first line of what it raises."""
    with tempfile.TemporaryDirectory() as temporary, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder = Path(temporary)
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                return PROBES[name](runner(optimizer, folder), folder)
        except Exception as error:
            first = COLOURS.sub("", str(error).strip()).splitlines()[0]
            return Finding("raises", f"{type(error).__name__}: {first}")


# ---------------------------------------------------------------------- the table


def table(findings: dict[str, dict[str, Finding]]) -> Table:
    """A row for each argument, a column for each optimizer."""
    shown = Table(title="arguments of the Trainer, by what they do to the weights", title_justify="left")
    shown.add_column("argument")
    for optimizer in findings:
        shown.add_column(optimizer, overflow="fold")
    styles = {"honoured": "green", "raises": "red", "wrong": "red", "ignored": "yellow", "in part": "yellow"}
    for name in PROBES:
        cells = [findings[optimizer][name] for optimizer in findings]
        shown.add_row(name, *(f"[{styles[cell.verdict]}]{cell.verdict}[/]: {escape(cell.seen)}" for cell in cells))
    return shown


def main(arguments: Sequence[str] | None = None) -> int:
    """Probes everything, prints the table, writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file for everything that was seen")
    parser.add_argument("--only", choices=list(OPTIMIZERS), help="one optimizer")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    console = Console(width=200 if not sys.stdout.isatty() else None)
    facts = machine.describe(torch.device("cpu"), torch.get_num_threads(), cache_bytes=0)
    facts["versions"]["accelerate"] = metadata.version("accelerate")
    optimizers = [options.only] if options.only else list(OPTIMIZERS)
    findings = {optimizer: {name: probed(optimizer, name) for name in PROBES} for optimizer in optimizers}
    console.print(machine.summary(facts))
    console.print(table(findings))
    if options.json:
        seen = {optimizer: {name: asdict(f) for name, f in found.items()} for optimizer, found in findings.items()}
        write_json(options.json, {"format": 1, "machine": facts, "findings": seen})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
