"""``galore-pretrain``: the command line of the pre-training example."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from galore_kernels.checkpoint import CheckpointError

from .config import DTYPES, GRADIENTS, OPTIMIZERS, SPLITS, UPDATES, WEIGHTS, Config, PretrainError, differences
from .corpus import load_corpus
from .display import NoDisplay, choose_display
from .parallel import PARALLEL, processes
from .plot import PICTURE_NAME, comparison_table, plot_runs, read_runs
from .presets import PRESETS
from .resume import find_checkpoints, load_checkpoint
from .runlog import LOG_NAME
from .train import RunInterruptedError, train

__all__ = ["main"]

_NEWEST = Path()  # --resume without a path


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status.

    0: done. 2: something to put right, said on stderr. 128 + N: stopped by signal N (SIGINT, SIGTERM) after saving.
    """
    options = _parser().parse_args(arguments)
    try:
        if options.out.exists() and not options.out.is_dir():
            raise PretrainError(f"--out {options.out}: expected a folder, or a name that is free; it is a file")
        if options.plot_only or options.compare or _train(options):
            _show_runs(options)
    except RunInterruptedError as stop:
        print(f"\nstopped by {stop}; the state was saved. To go on:\n    galore-pretrain --resume {stop.folder}")
        return 128 + stop.signal_number
    except (PretrainError, CheckpointError) as error:
        print(f"galore-pretrain: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="galore-pretrain",
        description="Pre-train a Llama from scratch with GaLoreFusedAdam8bit or a rival, on the Python standard "
        "library's source or your own text.",
        epilog="What is not given comes from the preset; with --resume, from the checkpoint.",
        argument_default=argparse.SUPPRESS,
    )
    run = parser.add_argument_group("the run")
    run.add_argument("--preset", choices=PRESETS, help="model shape and settings (default: tiny)")
    run.add_argument("--optimizer", choices=OPTIMIZERS, help="default: galore8bit (GaLoreFusedAdam8bit)")
    run.add_argument("--steps", type=int)
    run.add_argument("--seed", type=int, help="of the initial weights, the order of the text and the optimizer")

    where = parser.add_argument_group("files")
    where.add_argument("--out", type=Path, default=Path("runs"), help="folder of runs (default: runs)")
    where.add_argument("--name", default=None, help="subfolder of this run (default: PRESET-OPTIMIZER, numbered)")
    where.add_argument("--resume", type=Path, nargs="?", const=_NEWEST, default=None, metavar="PATH",
                       help="go on from a checkpoint or a run's folder (default: the newest in --out)")  # fmt: skip
    where.add_argument("--save-every", type=int, default=None, help="steps between checkpoints")
    where.add_argument("--log-every", type=int, default=None, help="steps between lines of the log")
    where.add_argument("--plot-only", action="store_true", default=False, help="only draw the runs in --out")
    where.add_argument("--compare", action="store_true", default=False, help="only print the table of runs in --out")

    text = parser.add_argument_group("text")
    text.add_argument("--text", nargs="+", metavar="PATH", help="files and folders (default: the standard library)")
    text.add_argument("--dataset", metavar="NAME[:CONFIG]", help="a data set of the Hugging Face hub, streamed")
    text.add_argument("--dataset-column", metavar="COLUMN", help="its column of text (default: text)")
    text.add_argument("--dataset-tokens", type=int, help="training tokens to take (default: what the run reads)")
    text.add_argument("--tokenizer", metavar="NAME", help="a tokenizer of the hub or a folder (default: bytes)")
    text.add_argument("--split", choices=SPLITS, help="validate on whole files (default) or on windows from all files")
    text.add_argument("--val-windows", type=int, help="windows to validate on")
    text.add_argument("--eval-every", type=int, help="steps between validations")

    model = parser.add_argument_group("model")
    for name in ("hidden", "intermediate", "layers", "heads"):
        model.add_argument(f"--{name}", type=int)
    model.add_argument("--sequence", type=int, help="tokens in a window")
    model.add_argument("--dtype", choices=DTYPES, help="of weights and computation")

    training = parser.add_argument_group("training")
    training.add_argument("--lr", type=float, help="peak learning rate")
    training.add_argument("--warmup", type=int, help="steps of linear warm-up before the cosine")
    training.add_argument("--batch", type=int, help="windows in a micro-batch")
    training.add_argument("--accumulate", type=int, help="micro-batches in a step")
    training.add_argument("--clip", type=float, help="largest norm of the gradient (default: 0, off)")
    training.add_argument("--weight-decay", type=float)
    training.add_argument("--eps", type=float, help="Adam's (default: 1e-8)")

    galore = parser.add_argument_group("projection (optimizers that project)")
    galore.add_argument("--rank", type=int)
    galore.add_argument("--update-proj-gap", type=int, help="steps between refreshes of the bases")
    galore.add_argument("--scale", type=float)
    galore.add_argument("--proj-type", help="as in galore_torch (default: std)")
    ours = parser.add_argument_group("refresh of the subspace (ours)")
    ours.add_argument("--refresh-method", help="how a basis is found: randomized (default) or svd")
    ours.add_argument("--refresh-schedule", help="periodic (default), staggered or adaptive")
    ours.add_argument("--warm-start", action=argparse.BooleanOptionalAction, help="search from the previous basis")
    ours.add_argument(
        "--async-refresh", action=argparse.BooleanOptionalAction, help="use a basis from the next step on"
    )
    ours.add_argument("--moments-on-refresh", help="keep (default), rotate or reset")
    ours.add_argument("--basis-format", help="int8 or int4 (default: the weights' dtype)")

    memory = parser.add_argument_group("memory (ours)")
    memory.add_argument("--gradients", choices=GRADIENTS, help="factored: of matrices in their subspace only")
    memory.add_argument("--updates", choices=UPDATES, help="layerwise: inside the backward pass, gradients freed")
    memory.add_argument("--weights", choices=WEIGHTS, help="int8: of matrices, with our optimizers")

    machine = parser.add_argument_group("machine")
    machine.add_argument("--device", default=None, help="default: cuda where there is one, else cpu")
    machine.add_argument("--parallel", choices=PARALLEL, default="none",
                         help="of the processes that torchrun has started: ddp shares each batch among them, fsdp2 "
                         "weights and optimizer state as well")  # fmt: skip
    machine.add_argument("--threads", type=int, default=None, help="CPU threads (default: torch's)")
    return parser


def _train(options: argparse.Namespace) -> bool:
    """Whether this process, of several, is the one to say what there is to say."""
    fields = {field.name for field in dataclasses.fields(Config)}
    given = {key: value for key, value in vars(options).items() if key in fields}
    device = _device(options.device)
    if options.threads is not None:
        if options.threads < 1:
            raise PretrainError(f"--threads {options.threads}: expected at least 1")
        torch.set_num_threads(options.threads)
    resume = None
    if options.resume is not None:
        resume = _checkpoint_to_resume(options)
        options.out = resume.parent.parent
        config = _resumed_config(resume, given)
    else:
        config = Config.resolve(given)
    preset = PRESETS[config.preset]
    every = {
        "log_every": _positive("--log-every", options.log_every, preset.log_every),
        "save_every": _positive("--save-every", options.save_every, preset.save_every),
    }
    with processes(options.parallel, config, device) as own, tempfile.TemporaryDirectory() as elsewhere:
        # The first process' alone is the run's folder and the cache's; the others read no file that it writes.
        out = options.out if own.is_first else Path(elsewhere)
        corpus = load_corpus(config, out / "cache")
        folder = resume.parent if resume is not None else _new_folder(out, options.name, config)
        if not own.is_first:
            folder = Path(elsewhere)
        display = choose_display() if own.is_first else NoDisplay()
        train(config, corpus, folder, display, device=device, resume=resume, processes=own, **every)
        return own.is_first


def _show_runs(options: argparse.Namespace) -> None:
    runs = read_runs(options.out)
    print(comparison_table(runs))
    if not options.compare:
        picture = options.out / PICTURE_NAME
        plot_runs(runs, picture)
        print(f"loss curves: {picture}")


def _device(name: str | None) -> torch.device:
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        raise PretrainError(f"--device {name}: {error}; expected cpu, cuda or cuda:N of this machine") from error
    return device


def _positive(flag: str, given: int | None, default: int) -> int:
    if given is None:
        return default
    if given < 1:
        raise PretrainError(f"{flag} {given}: expected at least 1")
    return given


def _new_folder(out: Path, name: str | None, config: Config) -> Path:
    """Folder of a new run: the name that was asked for unless it holds a run, else the first free number."""
    if name is not None:
        folder = out / name
        if find_checkpoints(folder):  # killed before its first checkpoint, a run can only begin again
            raise PretrainError(f"--name {name}: {folder} holds a run; add --resume to go on with it, or choose a name")
    else:
        folder, number = out / config.run_name(), 1
        while (folder / LOG_NAME).exists():
            number += 1
            folder = out / f"{config.run_name()}-{number}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _checkpoint_to_resume(options: argparse.Namespace) -> Path:
    path: Path = options.resume
    if path == _NEWEST:
        folders = [options.out / options.name] if options.name is not None else sorted(options.out.glob("*/"))
        found = [checkpoint for folder in folders for checkpoint in find_checkpoints(folder)[:1]]
        if not found:
            raise PretrainError(f"--resume: no checkpoint in {options.out}; give the folder of a run, or begin one")
        return max(found, key=lambda checkpoint: checkpoint.stat().st_mtime)
    if path.is_dir():
        found = find_checkpoints(path)
        if not found:
            raise PretrainError(f"--resume {path}: no checkpoint in that folder; begin a new run")
        return found[0]
    if not path.exists():
        raise PretrainError(f"--resume {path}: there is no such file or folder")
    return path


def _resumed_config(path: Path, given: dict[str, Any]) -> Config:
    saved = load_checkpoint(path)["config"]
    differing = differences(saved, saved | given)
    if differing:
        raise PretrainError(
            f"--resume {path}: the run has another configuration: {differing}. Leave these options out "
            "(they are in the checkpoint), or begin a new run"
        )
    return Config.resolve(saved)
