"""What a checkpoint of a run holds, and going on from one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from galore_kernels import checkpoint

from .config import Config, PretrainError, differences
from .corpus import Corpus
from .states import load_states

__all__ = ["Progress", "find_checkpoints", "load_checkpoint", "restore_run", "save_run"]

_FORMAT = 1
_KEEP = 2  # the latest checkpoint and the one before


@dataclass
class Progress:
    """Where a run stands, apart from its model and optimizer; the windows of a step follow from its number."""

    step: int = 0  # steps done
    seconds: float = 0.0  # spent training and validating, in all sessions
    interval_steps: int = 0  # since the last line of the log:
    interval_loss: float = 0.0
    interval_seconds: float = 0.0
    validation_loss: float | None = None


def save_run(
    folder: Path,
    config: Config,
    corpus: Corpus,
    model: dict[str, Any],
    optimizer: dict[str, Any],
    progress: Progress,
    device: torch.device,
) -> Path:
    """Write ``checkpoint-STEP.pt`` to ``folder`` and remove all but it and the one before.

    Args:
        model, optimizer: of :func:`galore_kernels.pretrain.states.whole_states`.

    Raises:
        CheckpointError: it could not be written; the earlier ones are as they were.
    """
    path = folder / f"checkpoint-{progress.step:08d}.pt"
    random_state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        random_state["cuda"] = torch.cuda.get_rng_state(device)
    state = {
        "format": _FORMAT,
        "config": config.to_dict(),
        "corpus": corpus.facts(),
        "progress": dict(vars(progress)),
        "model": model,
        "optimizer": optimizer,
        "random": random_state,
    }
    checkpoint.save(state, path)
    for old in find_checkpoints(folder)[_KEEP:]:
        old.unlink()
    return path


def find_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints of a run, the latest first."""
    return sorted(folder.glob("checkpoint-*.pt"), reverse=True)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """State of a run, on the CPU.

    Raises:
        CheckpointError: the file is damaged; the message names the checkpoint before it, if there is one.
        PretrainError: the file holds something else.
    """
    try:
        state = checkpoint.load(path, map_location="cpu")
    except checkpoint.CheckpointError as error:
        earlier = [other for other in find_checkpoints(path.parent) if other.name < path.name]
        if not earlier:
            raise
        raise checkpoint.CheckpointError(f"{error}\nThe checkpoint before it: --resume {earlier[0]}") from error
    if not isinstance(state, dict) or state.get("format") != _FORMAT or "config" not in state:
        raise PretrainError(f'"{path}": expected a checkpoint of a run in format {_FORMAT}; it holds something else')
    return state


def restore_run(
    path: Path, config: Config, corpus: Corpus, model: torch.nn.Module, optimizer: torch.optim.Optimizer
) -> Progress:
    """Load a checkpoint into ``model``, ``optimizer`` and the random generators.

    Raises:
        PretrainError: the run had another configuration or corpus; the message names what differs.
    """
    state = load_checkpoint(path)
    differing = differences(
        state["config"] | {f"corpus {key}": value for key, value in state["corpus"].items()},
        config.to_dict() | {f"corpus {key}": value for key, value in corpus.facts().items()},
    )
    if differing:
        raise PretrainError(
            f'"{path}" belongs to another configuration: {differing}. Resume with the options and the text it began '
            "with (options that are left out come from the checkpoint), or begin a new run"
        )
    load_states(model, optimizer, config, state["model"], state["optimizer"])
    torch.set_rng_state(state["random"]["cpu"])
    if "cuda" in state["random"] and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["random"]["cuda"])
    return Progress(**state["progress"])
