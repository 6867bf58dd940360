"""DDP, Accelerate, FSDP1 and DeepSpeed around a model in two processes: what trains, and what is refused on each."""

from __future__ import annotations

import re
from importlib.util import find_spec
from typing import Any

import pytest
from refusals import AFTERWARDS, FLATTENED, LEFT_BEHIND, PARTITIONED, REPLACED
from worker_processes import assert_same, difference, run
from wrapped_process import train_alone

pytestmark = pytest.mark.slow

Results = list[dict[str, Any]]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    parts = ["ddp", "fsdp1", *(["accelerate"] if find_spec("accelerate") else [])]
    return run("wrapped_process", tmp_path_factory.mktemp("wrapped"), 2, parts)


@pytest.fixture(scope="module")
def zero(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """With DeepSpeed, whose first import may compile something."""
    pytest.importorskip("deepspeed")
    return [own["zero"] for own in run("wrapped_process", tmp_path_factory.mktemp("zero"), 2, ["zero"])]


def test_optimizers_made_before_and_after_ddp_wraps_the_model_train_alike(results: Results) -> None:
    whole = results[0]["ddp"]["before"]
    for own in results:
        assert_same(own["ddp"]["before"], whole)
        assert_same(own["ddp"]["after"], whole)
    assert difference(whole, train_alone()) < 1e-5


def test_a_checkpoint_of_a_ddp_model_s_optimizer_goes_on_in_one_made_before_the_wrapping(results: Results) -> None:
    for own in results:
        assert_same(own["ddp"]["resumed before"], own["ddp"]["before"])


def test_accelerate_s_ddp_trains_and_resumes_as_ddp_does(results: Results) -> None:
    pytest.importorskip("accelerate")
    for own in results:
        assert own["accelerate"]["kind"] == ("MULTI_CPU", 2, "DistributedDataParallel")
        assert_same(own["accelerate"]["whole"], own["ddp"]["before"])
        assert_same(own["accelerate"]["resumed"], own["ddp"]["before"])


@pytest.mark.parametrize("use_orig_params", [False, True])
def test_fsdp1_is_refused_on_each_process_and_changes_nothing(results: Results, use_orig_params: bool) -> None:
    for own in results:
        errors = own["fsdp1"][use_orig_params]
        assert re.search(FLATTENED, errors["after"])
        assert re.search("expected an unflattened parameter", errors["after, groups"])
        for steps in (0, 2):
            assert re.search(FLATTENED if use_orig_params else LEFT_BEHIND, errors[f"before, {steps}"])


def test_zero_0_trains_as_ddp_does(results: Results, zero: Results) -> None:
    for own in zero:
        assert difference(own["float32"], results[0]["ddp"]["before"]) < 1e-5
        assert_same(own["bfloat16"], zero[0]["bfloat16"])
        assert difference(own["bfloat16"], results[0]["ddp"]["before"]) < 0.1


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("stage 1", REPLACED),
        ("stage 2", REPLACED),
        ("stage 3", PARTITIONED),
        ("made partitioned", PARTITIONED),
        ("made afterwards", AFTERWARDS),
    ],
)
def test_other_stages_of_zero_are_refused_on_each_process_and_change_nothing(
    zero: Results, case: str, message: str
) -> None:
    for own in zero:
        assert re.search(message, own[case]), own[case]
