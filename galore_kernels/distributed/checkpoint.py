"""Checkpoints that several processes write together, of which a kill at any moment loses none.

    from galore_kernels.distributed import checkpoint

    state = {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizer),
        "step": step,
    }
    checkpoint.save(state, "runs/7b")

and later, in any number of processes, with a model and an optimizer that were made anew::

    state = {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizer),
        "step": 0,
    }
    checkpoint.load(state, "runs/7b")
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, optimizer, optim_state_dict=state["optimizer"])
    step = state["step"]

(The four functions are torch's, in ``torch.distributed.checkpoint.state_dict``.) Each process writes what it has of
DTensors, and reads what it is to have: nothing is ever whole in one place.

``torch.distributed.checkpoint`` writes into one folder, which is no checkpoint while that lasts. Here every save has a
folder of its own below the path, ``save-NUMBER``. It is complete once torch has put ``.metadata`` there, which it does
last and by a rename; only then is the one before removed. What a killed save leaves, the next one clears away.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load as read_parts
from torch.distributed.checkpoint.state_dict_saver import save as write_parts

from galore_kernels.checkpoint import CheckpointError, fsync_folder

__all__ = ["CheckpointError", "load", "save"]

_METADATA = ".metadata"
_NAME = re.compile(r"save-(\d{8,})")


def save(state: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Writes ``state`` below ``path``, and then removes what was saved there before. All processes call it.

    Args:
        state: state dicts, divided among the processes or not, and plain values.
        path: folder, made if it isn't there; on a file system that all processes see. The first process' path counts.
            One run at a time saves to it; files of other names there are left alone.

    Raises:
        CheckpointError: in every process; what was saved before is untouched.
    """
    remedy = "what was saved before is still there; free space, fix the permissions, or leave out what can't be pickled"
    with _explained(f'cannot save to "{path}"', remedy):
        folder = _of_first(lambda: _new_folder(Path(path)))
        try:
            with _alone_or_not():
                write_parts(state, checkpoint_id=folder)
        except CheckpointException:  # of all processes, none of which writes any more
            if _is_first():
                shutil.rmtree(folder, ignore_errors=True)
            raise
        _of_first(lambda: _replace_others(folder))


def load(state: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Reads the newest complete save below ``path`` into ``state``. All processes, of any number, call it.

    8-bit moments that were divided are read into divided ones: a process that goes on alone calls ``fully_shard`` too
    (``torchrun --nproc-per-node 1``).

    Args:
        state: of the structure that was saved: tensors are written to in place, other values replaced.
        path: of :func:`save`. The first process' counts.

    Raises:
        CheckpointError: in every process: there is nothing, or nothing complete, or it doesn't fit ``state``.
    """
    remedy = "pass the state dicts of a model and an optimizer made as those that were saved, or restore a copy"
    with _explained(f'cannot load "{path}"', remedy):
        folder = _of_first(lambda: _newest(Path(path)))
        with _alone_or_not():
            read_parts(state, checkpoint_id=folder)


def _saves(path: Path) -> list[Path]:
    """Complete or not, the oldest first."""
    found = [folder for folder in path.iterdir() if _NAME.fullmatch(folder.name)]
    return sorted(found, key=lambda folder: int(folder.name.partition("-")[2]))


def _is_complete(folder: Path) -> bool:
    return (folder / _METADATA).exists()


def _new_folder(path: Path) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    saves = _saves(path)
    kept = [folder for folder in saves if _is_complete(folder)][-1:]
    _remove(set(saves) - set(kept))
    folder = path / f"save-{int(saves[-1].name.partition('-')[2]) + 1 if saves else 1:08d}"
    folder.mkdir()
    return folder


def _replace_others(folder: Path) -> Path:
    fsync_folder(folder)
    fsync_folder(folder.parent)
    _remove(set(_saves(folder.parent)) - {folder})
    return folder


def _remove(folders: set[Path]) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def _newest(path: Path) -> Path:
    if not path.is_dir():
        raise CheckpointError(f'cannot load "{path}": there is no such folder; pass the path that was saved to')
    saves = _saves(path)
    complete = [folder for folder in saves if _is_complete(folder)]
    if not complete:
        found = "only " + ", ".join(folder.name for folder in saves) + " without it" if saves else "none"
        raise CheckpointError(
            f'cannot load "{path}": expected a folder save-NUMBER in which {_METADATA} says that it is complete, found '
            f"{found}; pass the path that was saved to, or begin anew"
        )
    return complete[-1]


def _is_first() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def _of_first(find: Callable[[], Path]) -> Path:
    """What the first process finds, in all of them; what it raises, too."""
    answer: list[Any] = [None, None]
    if _is_first():
        try:
            answer[0] = find()
        except (CheckpointError, OSError) as error:
            answer[1] = error
    if dist.is_initialized():
        dist.broadcast_object_list(answer)
    if answer[1] is not None:
        raise answer[1]
    return Path(answer[0])


@contextlib.contextmanager
def _alone_or_not() -> Iterator[None]:
    """torch warns of a process that is alone, which is no mistake here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")
        yield


@contextlib.contextmanager
def _explained(what: str, remedy: str) -> Iterator[None]:
    """Errors of torch and of the system as CheckpointError."""
    try:
        yield
    except CheckpointError:
        raise
    except CheckpointException as error:  # no Exception: what some of the processes have raised, told to all
        failed = "; ".join(f"process {rank}: {cause}" for rank, (cause, _) in error.failures.items())
        raise CheckpointError(f"{what}: {failed}; {remedy}") from error
    except OSError as error:
        raise CheckpointError(f"{what}: {error}; {remedy}") from error
    except RuntimeError as error:  # of a collective: gloo's have no class of their own
        raise CheckpointError(
            f"{what}: {error}; if another process has ended, see what it has said and start all of them again: what "
            "was saved before is still there"
        ) from error
