"""What is sent: the planner's collectives against those counted in two and four processes, and its formulas."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from wire_process import CASES, GAP, SHAPE, STEPS, Case
from worker_processes import run

from galore_kernels.plan import MODELS, LlamaShape, PlanError, scaling
from galore_kernels.plan.network import NETWORKS, Network, seconds, tokens_that_hide
from galore_kernels.plan.scaling import GPUS
from galore_kernels.plan.settings import Settings
from galore_kernels.plan.wire import (
    SCHEMES,
    Collective,
    ddp_step,
    in_backward,
    mean_over_gap,
    merged,
    payload,
    sharded_step,
    wire,
)

OF_FOUR = ["full", "lowrank", "factored", "sharded"]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run("wire_process", tmp_path_factory.mktemp("two"), 2, list(CASES))


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run("wire_process", tmp_path_factory.mktemp("four"), 4, OF_FOUR)


def settings_of(case: Case) -> Settings:
    weights = "fp32" if case.dtype == torch.float32 else "bf16"
    return Settings(
        SHAPE, rank=case.rank, weights=weights, refresh_schedule=case.schedule, update_proj_gap=GAP, step="ordinary"
    )


def predicted(case: Case, step: str, first: bool, world: int) -> list[tuple[str, int]]:
    settings = replace(settings_of(case), step=step)
    if case.scheme == "sharded":
        calls = sharded_step(settings, SHAPE, world, lowrank=True)
    else:
        size = None if case.bucket_mb is None else int(case.bucket_mb * 2**20)
        # In the first step DDP has one bucket.
        calls = ddp_step(settings, case.scheme, in_backward(SHAPE), 2**40 if first else size)
    return sorted((call.kind, call.bytes) for call in calls)


def check_counted(results: list[dict[str, Any]], name: str) -> None:
    case = CASES[name]
    assert len({json.dumps(own[name]) for own in results}) == 1
    for index, counted in enumerate(results[0][name]):
        step = "ordinary" if index % GAP else "refresh"
        assert sorted(counted) == predicted(case, step, index == 0, len(results)), (index, step)


@pytest.mark.slow
@pytest.mark.parametrize("case", [name for name in CASES if name != "lowrank, staggered"])
def test_every_call_of_two_processes_is_the_plans(two: list[dict[str, Any]], case: str) -> None:
    check_counted(two, case)


@pytest.mark.slow
@pytest.mark.parametrize("case", OF_FOUR)
def test_every_call_of_four_processes_is_the_plans(four: list[dict[str, Any]], case: str) -> None:
    check_counted(four, case)


@pytest.mark.slow
def test_staggered_refreshes_take_the_same_in_all_and_less_at_once(two: list[dict[str, Any]]) -> None:
    sizes = [sum(size for _, size in counted) for counted in two[0]["lowrank, staggered"]]
    settings = settings_of(CASES["lowrank, staggered"])

    def planned(settings: Settings) -> float:
        return payload(ddp_step(settings, "lowrank", in_backward(SHAPE)))

    assert len(sizes) == STEPS
    assert sum(sizes[1 : 1 + GAP]) == pytest.approx(GAP * mean_over_gap(settings, planned), abs=1)
    assert max(sizes[1:]) <= planned(replace(settings, step="refresh")) < sizes[0]


# ------------------------------------------------------------------ by hand


def test_a_searchs_all_reduces_by_hand() -> None:
    shape = LlamaShape("one", hidden=64, intermediate=301, layers=1, heads=4, kv_heads=2, vocabulary=99)
    settings = Settings(shape, rank=8, weights="fp32", step="refresh")
    up = [param for param in in_backward(shape) if param.matrix.name == "up"]
    # 301 x 64: b = 16 columns, a sketch (16, 64), two blocks of (301, 16) and (16, 64); and R.
    sent = [4 * size for size in [*3 * [16 * 64], *2 * [301 * 16], 301 * 8]]
    assert sorted(call.bytes for call in ddp_step(settings, "factored", up)) == sorted([24, 8, *sent])
    assert sorted(call.bytes for call in ddp_step(settings, "lowrank", up)) == sorted([4, *sent])


def test_buckets_are_closed_by_the_gradient_that_fills_them() -> None:
    settings = Settings(MODELS["7b"], step="ordinary")
    calls = ddp_step(settings, "full", in_backward(MODELS["7b"]))
    mib = [call.bytes / 2**20 for call in calls]
    # The head; of each layer down, up, gate (86 MiB), o, v, k, q (32 MiB), norms with what follows; the embedding.
    assert len(mib) == 1 + 32 * 7 + 1
    assert mib[0] == 32000 * 4096 * 2 / 2**20
    assert mib[1] == (4096 + 11008 * 4096) * 2 / 2**20
    assert sum(mib) == MODELS["7b"].parameters * 2 / 2**20
    one = ddp_step(settings, "full", in_backward(MODELS["7b"]), 2**40)
    assert [call.bytes for call in one] == [MODELS["7b"].parameters * 2]


def test_uneven_rows_are_filled_up_when_sharded() -> None:
    by = {"all_gather": 0, "reduce_scatter": 0, "all_reduce": 0}
    settings = Settings(SHAPE, rank=8, weights="fp32", step="ordinary")
    for call in sharded_step(settings, SHAPE, 4, lowrank=True):
        by[call.kind] += call.bytes
    layer = 64 * 64 * 2 + 2 * 32 * 64 + 2 * 304 * 64 + 64 * 301 + 2 * 64  # gate and up have 301 rows
    root = 2 * 100 * 64 + 64
    assert by["reduce_scatter"] == 4 * (2 * layer + root)
    assert by["all_gather"] == 4 * (2 * 2 * layer + root)
    assert by["all_reduce"] == 2 * 4 * 8 * (64 + 64 + 301)  # k, v and down are projected on the left: L of each
    assert payload(sharded_step(settings, SHAPE, 4, lowrank=False)) == by["reduce_scatter"] + by["all_gather"]


# ------------------------------------------------------------------ formulas


def test_the_ring_sends_nothing_alone_and_twice_the_payload_among_many() -> None:
    step = [Collective("all_reduce", 1000, calls=3), Collective("all_gather", 500)]
    assert wire(step, 1) == 0
    assert wire(step, 2) == 3000 + 250
    sent = [wire(step, processes) for processes in range(1, 100)]
    assert sent == sorted(sent)
    assert wire(step, 10**6) == pytest.approx(2 * 3000 + 500, rel=1e-5)
    assert merged([*step, *step]) == [Collective("all_reduce", 1000, 6), Collective("all_gather", 500, 2)]


@pytest.mark.parametrize("model", ["7b", "13b", "70b"])
def test_projections_take_their_ranks_share_of_the_matrices(model: str) -> None:
    full = scaling(model).payload("full").ordinary
    for rank in (128, 256, 1024):
        own = scaling(model, rank=rank)
        shape = own.settings.shape
        short = sum(2 * matrix.numel * rank // min(matrix.rows, matrix.cols) for matrix in shape.linears())
        amounts = own.payload("lowrank")
        assert amounts.ordinary == shape.layers * short + own.unprojected
        # What searches, in float32, is less than whole gradients in bfloat16 up to about an eighth of the width.
        assert amounts.ordinary < amounts.refresh <= full
        assert (amounts.refresh < full) == (rank < 1024 or model == "70b")
        assert amounts.mean == pytest.approx(amounts.ordinary + (amounts.refresh - amounts.ordinary) / 200)
        assert own.payload("factored").ordinary == amounts.ordinary
    whole = scaling(model, rank=10**6).payload("lowrank")  # at most the smaller dimension
    assert whole.ordinary == whole.refresh == full


def test_payload_grows_with_the_rank_and_with_rarer_refreshes_shrinks() -> None:
    means = [scaling("7b", rank=rank).payload("lowrank").mean for rank in (64, 128, 256, 512, 1024, 2048, 4096)]
    assert means == sorted(means)
    gaps = [scaling("7b", update_proj_gap=gap).payload("lowrank").mean for gap in (1, 50, 200, 10**6)]
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[0] == scaling("7b").payload("lowrank").refresh
    staggered = scaling("7b", refresh_schedule="staggered").payload("lowrank")
    periodic = scaling("7b").payload("lowrank")
    assert (staggered.ordinary, staggered.mean) == (periodic.ordinary, periodic.mean)
    assert periodic.ordinary < staggered.refresh < 1.2 * periodic.ordinary


def test_time_by_hand() -> None:
    step = [Collective("all_reduce", 8 * 10**9)]
    slow = Network("slow", node=1e9, latency=1e-3)
    launch, waiting = 8.4e-6, 7 * 3.4e-6
    assert seconds(step, 1, slow) == 0
    assert seconds(step, 8, slow) == pytest.approx(launch + 2 * (7 / 8 * 8e9 / 370e9 + waiting))
    assert seconds(step, 32, slow) == pytest.approx(launch + 2 * (3 / 4 * 8 + waiting + 3e-3))
    small = [Collective("all_gather", 1000)]  # over 512 nodes nine levels of a tree instead of 511 steps
    assert seconds(small, 4096, slow) == pytest.approx(launch + 1e-6 + waiting + 9e-3)
    fast = Network("fast", node=1e15, latency=0.0)  # NVLink is the slower one
    assert seconds(step, 32, fast) == pytest.approx(seconds(step, 8, fast))


@pytest.mark.parametrize(
    ("gpus", "size", "reported"),
    [
        (8, 8 * 2**30, 370e9),  # NVIDIA/nccl-tests issue 212, rings within a node of H100
        (1984, 512 * 2**20, 350e9),  # issue 283, 248 nodes of 8 H200, "typically around 350G"
    ],
)
def test_large_all_reduces_have_the_bandwidth_that_others_report(gpus: int, size: int, reported: float) -> None:
    time = seconds([Collective("all_reduce", size)], gpus, NETWORKS["infiniband"])
    assert Collective("all_reduce", size).wire(gpus) / time == pytest.approx(reported, rel=0.05)


@pytest.mark.parametrize("network", NETWORKS)
def test_time_grows_with_gpus_and_bytes_and_slower_networks(network: str) -> None:
    own = scaling("7b", rank=1024)
    for scheme in SCHEMES:
        times = [own.seconds(scheme, gpus, network).mean for gpus in (1, 2, 4, *GPUS)]
        assert times[0] == 0
        assert times == sorted(times)
    for gpus in (16, 4096):
        assert own.seconds("lowrank", gpus, network).mean < own.seconds("full", gpus, network).mean
        assert own.seconds("full", gpus, network).mean <= own.seconds("full", gpus, "10gbe").mean
    within = {own.seconds("full", 8, name).mean for name in NETWORKS}
    assert len(within) == 1  # NVLink alone


def test_larger_buckets_take_less_latency() -> None:
    default, large = scaling("7b"), scaling("7b", bucket_mb=1000)
    assert large.calls("lowrank") < default.calls("lowrank") / 10
    assert large.payload("lowrank") == default.payload("lowrank")
    for gpus in (8, 4096):
        assert large.seconds("lowrank", gpus, "infiniband").mean < default.seconds("lowrank", gpus, "infiniband").mean


def test_what_hides_communication() -> None:
    assert tokens_that_hide(1.0, 10**9) == pytest.approx(0.4 * 989e12 / 4e9)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: scaling("7b", bucket_mb=0), "bucket_mb=0: expected a number above 0"),
        (lambda: scaling("7b", rnak=3), "unknown option.*rnak"),
        (lambda: scaling("7b").seconds("full", 12, "infiniband"), "gpus=12: expected 1 to 8, or a multiple"),
        (lambda: scaling("7b").seconds("full", 0, "infiniband"), "gpus=0"),
    ],
)
def test_errors_name_the_argument(call: Any, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        call()
