"""galore-pretrain of which one process is killed: the others end by themselves, the run goes on."""

from __future__ import annotations

import functools
import signal
import time
from datetime import timedelta
from pathlib import Path

import pretrain_killed
import pytest
from pretrain_runs import STEPS, nano, resume, run_parallel, weights_differ, write_text
from torchrun import torchrun

from galore_kernels import checkpoint
from galore_kernels.pretrain import cli, main, parallel

pytestmark = pytest.mark.slow

ARGUMENTS = ["--accumulate", "2", "--clip", "0.1", "--eps", "1e-4", "--optimizer", "galore", "--threads", "1"]
FSDP2 = ["--parallel", "fsdp2"]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def out(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of runs, with one of a single process that nothing has stopped."""
    path = tmp_path_factory.mktemp("out")
    assert main(nano(text, path, "whole", *ARGUMENTS)) == 0
    return path


@pytest.fixture(autouse=True)
def _without_a_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "plot_runs", lambda *_: None)  # half of what such a short run takes


def assert_goes_on(out: Path, name: str, step: int, capfd: pytest.CaptureFixture[str], world: int) -> None:
    for path in (out / name).glob("*.pt"):
        checkpoint.load(path)
    capfd.readouterr()
    arguments = resume(out, name, *(FSDP2 if world > 1 else []))
    assert (run_parallel(world, arguments) if world > 1 else [main(arguments)]) == [0] * world
    assert f"resumed at step {step} of {STEPS}" in capfd.readouterr().out
    assert weights_differ(out, name, "whole") < 1e-5


def test_kill_9_in_a_backward_pass_under_torchrun(text: Path, out: Path, capfd: pytest.CaptureFixture[str]) -> None:
    begin = time.monotonic()
    done = torchrun(pretrain_killed.__file__, "backward", *nano(text, out, "backward", *ARGUMENTS, *FSDP2))
    assert done.returncode != 0
    assert time.monotonic() - begin < 60  # torchrun itself ends after 30 s what goes on then
    assert "galore-pretrain: another process of the run has ended" in done.stderr
    assert_goes_on(out, "backward", 5, capfd, 1)


@pytest.mark.parametrize(("moment", "world"), [("backward", 4), ("gather", 1), ("written", 4), ("replaced", 1)])
def test_kill_9_and_nobody_to_end_the_others(
    text: Path,
    out: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    moment: str,
    world: int,
) -> None:
    monkeypatch.setattr(parallel, "TIMEOUT", timedelta(seconds=30))
    name = f"{moment}-alone"
    begin = nano(text, out, name, *ARGUMENTS, *FSDP2)
    statuses = run_parallel(2, begin, functools.partial(pretrain_killed.prepare, moment))
    killed, _, step = pretrain_killed.KILLS[moment]
    assert statuses[killed] == -signal.SIGKILL
    assert statuses[1 - killed] == 2
    assert "another process of the run has ended" in capfd.readouterr().err
    assert_goes_on(out, name, step, capfd, world)
