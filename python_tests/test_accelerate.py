"""Accelerate, and Hugging Face's Trainer on it, in two processes: DDP and FSDP2, to which it takes optimizers along.

On the CPU Accelerate takes no notice of an FSDP plugin: which it is to use is set by hand here, and all that follows,
from ``prepare`` on, is its own.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from worker_processes import assert_same, difference, run

pytest.importorskip("accelerate")
pytest.importorskip("transformers", minversion="5.2")

from accelerate_process import OPTIMIZERS, train_alone, trainer_arguments, trainer_kwargs, weights_of
from transformers import Trainer

pytestmark = pytest.mark.slow

Results = list[dict[str, Any]]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return run("accelerate_process", tmp_path_factory.mktemp("accelerate"), 2)


@pytest.mark.parametrize("state_dict_type", OPTIMIZERS)
def test_an_optimizer_made_before_fsdp2_trains_its_dtensors_and_resumes(results: Results, state_dict_type: str) -> None:
    for own in results:
        found = own["fsdp2"][state_dict_type]
        assert found["parameters"] == {"DTensor"}
        assert found["is 8-bit"] is (state_dict_type == "FULL_STATE_DICT")
        assert found["refreshes"] == [3, 3, 3]
        assert_same(found["whole"], results[0]["fsdp2"][state_dict_type]["whole"])
        assert_same(found["returned"], found["whole"])
        assert_same(found["resumed"], found["whole"])


def test_fsdp2_with_accumulation_and_clipping_trains_as_one_process_does(results: Results) -> None:
    assert difference(results[0]["fsdp2"]["SHARDED_STATE_DICT"]["whole"], train_alone()) < 1e-5


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("apollo", r"each process has a part of it \(fully_shard\), and APOLLOFusedAdamW needs norms"),
        ("prepared", "no optimizer has: .*; fully_shard takes no prepared layers, DDP does"),
        ("left_out", r"fully_shard has put a DTensor in the place of.*make the optimizer after fully_shard"),
        ("trained_before", "expected its state of the steps before.*prepare first, and load the state afterwards"),
    ],
)
def test_what_fsdp2_can_t_train_is_refused_at_the_first_step(results: Results, case: str, message: str) -> None:
    for own in results:
        assert re.search(message, own["refused"][case]), own["refused"][case]


def test_projections_are_averaged_in_accelerate_s_ddp_under_accumulate(results: Results) -> None:
    alone = train_alone(clip=None)
    for own in (found["reduced"] for found in results):
        assert own["bytes, reduced"] > own["bytes, plain"] == 0  # which DDP asks for without Python
        assert_same(own["reduced"], results[0]["reduced"]["reduced"])
        assert difference(own["plain"], alone) < 1e-5
        assert difference(own["reduced"], alone) < 1e-5
        assert "of Accelerate's wrapper pass what it wraps, optimizer.optimizer" in own["wrapper"]


@pytest.mark.parametrize(("name", "model"), [("ddp", "DistributedDataParallel"), ("fsdp2", "FSDPLlamaForCausalLM")])
def test_the_trainer_trains_in_two_processes_as_in_one_and_resumes(
    results: Results, name: str, model: str, tmp_path: Path
) -> None:
    alone = Trainer(**trainer_kwargs(trainer_arguments(tmp_path, 2)))
    alone.train()
    expected = weights_of(alone.model)
    trainers = [own["trainer"] for own in results]
    for own in trainers:
        assert own[name]["model"] == model
        assert own[name]["refreshes"] == [14, 28, 42]
        assert_same(own[name]["weights"], trainers[0][name]["weights"])
        assert_same(own[f"{name}, resumed"]["weights"], own[name]["weights"])
        assert difference(own[name]["weights"], expected) < 1e-5


def test_the_trainer_s_ddp_averages_projections(results: Results, tmp_path: Path) -> None:
    alone = Trainer(**trainer_kwargs(trainer_arguments(tmp_path, 2, max_grad_norm=0.0)))
    alone.train()
    for own in (found["trainer"]["reduced"] for found in results):
        assert (own["model"], own["refreshes"]) == ("DistributedDataParallel", [14, 28, 42])
        assert_same(own["weights"], results[0]["trainer"]["reduced"]["weights"])
        assert difference(own["weights"], weights_of(alone.model)) < 1e-5
