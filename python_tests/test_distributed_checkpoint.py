"""galore_kernels.distributed.checkpoint: saved together, killed in between, what is said of errors."""

from __future__ import annotations

import functools
import os
import shutil
import signal
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from forks import run_ranks
from fsdp_process import Case, Training, Uneven, state_of
from kills import kill_at, kill_in_backward
from lowrank_ddp_process import raised
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemWriter
from torch.distributed.checkpoint.state_dict import set_model_state_dict, set_optimizer_state_dict
from worker_processes import difference

from galore_kernels.distributed import checkpoint

pytestmark = pytest.mark.slow

CASE = Case(model=Uneven, gap=8)
FIRST, SECOND, LAST = 10, 14, 20  # steps after which is saved, and done; the bases are found anew at 16
LOST = 3  # exit status of a process that has lost another


def begin(*, sharded: bool, seed: int = 0) -> Training:
    return Training.begin(CASE, sharded=sharded, seed=seed)


def meet() -> None:
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
    dist.init_process_group("gloo", timeout=timedelta(seconds=30))


def save(training: Training, path: Path, step: int) -> None:
    checkpoint.save({**state_of(training), "step": step}, path)


def go_on(path: Path, *, sharded: bool) -> tuple[int, dict[str, torch.Tensor]]:
    """The step of the newest save, and the weights at the end of the training that goes on from it."""
    training = begin(sharded=sharded, seed=1)
    state = {**state_of(training), "step": -1}
    checkpoint.load(state, path)
    set_model_state_dict(training.model, state["model"])
    set_optimizer_state_dict(training.model, training.optimizer, optim_state_dict=state["optimizer"])
    training.train(state["step"], LAST - state["step"])
    return state["step"], training.weights()


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    """At the end of a training of one process that nothing has stopped."""
    training = begin(sharded=False)
    training.train(0, LAST)
    return training.weights()


#: The moment -> the process that is killed, how, and the step that is found then. Of saves it is the second.
KILLS: dict[str, tuple[int, Callable[[Training], None], int]] = {
    "backward": (1, lambda training: kill_in_backward(training.model.mlp_up, call=FIRST + 2), FIRST),
    "nothing written": (1, lambda _: kill_at(FileSystemWriter, "write_data", call=2), FIRST),
    "part written": (1, lambda _: kill_at(FileSystemWriter, "write_data", call=2, after=True), FIRST),
    "before the swap": (0, lambda _: kill_at(FileSystem, "rename", call=2), FIRST),
    "after the swap": (0, lambda _: kill_at(FileSystem, "rename", call=2, after=True), SECOND),
    "before it is removed": (0, lambda _: kill_at(shutil, "rmtree"), SECOND),
}


def train_and_save(moment: str, path: Path, rank: int) -> int:
    killed, install, _ = KILLS[moment]
    meet()
    training = begin(sharded=True)
    if rank == killed:
        install(training)
    try:
        training.train(0, FIRST)
        save(training, path, FIRST)
        training.train(FIRST, SECOND - FIRST)
        save(training, path, SECOND)
    except checkpoint.CheckpointError as error:
        return LOST if str(path) in str(error) and "if another process has ended" in str(error) else 1
    except RuntimeError:
        return LOST
    return 0


def resume(path: Path, rank: int) -> int:
    """Goes on, and saves, which clears away what a kill has left."""
    meet()
    found = go_on(path, sharded=True)
    if rank == 0:
        torch.save(found, path.parent / "found.pt")
    save(begin(sharded=True), path, LAST)
    return 0


def read(path: Path) -> tuple[int, dict[str, torch.Tensor]]:
    found = torch.load(path.parent / "found.pt", weights_only=True)
    return found[0], found[1]


@pytest.mark.parametrize("moment", KILLS)
def test_kill_9_loses_no_checkpoint(moment: str, tmp_path: Path, weights: dict[str, torch.Tensor]) -> None:
    path = tmp_path / "saved"
    killed, _, expected = KILLS[moment]
    statuses = run_ranks(2, functools.partial(train_and_save, moment, path))
    assert statuses[killed] == -signal.SIGKILL
    assert statuses[1 - killed] == LOST
    found, resumed = go_on(path, sharded=False)
    assert found == expected
    assert difference(resumed, weights) < 1e-5
    if moment in ("part written", "before it is removed"):
        assert len(os.listdir(path)) == 2
        assert run_ranks(3, functools.partial(resume, path)) == [0, 0, 0]
        found, resumed = read(path)
        assert found == expected
        assert difference(resumed, weights) < 1e-5
        assert os.listdir(path) == ["save-00000003"]


def test_one_process_needs_no_group(tmp_path: Path, weights: dict[str, torch.Tensor]) -> None:
    training = begin(sharded=False)
    training.train(0, FIRST)
    path = tmp_path / "new" / "saved"
    for _ in range(2):
        save(training, path, FIRST)
    (path / "notes.txt").touch()
    save(training, path, FIRST)
    assert sorted(os.listdir(path)) == ["notes.txt", "save-00000003"]
    step, found = go_on(path, sharded=False)
    assert step == FIRST
    assert all(torch.equal(found[name], weights[name]) for name in weights)


def errors(folder: Path, rank: int) -> int:
    """Leaves the messages of this process in a file."""
    meet()
    state: dict[str, Any] = {"model": begin(sharded=True).model.state_dict()}
    path = folder / "saved"
    checkpoint.save(state, path)

    def damage(what: Callable[[Path], None]) -> Path:
        copy = folder / f"copy-{what.__name__}"
        if rank == 0:
            shutil.copytree(path, copy)
            what(copy / "save-00000001")
        dist.barrier()
        return copy

    def cut(saved: Path) -> None:
        os.truncate(next(saved.glob("*.distcp")), 100)

    def incomplete(saved: Path) -> None:
        (saved / ".metadata").unlink()

    (folder / "file").touch()
    calls: dict[str, Callable[[], None]] = {
        "missing": lambda: checkpoint.load(state, folder / "missing"),
        "empty": lambda: checkpoint.load(state, folder),
        "incomplete": lambda: checkpoint.load(state, damage(incomplete)),
        "cut": lambda: checkpoint.load(state, damage(cut)),
        "other keys": lambda: checkpoint.load({**state, "step": 0}, path),
        "other shapes": lambda: checkpoint.load({"model": {"head.weight": torch.zeros(3, 3)}}, path),
        "no folder": lambda: checkpoint.save(state, folder / "file" / "below"),
        "not to be pickled": lambda: checkpoint.save({**state, "step": lambda: rank}, path),
        "after a kill": lambda: checkpoint.save({**state, "step": lambda: rank}, folder / "copy-incomplete"),
        "one alone": lambda: checkpoint.save({**state, **({"step": lambda: 0} if rank else {"step": 0})}, path),
    }
    found = {name: raised(checkpoint.CheckpointError, call) for name, call in calls.items()}
    dist.barrier()  # until the first has removed what failed
    found["saves"] = str(os.listdir(path))
    checkpoint.load(state, path)
    torch.save(found, folder / f"{rank}.pt")
    return 0


def test_errors_name_path_and_remedy_in_every_process(tmp_path: Path) -> None:
    assert run_ranks(2, functools.partial(errors, tmp_path)) == [0, 0]
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        saves = found.pop("saves")
        assert saves == "['save-00000001']"
        assert os.listdir(tmp_path / "copy-incomplete") == []  # a kill's leftovers go before anything is written
        for name, message in found.items():
            assert str(tmp_path) in message, name
            assert ";" in message, name
        assert "there is no such folder" in found["missing"]
        assert "found none; pass the path" in found["empty"]
        assert "found only save-00000001 without it" in found["incomplete"]
        assert "restore a copy" in found["cut"]
        assert "Missing key in checkpoint state_dict: step" in found["other keys"]
        assert "Size mismatch" in found["other shapes"]
        assert "Not a directory" in found["no folder"]
        for name in ("not to be pickled", "one alone"):
            assert "process 1: Can't pickle" in found[name]
            assert "what was saved before is still there" in found[name]
