"""A Trainer run that is killed and resumed has bitwise the weights, state and log of one that was not interrupted."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers", minversion="5.2")
pytest.importorskip("accelerate")

SCRIPT = Path(__file__).with_name("trainer_process.py")
CASES = ("8bit", "accumulation", "float32", "auto ranks", "layerwise", "prepared", "int8 weights")
TIMED = ("train_runtime", "train_samples_per_second", "train_steps_per_second", "total_flos", "train_loss")


def run(folder: Path, *cases: str) -> None:
    # Where the tests find the package, whether it is installed or on a path.
    start = f"import runpy, sys; sys.path[:] = {[str(SCRIPT.parent), *sys.path]!r}; sys.argv = sys.argv[1:]; "
    command = [sys.executable, "-c", start + "runpy.run_path(sys.argv[0], run_name='__main__')", str(SCRIPT)]
    done = subprocess.run([*command, str(folder), *cases], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def assert_same(left: Any, right: Any, where: str = "") -> None:
    if isinstance(left, dict):
        assert left.keys() == right.keys(), where
        for key in left:
            assert_same(left[key], right[key], f"{where}.{key}")
    elif isinstance(left, Tensor):
        assert left.dtype == right.dtype, where
        assert torch.equal(left, right), where
    else:
        assert left == right, where


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process for all cases: what it imports takes longer than what it runs."""
    folder = tmp_path_factory.mktemp("runs")
    run(folder, *CASES)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_killed_and_resumed_is_as_if_it_had_not_been(folder: Path, case: str) -> None:
    whole, resumed = (torch.load(folder / f"{case}-{which}.pt", weights_only=True) for which in ("whole", "resumed"))
    assert_same(resumed["weights"], whole["weights"])
    assert_same(resumed["state"], whole["state"])
    for log in (whole["log"], resumed["log"]):
        log[-1] = {key: value for key, value in log[-1].items() if key not in TIMED}
    assert resumed["log"] == whole["log"]
    checkpoint = torch.load(folder / f"{case}-killed" / "checkpoint-3" / "optimizer.pt", weights_only=True)
    changed = checkpoint["state"][0]
    assert any(not torch.equal(value, whole["state"][0][key]) for key, value in changed.items() if key != "step")
