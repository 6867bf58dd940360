"""Factored gradients in two processes: one basis, that of the mean gradient, and one model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from factored_cases import Run, carriers, largest_difference
from factored_process import OPTIONS, WORLD, dense_int8, train
from worker_processes import run

from galore_kernels import GaLoreFusedAdam8bit


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What both processes have ended with."""
    return run("factored_process", tmp_path_factory.mktemp("processes"), WORLD, timeout=120)


@pytest.mark.parametrize("case", ["periodic 1", "periodic 2", "svd 1", "adaptive 1"])
def test_two_processes_train_as_one_with_both_shares(results: list[dict[str, Any]], case: str) -> None:
    (first, weights, report), (second, others, other_report) = (own[case] for own in results)
    for name, weight in weights.items():
        assert torch.equal(others[name], weight), name
    assert report == other_report
    name, micro_batches = case.split()
    run = Run(True, GaLoreFusedAdam8bit, options=OPTIONS[name])
    alone = train(run.model, run, None, int(micro_batches))
    assert largest_difference([(a + b) / 2 for a, b in zip(first, second, strict=True)], alone) < 1e-4
    for key, entry in run.optimizer.subspace_report().items():
        assert entry["refreshes"] >= 3
        assert report[key]["captured"] == pytest.approx(entry["captured"], abs=1e-3)
    # What differs is noticed: one process' share alone.
    run = Run(True, GaLoreFusedAdam8bit, options=OPTIONS[name])
    assert largest_difference(train(run.model, run, 0, int(micro_batches)), first) > 1e-3


def test_processes_average_the_gradients_of_int8_weights(results: list[dict[str, Any]]) -> None:
    (first, weights), (second, others) = (own["dense int8"] for own in results)
    assert weights.keys() == others.keys()
    for name, weight in weights.items():
        assert torch.equal(others[name], weight), name
    alone, _ = dense_int8(None)
    # A code may be rounded another way where the mean of two gradients is not that of one to the last bit.
    assert largest_difference([(a + b) / 2 for a, b in zip(first, second, strict=True)], alone) < 0.02
    assert alone[-1] < alone[0] - 0.5


def test_tokens_may_differ_and_layers_be_unused(results: list[dict[str, Any]]) -> None:
    (weights, report), (others, other_report) = (own["uneven"] for own in results)
    for name, weight in weights.items():
        assert torch.equal(others[name], weight), name
    assert report == other_report
    assert [entry["refreshes"] for entry in report.values()] == [3, 3, 3]
    assert len(report) == len(carriers(Run(True).model))


def test_processes_that_look_for_different_layers_are_told(results: list[dict[str, Any]]) -> None:
    for own in results:
        assert "other processes are looking for the subspace of another parameter" in own["other layers"]
