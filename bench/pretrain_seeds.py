"""What options of the refresh cost or gain in training: final validation losses of runs with several seeds each.

``python bench/pretrain_seeds.py bench/results/pretrain_refresh --out bench/results/pretrain_refresh.json``

The folder holds runs of ``examples/pretrain.py`` named OPTION-SEED (``--name int8-0 --seed 0``). Runs of one seed have
the same initial weights and the same batches in the same order, so that differences are taken seed by seed.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from report import write_json
from rich.console import Console
from rich.table import Table

from galore_kernels.pretrain.runlog import LOG_NAME, read_log

BASELINE = "svd"


@dataclass(frozen=True)
class Option:
    """The runs of one option.

    Attributes:
        losses: final validation loss of each seed. differences: from the baseline's, seed by seed.
        refreshes: searches for a basis by all matrices together, of the first seed; None where the log has none.
        state_bytes: of the optimizer.
    """

    name: str
    losses: dict[str, float]
    differences: dict[str, float]
    refreshes: int | None
    state_bytes: int

    @property
    def mean(self) -> float:
        """Over the seeds."""
        return statistics.mean(self.losses.values())


def read_options(folder: Path) -> list[Option]:
    """The options of a folder's finished runs, by rising mean loss.

    Raises:
        ValueError: a run isn't finished, or differs from the others in more than the refresh's options.
    """
    final: dict[str, dict[str, float]] = {}
    rest: dict[str, tuple[int | None, int]] = {}
    alike: dict[str, object] = {}
    for path in sorted(folder.glob(f"*/{LOG_NAME}")):
        name, _, seed = path.parent.name.rpartition("-")
        log = read_log(path)
        if log[-1]["kind"] != "final":
            raise ValueError(f"{path}: expected a finished run; resume it, or remove it")
        config = log[0]["config"]
        common = {
            key: config[key] for key in ("preset", "optimizer", "steps", "lr", "rank", "update_proj_gap", "split")
        }
        common["corpus"] = log[0]["corpus"]["sha256"]
        if str(config["seed"]) != seed or common != (alike := alike or common):
            raise ValueError(f"{path}: expected seed {seed} and {alike}, got seed {config['seed']} and {common}")
        final.setdefault(name, {})[seed] = log[-1]["validation_loss"]
        subspaces = [entry for entry in log if entry["kind"] == "subspaces"]
        layers = subspaces[-1]["layers"].values() if subspaces else []
        found = sum(layer["refreshes"] for layer in layers) if subspaces else None
        rest.setdefault(name, (found, log[-1]["optimizer_state_bytes"]))
    baseline = final.get(BASELINE, {})
    options = [
        Option(
            name,
            losses,
            {seed: round(loss - baseline[seed], 6) for seed, loss in losses.items() if seed in baseline},
            *rest[name],
        )
        for name, losses in final.items()
    ]
    return sorted(options, key=lambda option: option.mean)


def main(arguments: list[str]) -> int:
    """Prints the table and writes the JSON."""
    parser = argparse.ArgumentParser(description="Validation losses of runs with several seeds each.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, help="JSON file")
    given = parser.parse_args(arguments)
    options = read_options(given.folder)
    table = Table(title="final validation loss, nats/byte")
    for column in ("option", "seeds", "mean", f"against {BASELINE}, mean", "seed by seed", "refreshes", "state"):
        table.add_column(column, justify="left" if column == "option" else "right")
    for option in options:
        differences = option.differences.values()
        table.add_row(
            option.name,
            "  ".join(f"{option.losses[seed]:.4f}" for seed in sorted(option.losses)),
            f"{option.mean:.4f}",
            f"{statistics.mean(differences):+.4f}" if differences else "",
            "  ".join(f"{difference:+.4f}" for difference in differences),
            "" if option.refreshes is None else str(option.refreshes),
            f"{option.state_bytes / 1e6:.2f} MB",
        )
    console = Console(width=None if Console().is_terminal else 140)
    console.print(table)
    if given.out is not None:
        write_json(
            given.out, {"format": 1, "baseline": BASELINE, "options": [asdict(o) | {"mean": o.mean} for o in options]}
        )
        console.print(f"wrote {given.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
