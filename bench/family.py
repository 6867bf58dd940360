"""The main job with every optimizer: loss, optimizer state and the time of a step, in one table.

    python bench/family.py bench/results/pretrain_family --out bench/results/pretrain_family.json

Validation losses are read from finished runs of ``examples/pretrain.py --optimizer NAME --out FOLDER``. State and
times are measured here: each optimizer has the default job's model, its gradients of one batch, and takes one step
between two refreshes in each round, all in an order shuffled anew, so that what else the machine does falls on all.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import machine
import torch
from report import write_json
from rich.console import Console
from rich.table import Table

from galore_kernels.pretrain.config import Config, PretrainError
from galore_kernels.pretrain.optimizers import build_optimizer
from galore_kernels.pretrain.rivals import optimizer_state_bytes
from galore_kernels.pretrain.runlog import LOG_NAME, read_log
from galore_kernels.pretrain.train import build_model

#: Ours and, beside those that they stand for, the originals.
NAMES = (
    "adamw", "galore", "galore_torch", "galore8bit", "galore_adafactor", "galore_torch_adafactor", "apollo",
    "apollo_torch", "apollo8bit", "apollo_mini",
)  # fmt: skip

VOCABULARY = 256
NEVER = 10**9


@dataclass
class Row:
    """One optimizer's; ``loss`` is None where there is no finished run, ``seconds`` are of each round's step."""

    name: str
    rank: int
    lr: float
    scale: float
    state_bytes: int
    loss: float | None
    seconds: list[float] = field(default_factory=list)

    @property
    def milliseconds(self) -> float:
        """The median step's."""
        return 1e3 * statistics.median(self.seconds)


def final_losses(folder: Path) -> dict[str, float]:
    """Validation loss of each optimizer's finished run."""
    logs = [read_log(path) for path in sorted(folder.glob(f"*/{LOG_NAME}"))]
    return {log[0]["config"]["optimizer"]: log[-1]["validation_loss"] for log in logs if log[-1]["kind"] == "final"}


def with_gradients(config: Config) -> torch.nn.Module:
    """The job's model after a backward pass."""
    torch.manual_seed(0)
    model = build_model(config, VOCABULARY)
    tokens = torch.randint(0, VOCABULARY, (config.batch, config.sequence))
    model(input_ids=tokens, labels=tokens).loss.backward()
    return model


def measure(losses: dict[str, float], rounds: int, console: Console) -> list[Row]:
    """Every optimizer that is installed."""
    rows, steps = [], []
    for name in NAMES:
        config = Config.resolve({"optimizer": name, "update_proj_gap": NEVER})
        model = with_gradients(config)
        try:
            optimizer = build_optimizer(model, config)
        except PretrainError as error:
            console.print(f"{name} left out: {error}")
            continue
        optimizer.step()  # makes the state, and finds the bases
        row = Row(name, config.rank, config.lr, config.scale, optimizer_state_bytes(optimizer), losses.get(name))
        rows.append(row)
        steps.append((row, optimizer))
    order = random.Random(0)
    for _ in range(rounds):
        order.shuffle(steps)
        for row, optimizer in steps:
            begun = time.perf_counter()
            optimizer.step()
            row.seconds.append(time.perf_counter() - begun)
    return rows


def main(arguments: list[str]) -> int:
    """Prints the table and writes the JSON."""
    parser = argparse.ArgumentParser(description="The main job with every optimizer.")
    parser.add_argument("folder", type=Path, help="runs of examples/pretrain.py")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, help="JSON file")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    console = Console(width=None if Console().is_terminal else 120)
    rows = measure(final_losses(options.folder), options.rounds, console)
    title = f"the main job; step times: median of {options.rounds} rounds, one thread"
    table = Table(title=title, title_justify="left")
    for column in ("optimizer", "rank", "lr", "validation, nats/byte", "state, MB", "step, ms"):
        table.add_column(column, justify="left" if column == "optimizer" else "right")
    for row in rows:
        table.add_row(
            row.name,
            "" if row.name == "adamw" else str(row.rank),
            f"{row.lr:g}",
            "" if row.loss is None else f"{row.loss:.4f}",
            f"{row.state_bytes / 1e6:.2f}",
            f"{row.milliseconds:.1f}",
        )
    console.print(table)
    if options.out is not None:
        facts = machine.describe(torch.device("cpu"), 1, 0)
        data = {"format": 1, "machine": facts, "rows": [asdict(row) | {"ms": row.milliseconds} for row in rows]}
        write_json(options.out, data)
        console.print(f"wrote {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
