"""Fine-tune a small RoBERTa with GaLore through the Hugging Face Trainer, and compare with AdamW and LoRA.

    python examples/finetune.py                                   # GaLore, rank 4; pre-trains first, once
    python examples/finetune.py --method lora-r4 --lr 3e-3        # a rival, on the same encoder and task
    python examples/finetune.py --resume                          # after Ctrl-C, a kill or a power cut
    python examples/finetune.py --table bench/results             # all methods; finetune.json and finetune.png there

Nothing is downloaded. The task is made from Python's standard library: which of eight packages a few lines come from.
The packages' names are hidden in all text, and no file gives lines to more than one of training, validation and test.
A byte-pair tokenizer and an encoder of 4 layers, 128 wide, are trained on the library first (masked tokens; without
the files that validate and test), and kept in the output folder. It needs `pip install '.[pretrain,huggingface]' peft`.

What is compared, with `--table`: AdamW on all parameters (torch's, fused), also on an encoder that is not pre-trained;
GaLore (`GaLoreFusedAdamW` by `trainer_optimizer`) at ranks 4 and 8 with scale 16 / rank (4 at rank 4, as in its
authors' example for GLUE), the gradients of the encoder's matrices projected and all else at full rank, or the
embeddings frozen, its subspaces refreshed every 50 steps of 360 (theirs: every 500); LoRA (peft, alpha 2 x rank) on the
same matrices at the same ranks. The classification head, new, is trained at full rank by all. Batches, epochs, warm-up,
linear decay and gradient clipping are alike; there is no weight decay and no dropout.

The protocol: each method has the same sweep of learning rates with the first seed; the one with the best accuracy in
validation is trained with the other seeds; what is reported is accuracy on the test part, after the last step. Seeds
draw the head, LoRA's adapters and the order of the batches; all start from the one pre-trained encoder. Bytes are
counted from tensors, activations are not in them. Times are of a step from its batch to its update, over all of a
method's runs: the median by the clock, and median and mean (refreshes of the subspace included) of the process's own
time, which others on the machine disturb less. Methods take turns, run by run.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetuning.settings import FULL, METHODS, QUICK

if TYPE_CHECKING:
    from finetuning.report import Row
    from finetuning.training import Experiment

# Of the comparison; the first seed sweeps the rates.
LEARNING_RATES = (1e-3, 3e-3, 1e-2, 3e-4)
SEEDS = (0, 1, 2)

PACKAGES = ("transformers", "accelerate", "peft", "tokenizers")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    options = _parser().parse_args(arguments)
    from finetuning.training import Experiment  # takes seconds: after --help and mistakes

    experiment = Experiment(options.out, QUICK if options.quick else FULL)
    if options.table is not None:
        count = 1 if options.quick else None
        _compare(experiment, LEARNING_RATES[:count], SEEDS[:count], options.resume, options.table)
        return 0
    run = experiment.fine_tune(METHODS[options.method], options.lr, options.seed, options.resume)
    print(f"{_line(run)}\nthe model is in {experiment.run_folder(METHODS[options.method], options.lr, options.seed)}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Fine-tune with GaLore through the Hugging Face Trainer, or a rival.")
    parser.add_argument("--method", choices=METHODS, default="galore-r4", help="default: galore-r4")
    parser.add_argument("--lr", type=float, default=1e-3, help="learning rate (default: 1e-3)")
    parser.add_argument("--seed", type=int, default=0, help="of the new weights and the batches (default: 0)")
    parser.add_argument("--out", type=Path, default=Path("finetune-runs"), help="folder (default: finetune-runs)")
    parser.add_argument("--resume", action="store_true", help="go on with what an interruption left in --out")
    parser.add_argument("--quick", action="store_true", help="seconds, to see that everything runs")
    parser.add_argument("--table", type=Path, metavar="FOLDER",
                        help="compare all methods; finetune.json and finetune.png go there")  # fmt: skip
    return parser


def _line(run: dict[str, Any]) -> str:
    return (
        f"{run['method']}, lr {run['lr']:g}, seed {run['seed']}: accuracy {run['validation_accuracy']:.1%} in "
        f"validation, {run['test_accuracy']:.1%} in test; optimizer state {run['state_bytes'] / 1e6:.3f} MB"
    )


def _compare(experiment: Experiment, rates: Sequence[float], seeds: Sequence[int], resume: bool, folder: Path) -> None:
    sys.path.append(str(Path(__file__).resolve().parents[1] / "bench"))
    import machine
    import torch
    from finetuning.report import as_table, draw
    from report import write_json
    from rich.console import Console

    facts = machine.describe(torch.device("cpu"), torch.get_num_threads(), 0)
    rows = _rows(experiment, rates, seeds, resume)
    baselines = experiment.baselines()
    title = (
        f"which of {len(experiment.task.packages)} packages: {len(experiment.parts['train']):,} snippets to train on, "
        f"{len(experiment.parts['test']):,} to test; mean accuracy over {len(rows[0].runs)} seed(s)"
    )
    console = Console(width=None if Console().is_terminal else 160)
    console.print(as_table(rows, baselines, title))
    versions = {name: metadata.version(name) for name in PACKAGES}
    write_json(folder / "finetune.json", {
        "format": 1,
        "machine": facts | {"versions": facts["versions"] | versions},
        "settings": experiment.settings.to_dict() | {"learning_rates": rates, "seeds": seeds},
        "task": experiment.task.facts(),
        "pretraining": experiment.pretraining_facts(),
        "baselines": baselines,
        "methods": [row.to_dict() for row in rows],
    })  # fmt: skip
    draw(rows, baselines, title, folder / "finetune.png")
    console.print(f"wrote {folder / 'finetune.json'} and {folder / 'finetune.png'}")


def _rows(experiment: Experiment, rates: Sequence[float], seeds: Sequence[int], resume: bool) -> list[Row]:
    """The protocol: the sweep with the first seed, then the best in validation with the others."""
    from finetuning.report import Row

    def fine_tune(name: str, lr: float, seed: int) -> dict[str, Any]:
        run = experiment.fine_tune(METHODS[name], lr, seed, resume)
        print(_line(run), flush=True)
        return run

    sweeps: dict[str, list[dict[str, Any]]] = {name: [] for name in METHODS}
    for lr in rates:
        for name, sweep in sweeps.items():
            sweep.append(fine_tune(name, lr, seeds[0]))
    runs = {name: [max(sweep, key=lambda run: run["validation_accuracy"])] for name, sweep in sweeps.items()}
    for seed in seeds[1:]:
        for name, chosen in runs.items():
            chosen.append(fine_tune(name, chosen[0]["lr"], seed))
    return [Row(name, sweeps[name], runs[name]) for name in METHODS]


if __name__ == "__main__":
    sys.exit(main())
