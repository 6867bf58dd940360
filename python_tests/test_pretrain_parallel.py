"""galore_kernels.pretrain in the processes of torchrun: one run, that of one process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from pretrain_runs import STEPS, assert_equal_runs, last_state, log_lines, nano, write_text

from galore_kernels.pretrain import main

pytestmark = pytest.mark.slow

MORE = ["--accumulate", "2", "--clip", "1", "--threads", "1"]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"))


def torchrun(*arguments: str, world: int = 2) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, "-m", "galore_kernels.pretrain", *arguments],
        capture_output=True, text=True, timeout=240, check=False, env=environment,
    )  # fmt: skip


@pytest.mark.parametrize("optimizer", ["galore", "apollo"])
def test_two_processes_make_the_run_of_one(optimizer: str, text: Path, tmp_path: Path) -> None:
    # GaLore's processes clip by the norm of the projections.
    arguments = [*MORE, "--optimizer", optimizer, *(["--clip", "0"] if optimizer == "galore" else [])]
    done = torchrun(*nano(text, tmp_path, "two", *arguments, "--parallel", "ddp"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("done: validation loss") == 1
    assert main(nano(text, tmp_path, "one", *arguments)) == 0
    for kind, key in (("train", "loss"), ("validation", "loss"), ("final", "validation_loss")):
        (two, one) = (log_lines(tmp_path, name, kind) for name in ("two", "one"))
        assert [line["step"] for line in two] == [line["step"] for line in one]
        assert [line[key] for line in two] == pytest.approx([line[key] for line in one], abs=2e-4)
    assert last_state(tmp_path, "two")["progress"]["step"] == STEPS
    assert sorted(path.name for path in tmp_path.iterdir()) == ["loss_curves.png", "one", "two"]


def test_a_resumed_run_is_bitwise_the_run_that_was_not_stopped(text: Path, tmp_path: Path) -> None:
    for name in ("whole", "again"):
        assert torchrun(*nano(text, tmp_path, name, *MORE, "--parallel", "ddp")).returncode == 0
    (tmp_path / "again" / f"checkpoint-{STEPS:08d}.pt").unlink()
    done = torchrun("--resume", str(tmp_path / "again"), "--out", str(tmp_path), "--parallel", "ddp", "--threads", "1",
                    "--device", "cpu", "--log-every", "3", "--save-every", "5")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "resumed at step 10" in done.stdout
    assert_equal_runs(tmp_path, "whole", "again")


def test_what_can_not_be_is_said(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(nano(text, tmp_path, "alone", "--parallel", "ddp")) != 0
    assert "expected processes of torchrun" in capsys.readouterr().err
    done = torchrun(*nano(text, tmp_path, "unsaid"))
    assert done.returncode != 0
    assert "add --parallel ddp" in done.stderr
    done = torchrun(*nano(text, tmp_path, "uneven", "--parallel", "ddp", "--batch", "3"))
    assert done.returncode != 0
    assert "--batch 3: expected a multiple of the number of processes, 2" in done.stderr
