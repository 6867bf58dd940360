"""What factored gradients, layerwise updates and int8 weights cost and gain in the main job, in one table.

    python bench/training_modes.py bench/results/pretrain_modes --out bench/results/training_modes.json

Validation losses are read from finished runs of ``examples/pretrain.py`` in that folder, named MODE-SEED
(``--name factored-0 --seed 0 --gradients factored``). Tokens per second and the bytes of live tensors are measured
here, on the default job's model and sizes: one step of each mode in each round, in shuffled order, so that what else
the machine does falls on all of them; the speed against the dense one is the median of the rounds' ratios. Rounds take
ordinary steps, between two refreshes. The bytes (``galore_kernels.plan.live``) are the peaks of steps in which nothing
but tensors is counted: of an ordinary one, of one that refreshes every basis, and of the first.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import machine
import torch
from report import write_json
from rich.console import Console
from rich.table import Table

from galore_kernels.plan.live import LiveBytes
from galore_kernels.pretrain.config import Config
from galore_kernels.pretrain.optimizers import build_optimizer
from galore_kernels.pretrain.runlog import LOG_NAME, read_log
from galore_kernels.pretrain.train import build_model

BASELINE = "dense"

MODES: dict[str, dict[str, Any]] = {
    BASELINE: {},
    "layerwise": {"updates": "layerwise"},
    "factored": {"gradients": "factored"},
    "factored, layerwise": {"gradients": "factored", "updates": "layerwise"},
    "int8": {"gradients": "factored", "weights": "int8"},
    "int8, layerwise": {"gradients": "factored", "weights": "int8", "updates": "layerwise"},
}

VOCABULARY = 256


@dataclass
class Mode:
    """One row. Bytes are of live tensors at the peak of a step; ``ratio`` is the speed against the baseline's."""

    name: str
    options: dict[str, Any]
    losses: dict[str, float]
    state_bytes: int = 0
    first: int = 0
    ordinary: int = 0
    refresh: int = 0
    tokens_per_second: float = 0.0
    ratio: float = 1.0
    seconds: list[float] = field(default_factory=list)


class Run:
    """A model and its optimizer in one mode, and their steps on random bytes, which cost what text does."""

    def __init__(self, options: dict[str, Any]) -> None:
        self.config = Config.resolve({"optimizer": "galore8bit", **options})
        self.model = build_model(self.config, VOCABULARY).train()
        self.optimizer = build_optimizer(self.model, self.config)
        self._draw = torch.Generator().manual_seed(0)

    def batch(self) -> torch.Tensor:
        """The next one."""
        shape = (self.config.batch, self.config.sequence)
        return torch.randint(VOCABULARY, shape, generator=self._draw)

    def step(self, rows: torch.Tensor) -> None:
        """As the main job's."""
        self.optimizer.zero_grad(set_to_none=True)
        self.model(input_ids=rows, labels=rows).loss.backward()
        self.optimizer.step()


def measure_bytes(mode: Mode) -> None:
    """The peaks of the first step, of an ordinary one and of one that refreshes."""
    run = Run({**mode.options, "update_proj_gap": 2})
    with LiveBytes() as live:
        live.add([*run.model.parameters(), *run.model.buffers()], "model")
        for name in ("first", "ordinary", "refresh"):
            rows = run.batch()
            live.reset_peak()
            run.step(rows)
            setattr(mode, name, live.peak)
    mode.state_bytes = run.optimizer.state_bytes()  # type: ignore[attr-defined]


def measure_speed(modes: list[Mode], rounds: int) -> None:
    """Seconds of a step of each mode, ``rounds`` times in turn."""
    runs = {mode.name: Run({**mode.options, "update_proj_gap": 10**6}) for mode in modes}
    order = random.Random(0)
    for number in range(rounds + 3):  # the first make the states, and warm code and allocator
        for mode in order.sample(modes, len(modes)):
            run = runs[mode.name]
            rows = run.batch()
            begin = time.perf_counter()
            run.step(rows)
            if number >= 3:
                mode.seconds.append(time.perf_counter() - begin)
    tokens = runs[BASELINE].config.tokens_per_step
    baseline = next(mode.seconds for mode in modes if mode.name == BASELINE)
    for mode in modes:
        mode.tokens_per_second = tokens / statistics.median(mode.seconds)
        mode.ratio = statistics.median(b / own for b, own in zip(baseline, mode.seconds, strict=True))


def read_losses(folder: Path, name: str, options: dict[str, Any]) -> dict[str, float]:
    """Final validation losses of a mode's runs, by seed.

    Raises:
        ValueError: a run isn't finished, or isn't of this mode.
    """
    losses: dict[str, float] = {}
    for path in sorted(folder.glob(f"{name.replace(', ', '-')}-[0-9]*/{LOG_NAME}")):
        log = read_log(path)
        expected = Config.resolve({"optimizer": "galore8bit", **options}).to_dict()
        config = Config.resolve(log[0]["config"]).to_dict()  # with the defaults of options that are newer than the log
        different = {key for key, value in expected.items() if config[key] != value} - {"seed"}
        if log[-1]["kind"] != "final" or different:
            raise ValueError(f"{path}: expected a finished run of {options or 'the default'}, differs in {different}")
        losses[str(log[0]["config"]["seed"])] = log[-1]["validation_loss"]
    return losses


def main(arguments: list[str]) -> int:
    """Prints the table and writes the JSON."""
    parser = argparse.ArgumentParser(description="The main job in each mode: losses, memory, speed.")
    parser.add_argument("folder", type=Path, help="of runs named MODE-SEED")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="JSON file")
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    modes = [Mode(name, options, read_losses(given.folder, name, options)) for name, options in MODES.items()]
    for mode in modes:
        measure_bytes(mode)
    measure_speed(modes, given.rounds)
    table = Table(title="8-bit moments, rank 64, 400 steps of 8 x 256 bytes; bytes of live tensors at the peak")
    for column in (
        "mode",
        "validation loss by seed",
        "first step",
        "ordinary",
        "refresh",
        "state",
        "tokens/s",
        "speed",
    ):
        table.add_column(column, justify="left" if column == "mode" else "right")
    for mode in modes:
        table.add_row(
            mode.name,
            "  ".join(f"{mode.losses[seed]:.4f}" for seed in sorted(mode.losses)),
            *(f"{size / 1e6:.2f} MB" for size in (mode.first, mode.ordinary, mode.refresh, mode.state_bytes)),
            f"{mode.tokens_per_second:,.0f}",
            f"{mode.ratio:.2f} x",
        )
    console = Console(width=None if Console().is_terminal else 140)
    console.print(table)
    if given.out is not None:
        facts = machine.describe(torch.device("cpu"), given.threads, 0)
        write_json(
            given.out, {"format": 1, "machine": facts, "rounds": given.rounds, "modes": [asdict(m) for m in modes]}
        )
        console.print(f"wrote {given.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
