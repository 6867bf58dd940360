"""galore_kernels.pretrain in several processes: one run, that of one process."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from pretrain_runs import (
    STEPS,
    assert_equal_runs,
    last_state,
    log_lines,
    nano,
    resume,
    run_parallel,
    weights_differ,
    write_text,
)
from torchrun import torchrun

from galore_kernels.pretrain import cli, main

pytestmark = pytest.mark.slow

MORE = ["--accumulate", "2", "--clip", "1", "--threads", "1"]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(autouse=True)
def _without_a_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "plot_runs", lambda *_: None)  # half of what such a short run takes


def assert_same_losses(out: Path, one: str, other: str) -> None:
    for kind, key in (("train", "loss"), ("validation", "loss"), ("final", "validation_loss")):
        (lines, others) = (log_lines(out, name, kind) for name in (one, other))
        assert [line["step"] for line in lines] == [line["step"] for line in others]
        assert [line[key] for line in lines] == pytest.approx([line[key] for line in others], abs=2e-4)


@pytest.mark.parametrize(
    ("parallel", "optimizer", "clip", "bound"),
    [
        ("ddp", "galore", "0", 1e-5),  # its processes clip by the norm of the projections
        ("ddp", "apollo", "1", 1e-5),
        ("fsdp2", "galore", "0.1", 1e-5),  # less than any norm of these gradients
        ("fsdp2", "galore8bit", "0.1", 1e-3),  # the blocks of its codes lie elsewhere
        ("fsdp2", "adamw", "0.1", 1e-5),
    ],
)
def test_two_processes_make_the_run_of_one(
    parallel: str, optimizer: str, clip: str, bound: float, text: Path, tmp_path: Path
) -> None:
    arguments = [*MORE, "--optimizer", optimizer, "--clip", clip, "--eps", "1e-4"]
    assert run_parallel(2, nano(text, tmp_path, "two", *arguments, "--parallel", parallel)) == [0, 0]
    assert main(nano(text, tmp_path, "one", *arguments)) == 0
    assert_same_losses(tmp_path, "two", "one")
    assert weights_differ(tmp_path, "two", "one") < bound
    assert last_state(tmp_path, "two")["progress"]["step"] == STEPS
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]


def test_gradients_are_scattered_once_a_step(text: Path, tmp_path: Path) -> None:
    def count(rank: int) -> None:
        name = "reduce_scatter_single" if hasattr(dist, "reduce_scatter_single") else "reduce_scatter_tensor"
        scatter, log = getattr(dist, name), tmp_path / f"scattered-{rank}"

        def counted(*args: Any, **kwargs: Any) -> Any:
            with log.open("a") as file:
                file.write(".")
            return scatter(*args, **kwargs)

        setattr(dist, name, counted)

    arguments = nano(text, tmp_path, "two", *MORE, "--optimizer", "adamw", "--parallel", "fsdp2")
    assert run_parallel(2, arguments, count) == [0, 0]
    for rank in range(2):  # those of two blocks and of the rest
        assert len((tmp_path / f"scattered-{rank}").read_text()) == 3 * STEPS


def test_torchrun_starts_them(text: Path, tmp_path: Path) -> None:
    done = torchrun("-m", "galore_kernels.pretrain", *nano(text, tmp_path, "two", *MORE, "--parallel", "ddp"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("done: validation loss") == 1
    assert [path.name for path in tmp_path.glob("two/*.pt")]


@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
def test_a_resumed_run_is_bitwise_the_run_that_was_not_stopped(
    parallel: str, text: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in ("whole", "again"):
        assert run_parallel(2, nano(text, tmp_path, name, *MORE, "--parallel", parallel)) == [0, 0]
    (tmp_path / "again" / f"checkpoint-{STEPS:08d}.pt").unlink()
    assert run_parallel(2, resume(tmp_path, "again", "--parallel", parallel)) == [0, 0]
    assert capfd.readouterr().out.count("resumed at step 10") == 1
    assert_equal_runs(tmp_path, "whole", "again")


@pytest.mark.parametrize("optimizer", ["galore8bit", "adamw"])
def test_a_checkpoint_is_resumed_by_any_number_in_any_way(optimizer: str, text: Path, tmp_path: Path) -> None:
    arguments = [*MORE, "--optimizer", optimizer, "--clip", "0", "--eps", "1e-4"]
    assert run_parallel(2, nano(text, tmp_path, "divided", *arguments, "--parallel", "fsdp2")) == [0, 0]
    assert main(nano(text, tmp_path, "whole", *arguments)) == 0
    last = f"checkpoint-{STEPS:08d}.pt"
    others = [("divided", 4, "fsdp2"), ("divided", 1, "none"), ("divided", 2, "ddp"), ("whole", 2, "fsdp2")]
    for before, world, parallel in others:
        name = f"{before}-{world}-{parallel}"
        shutil.copytree(tmp_path / before, tmp_path / name, ignore=shutil.ignore_patterns(last))
        more = resume(tmp_path, name, "--parallel", parallel)
        assert (run_parallel(world, more) if world > 1 else [main(more)]) == [0] * world
        assert_same_losses(tmp_path, name, "whole")
        assert weights_differ(tmp_path, name, "whole") < (1e-3 if optimizer == "galore8bit" else 1e-5), name


def test_what_can_not_be_is_said(text: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(nano(text, tmp_path, "alone", "--parallel", "ddp")) == 2
    assert "expected processes of torchrun" in capfd.readouterr().err
    for more, message in (
        ([], "add --parallel ddp or fsdp2"),
        (["--parallel", "ddp", "--batch", "3"], "--batch 3: expected a multiple of the number of processes, 2"),
        (
            ["--parallel", "fsdp2", "--optimizer", "apollo"],
            "--optimizer galore8bit or galore or adamw, got apollo",
        ),
        (["--parallel", "fsdp2", "--optimizer", "galore_torch"], "got galore_torch"),
        (["--parallel", "fsdp2", "--gradients", "factored"], "expected --gradients dense, got factored"),
        (["--parallel", "fsdp2", "--updates", "layerwise"], "expected --updates whole, got layerwise"),
        (["--parallel", "fsdp2", "--weights", "int8"], "expected --weights float, got int8"),
        (["--parallel", "fsdp2", "--proj-type", "full"], "got full, which needs more than the part"),
        (["--parallel", "fsdp2", "--moments-on-refresh", "reset"], "expected --moments-on-refresh keep or rotate"),
    ):
        assert run_parallel(2, nano(text, tmp_path, "refused", *more)) == [2, 2]
        assert capfd.readouterr().err.count(message) == 2, message
    assert not (tmp_path / "refused").exists()
