"""The fine-tuning example: its task, what each method trains, resuming after a kill, the table."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from finetune import main
from finetuning.settings import METHODS, QUICK
from finetuning.task import load_task, shared_out
from finetuning.training import StepClock
from safetensors.torch import load_file

# peft asks a model of transformers for an attribute that is deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def test_the_task_hides_the_names_of_its_classes() -> None:
    task = load_task(QUICK)
    assert len(task.packages) == QUICK.packages
    text = "\n".join([*(snippet for pairs in task.snippets.values() for snippet, _ in pairs), *task.pretraining])
    assert not any(package in text.lower() for package in task.packages)
    assert task.sha256 == load_task(QUICK).sha256


def test_each_file_goes_to_one_part() -> None:
    cut = {f"{number}.py": ["lines"] * pieces for number, pieces in enumerate([9, 5, 3, 2, 1, 1, 0])}
    parts = shared_out(cut, (6, 2, 2))
    assert sorted(name for names in parts.values() for name in names) == sorted(cut)
    assert {part: sum(len(cut[name]) for name in names) for part, names in parts.items()} == {
        "train": 12,
        "validation": 5,
        "test": 4,
    }


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a quick comparison."""
    folder = tmp_path_factory.mktemp("table")
    assert main(["--quick", "--out", str(folder), "--table", str(folder)]) == 0
    return folder


def test_the_table_has_a_row_for_each_method(table: Path) -> None:
    data = json.loads((table / "finetune.json").read_text())
    assert [row["method"] for row in data["methods"]] == list(METHODS)
    assert (table / "finetune.png").read_bytes().startswith(b"\x89PNG")
    assert data["machine"]["versions"]["peft"] is not None


def test_each_method_trains_what_it_says(table: Path) -> None:
    rows = {row["method"]: row for row in json.loads((table / "finetune.json").read_text())["methods"]}
    everything = rows["adamw"]["trained_parameters"]
    embeddings = QUICK.hidden * (QUICK.vocabulary + QUICK.tokens + 2 + 1 + 2)  # words, places, type, norm
    frozen, projected = rows["galore-r4-frozen"], rows["galore-r4"]
    assert projected["trained_parameters"] == everything
    assert frozen["trained_parameters"] == everything - embeddings
    # Of the encoder's matrices: a basis, two moments; of the rest two moments; counters.
    shapes = [(32, 32)] * 4 + [(128, 32), (32, 128)]
    low = sum(min(shape) * 4 + 2 * max(shape) * 4 for shape in shapes)
    rest = everything - embeddings - sum(m * n for m, n in shapes)
    assert 0 <= frozen["state_bytes"] - 4 * (low + 2 * rest) < 2000
    assert 0 <= projected["state_bytes"] - frozen["state_bytes"] - 8 * embeddings < 200
    assert rows["lora-r4"]["trained_parameters"] < frozen["trained_parameters"]
    assert rows["lora-r4"]["weight_bytes"] > rows["adamw"]["weight_bytes"]


def test_a_killed_and_resumed_run_ends_as_an_uninterrupted_one_bit_by_bit(tmp_path: Path, table: Path) -> None:
    arguments = ["--quick", "--out", str(tmp_path), "--resume"]
    # Saved every 5 steps: killed in pre-training, of 6 steps, and in the second and third epoch, of 6 steps each.
    for phase, step in (("pretraining", 6), ("galore-r4", 8), ("galore-r4", 14)):
        assert _killed(arguments, phase, step) == KILLED
        assert bool(list(tmp_path.glob("*/pretrained"))) == (phase != "pretraining")
    whole, resumed = (next(folder.glob("*/galore-r4-lr0.001-seed0")) for folder in (table, tmp_path))
    half_written = resumed / "checkpoint-11"
    half_written.mkdir()
    (half_written / "trainer_state.json").write_text('{"epoch": 1')
    assert main(arguments) == 0
    for name in ("model/model.safetensors", "../pretrained/model.safetensors"):
        expected, weights = load_file(whole / name), load_file(resumed / name)
        assert expected.keys() == weights.keys()
        assert all(torch.equal(expected[key], weights[key]) for key in expected), name
    assert _result(whole) == _result(resumed)


KILLED = 9


def _killed(arguments: list[str], phase: str, step: int) -> int:
    """The exit status of a forked child that ends without a word at this step of this phase."""
    with warnings.catch_warnings():  # Python 3.12 warns of forking beside idle threads; the child uses none of them
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    status = 70
    try:

        def die(self: StepClock, *args: Any, **kwargs: Any) -> None:
            arguments, state = args[:2]
            if Path(arguments.output_dir).name.startswith(phase) and state.global_step == step:
                os._exit(KILLED)

        StepClock.on_step_end = die  # type: ignore[method-assign]
        status = main(arguments)
    finally:
        os._exit(status)


def _result(folder: Path) -> dict[str, Any]:
    """Without what differs between equal runs."""
    result = json.loads((folder / "result.json").read_text())
    return {key: value for key, value in result.items() if key not in ("step_seconds", "step_cpu_seconds", "load")}
