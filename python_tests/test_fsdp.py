"""Parameters that processes have parts of (FSDP2), in two, three and four processes, against one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fsdp_process import CASES, HALF, SAVED, TARGETS, Training, Uneven, result_of
from torch import Tensor
from worker_processes import difference, run

from galore_kernels import galore_param_groups

pytestmark = pytest.mark.slow

OWN = [name for name in CASES if name not in ("replicas",)]

#: Options that turn the last bits of a gradient into more than that, and how far that may take the weights.
BOUNDS = {"int8 basis, adaptive": 1e-3, "8-bit": 0.05}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fsdp")
    for name in SAVED:
        training = Training.begin(CASES[name], sharded=False)
        training.train(0, HALF)
        torch.save(
            {"optimizer": training.optimizer.state_dict(), "model": training.model.state_dict()},
            path / f"one-{name}.pt",
        )
    return path


@pytest.fixture(scope="module")
def two(folder: Path) -> list[dict[str, Any]]:
    tasks = ["saving", "importing", "another_rank", "another_model", "nan_loss_on_one", "nan_in_one_part", "refusals"]
    return run("fsdp_process", folder, 2, [*OWN, *tasks])


@pytest.fixture(scope="module")
def three(folder: Path, two: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return run("fsdp_process", folder, 3, ["resuming"])


@pytest.fixture(scope="module")
def four(folder: Path, two: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return run("fsdp_process", folder, 4, ["uneven", "replicas", "resuming", "overflow", "in_batches_as_on_a_gpu"])


@pytest.fixture(scope="module")
def alone() -> Callable[[str], Any]:
    known: dict[str, Any] = {}

    def of(name: str) -> Any:
        if name not in known:
            known[name] = result_of(CASES[name], sharded=False)
        return known[name]

    return of


def alone_for(name: str, steps: int) -> dict[str, Tensor]:
    """The weights after so many steps on one process."""
    training = Training.begin(CASES[name], sharded=False)
    training.train(0, steps)
    return training.weights()


@pytest.mark.parametrize("case", [name for name in OWN if name != "mixed precision"])
def test_two_processes_train_as_one(two: list[dict[str, Any]], alone: Callable[[str], Any], case: str) -> None:
    one = alone(case)
    assert all(entry["refreshes"] >= 3 for entry in one.report.values())
    assert one.losses[-1] < one.losses[0] - 0.5
    for own in two:
        assert difference(own[case].weights, one.weights) < BOUNDS.get(case, 1e-5)
        assert own[case].report == two[0][case].report


@pytest.mark.parametrize("case", ["uneven", "replicas"])
def test_four_processes_train_as_one(four: list[dict[str, Any]], alone: Callable[[str], Any], case: str) -> None:
    assert difference(four[0][case].weights, alone(case).weights) < 1e-5
    assert all(own[case].report == four[0][case].report for own in four)


def test_replicas_are_equal_to_the_bit(four: list[dict[str, Any]]) -> None:
    for first, second in ((0, 2), (1, 3)):
        parts = zip(four[first]["replicas"].parts, four[second]["replicas"].parts, strict=True)
        assert all(torch.equal(a, b) for a, b in parts)


def test_mixed_precision_trains(two: list[dict[str, Any]], alone: Callable[[str], Any]) -> None:
    losses, exact = two[0]["mixed precision"].losses, two[0]["exact, rotated"].losses
    assert losses[-1] < losses[0] - 0.5
    assert max(abs(a - b) for a, b in zip(losses, exact, strict=True)) < 0.1


def test_the_right_side_needs_no_collective_but_to_refresh(two: list[dict[str, Any]]) -> None:
    sent = two[0]["right"].bytes
    assert [step for step, size in enumerate(sent) if size] == [0, 20, 40]


def test_the_left_side_sums_projections(two: list[dict[str, Any]]) -> None:
    matrices = galore_param_groups(Uneven(), TARGETS, rank=8)[0]["params"]
    left = sum(4 * param.shape[1] * min(8, *param.shape) for _, param in matrices if param.shape[0] < param.shape[1])
    assert {size for step, size in enumerate(two[0]["uneven"].bytes) if step % 40} == {left}


@pytest.mark.parametrize("case", SAVED)
@pytest.mark.parametrize("world", ["one", "two", "three", "four"])
def test_a_checkpoint_is_resumed_by_any_number(
    request: pytest.FixtureRequest, folder: Path, two: list[dict[str, Any]], world: str, case: str
) -> None:
    weights, losses = two[0]["saving"][case]  # two resumed it to the bit there
    if world == "one":
        saved = torch.load(folder / f"whole-{case}.pt", weights_only=True)
        training = Training.begin(CASES[case], sharded=False, seed=1)
        training.model.load_state_dict(saved["model"])
        names = [name for group in training.optimizer.param_groups for name in group["param_names"]]
        assert [name for group in saved["optimizer"]["param_groups"] for name in group["params"]] == names
        training.optimizer.load_state_dict(saved["optimizer"])
        own = training.train(HALF, HALF)[0]
        resumed = training.weights()
    elif world == "two":
        resumed, own = two[0]["importing"][case]  # what one process saved
        weights, losses = alone_for(case, 2 * HALF), own
    else:
        resumed, own = request.getfixturevalue(world)[0]["resuming"][case]
    assert difference(resumed, weights) < BOUNDS.get(case, 1e-5)
    assert abs(own[-1] - losses[-1]) < 0.1


def test_what_goes_wrong_goes_wrong_everywhere(two: list[dict[str, Any]]) -> None:
    for rank, own in enumerate(two):
        assert "the processes differ" in own["another_rank"]
        assert "the processes differ" in own["another_model"]
        assert f"process {rank} has" in own["another_rank"]
        kept, skipped = own["nan_loss_on_one"]
        assert kept
        assert set(skipped.values()) == {1}
        assert len(skipped) == len(list(Uneven().parameters()))


def test_a_part_that_is_skipped_doesnt_split_the_processes(two: list[dict[str, Any]]) -> None:
    (bases, report, skipped, weights), (other_bases, other_report, other_skipped, other_weights) = (
        own["nan_in_one_part"] for own in two
    )
    assert all(torch.equal(a, b) for a, b in zip(bases, other_bases, strict=True))
    assert report == other_report
    assert set(other_skipped.values()) == {2}
    # What sums projections has none without the others, and a basis is not found in half a gradient.
    assert list(skipped) == ['param group 0, parameter 1 ("mlp_down.weight")']
    assert all(torch.equal(weights[name], other_weights[name]) for name in weights)


@pytest.mark.parametrize("task", ["overflow", "in_batches_as_on_a_gpu"])
def test_processes_without_rows_refresh_with_the_others(four: list[dict[str, Any]], task: str) -> None:
    report, weights = four[0][task]
    assert min(entry["refreshes"] for entry in report.values()) >= 1
    for own in four[1:]:
        assert own[task][0] == report
        assert all(torch.equal(own[task][1][name], weight) for name, weight in weights.items())


def test_what_needs_more_than_a_part_is_refused(two: list[dict[str, Any]]) -> None:
    for own in two:
        messages = own["refusals"]
        assert "needs norms of the whole; use GaLoreFusedAdam8bit" in messages["adafactor"]
        assert "needs norms of the whole" in messages["apollo"]
        assert "proj_type='full'" in messages["both sides"]
        assert "pass a number" in messages["auto"]
        assert 'pass "rotate"' in messages["reset"]
        assert "fully_shard takes no prepared layers" in messages["prepared"]
        assert "divided once, by its rows" in messages["columns"]
