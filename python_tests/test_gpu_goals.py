"""The GPU check's verdicts, and its rows on the CUDA kernels executed by the CPU."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

# Where gpu_check.py, run as a script, finds its modules.
sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

import gpu_correctness
import gpu_goals
import gpu_refresh
import gpu_sanitize
import rivals
import simt
from gpu_entries import UNFUSED, grouped, one_pass_and_four_launches
from gpu_plan import DRY_RUN, GPU, roofline_seconds
from gpu_problem import SharedProblem
from gpu_units import correctness
from harness import CpuClock, run
from problem import Case
from stand_ins import serving

from galore_kernels.backends.cuda import CudaStages
from galore_kernels.ops import registry

CPU = torch.device("cpu")


def step(**times: float) -> dict[str, Any]:
    names = {"ours": "ours: cpu", "bnb": rivals.BNB_8BIT, "fused": rivals.TORCH_FUSED, "chain": UNFUSED}
    results = [
        {"name": names[key], "family": "rival", "status": "ok", "median_ms": ms, "of_roofline": 8.5 / ms}
        for key, ms in times.items()
    ]
    return {"status": "ok", "results": results}


def verdict(goals: list[Any], text: str, row: str) -> str:
    (found,) = {goal.verdict for goal in goals if text in goal.text and goal.row == row and goal.ours == "ours: cpu"}
    return str(found)


@pytest.mark.parametrize(
    ("times", "text", "expected"),
    [
        ({"ours": 10.0}, "share of the roofline", "met"),  # 0.85
        ({"ours": 10.01}, "share of the roofline", "missed"),
        ({"ours": 10.0, "bnb": 13.0}, rivals.BNB_8BIT, "met"),  # 1.3
        ({"ours": 10.0, "bnb": 12.99}, rivals.BNB_8BIT, "missed"),
        ({"ours": 10.0, "fused": 15.0}, rivals.TORCH_FUSED, "met"),  # 1.5
        ({"ours": 10.0, "fused": 14.99}, rivals.TORCH_FUSED, "missed"),
        ({"ours": 10.0}, rivals.BNB_8BIT, "unknown"),
        ({"bnb": 10.0}, "share of the roofline", "unknown"),
    ],
)
def test_a_verdict_flips_where_the_number_passes_the_goal(times: dict[str, float], text: str, expected: str) -> None:
    goals = gpu_goals.speed({"step r=4": step(**times)}, DRY_RUN)
    assert verdict(goals, text, "step r=4") == expected


@pytest.mark.parametrize(
    ("name", "ms", "expected"),
    [
        (gpu_refresh.COLD, 50.0, "met"),  # 5 steps
        (gpu_refresh.COLD, 50.1, "missed"),
        (gpu_refresh.WARM, 20.0, "met"),  # 2
        (gpu_refresh.WARM, 20.1, "missed"),
    ],
)
def test_a_refresh_is_counted_in_steps(name: str, ms: float, expected: str) -> None:
    row = step(ours=10.0)
    row["results"].append({"name": name, "family": "ours", "status": "ok", "median_ms": ms})
    goals = gpu_goals.refresh({"refresh r=4": row}, DRY_RUN)
    assert [goal.verdict for goal in goals if goal.ours == name and not goal.at_least] == [expected]


@pytest.mark.parametrize(("ms", "expected"), [(5000.0, "met"), (4999.0, "missed")])  # 100 times
def test_a_refresh_is_compared_with_exact_decompositions(ms: float, expected: str) -> None:
    row = step(ours=10.0)
    for name, median in ((gpu_refresh.COLD, 50.0), (gpu_refresh.SVD, ms)):
        row["results"].append({"name": name, "family": "ours", "status": "ok", "median_ms": median})
    goals = gpu_goals.refresh({"refresh r=4": row}, DRY_RUN)
    assert [goal.verdict for goal in goals if goal.at_least] == [expected]


def test_a_goal_of_a_unit_that_failed_is_unknown_with_its_reason() -> None:
    goals = gpu_goals.speed({"step r=4": {"status": "failed", "reason": "out of memory"}}, DRY_RUN)
    reasons = {goal.reason for goal in goals if goal.row == "step r=4"}
    assert reasons == {"out of memory"}


@pytest.mark.parametrize(
    "figures",
    [
        {"codes_equal": 0.9989},
        {"codes_apart": 2},
        {"weights_beyond_two_ulps_and_the_directions_rounding": 1},
        {"weights_finite": False},
        {"bit_identical": False},
    ],
)
def test_each_figure_of_correctness_counts(figures: dict[str, Any]) -> None:
    assert gpu_goals.failures({"correctness": correctness()}, DRY_RUN) == []
    assert len(gpu_goals.failures({"correctness": correctness(**figures)}, DRY_RUN)) == len(DRY_RUN.ours)


def test_a_backend_that_crashed_has_missed_its_figures_and_one_that_is_absent_has_not() -> None:
    unit = correctness()
    unit["cases"] = [case for case in unit["cases"] if case["backend"] == DRY_RUN.ours[0]]
    refused = {**unit, "refused": {DRY_RUN.ours[1]: "not installed"}}
    assert gpu_goals.failures({"correctness": refused}, DRY_RUN) == []
    crashed = {**unit, "left_out": {DRY_RUN.ours[1]: "took the process down"}}
    assert "took the process down" in gpu_goals.failures({"correctness": crashed}, DRY_RUN)[0]
    assert gpu_goals.failures({}, DRY_RUN)  # nothing measured is nothing right


def test_the_roofline_by_hand() -> None:
    # 4096 x 4096 at rank 128: 6 + 4 / 32 bytes an element, at 4.3 TB/s; at 1024 the products take longer.
    elements = 4096 * 4096
    assert roofline_seconds([(4096, 4096)], 128, 4.3e12, 790e12) == pytest.approx(6.125 * elements / 4.3e12)
    assert roofline_seconds([(4096, 4096)], 1024, 4.3e12, 790e12) == pytest.approx(4096 * elements / 790e12)
    # The short side counts: 4096 of 11008 x 4096.
    assert roofline_seconds([(4096, 11008)], 128, 1.0, 1e30) == pytest.approx(6.125 * 4096 * 11008)
    assert sum(m * n for m, n in GPU.whole_set()) == 6_476_005_376


# The kernels' own entries, with the kernels executed by the CPU ----------------------------------------------------


def test_one_pass_and_four_launches_are_both_right_steps() -> None:
    problem = SharedProblem(Case("galore_update", "groups", ((256, 64),) * 3, 8, torch.bfloat16), CPU)
    entries = one_pass_and_four_launches(CudaStages(simt.load(), "cpu"))
    results = run(problem, entries, rounds=2, clock=CpuClock(), flush=lambda: None)
    assert [(result.status, result.reason) for result in results] == [("ok", "")] * 2


def test_our_groups_are_right_steps_on_the_cuda_kernels() -> None:
    with serving("cuda") as name:
        for operation, rank in (("galore_update", 8), ("adam8bit_update", None)):
            problem = SharedProblem(
                Case(operation, "groups", ((256, 64),) * 2 + ((64, 256),), rank, torch.bfloat16), CPU
            )
            (result,) = run(problem, [grouped(name)], rounds=2, clock=CpuClock(), flush=lambda: None)
            assert (result.status, result.reason, result.notes) == ("ok", "", "all matrices of a shape together")


def test_groups_of_int8_weights_run_and_move_less() -> None:
    problem = SharedProblem(Case("galore_update", "groups", ((256, 64),) * 2 + ((64, 256),), 8, torch.bfloat16), CPU)
    with serving("cuda") as name:
        plain, int8 = run(
            problem, [grouped(name), grouped(name, int8=True)], rounds=2, clock=CpuClock(), flush=lambda: None
        )
    assert (int8.status, int8.reason) == ("ok", "")
    # A byte less of each element, and a scale of each group, in both directions.
    scales = 4 * (256 + 256 + 64)
    assert plain.work.bytes_moved - int8.work.bytes_moved == 2 * (3 * 256 * 64 - scales)


def test_correctness_of_int8_weights() -> None:
    with serving("cuda") as name:
        cases = [case for case in gpu_correctness.correctness(DRY_RUN, name, CPU) if case["int8_weight"]]
    assert [(case["side"], case["basis"]) for case in cases] == [("right", None), ("left", "int8")]
    for case in cases:
        assert case["codes_equal"] > 0.999
        assert case["codes_apart"] <= 1
        assert case["weights_beyond_two_ulps_and_the_directions_rounding"] == 0
        assert case["bit_identical"]
        assert 0.5 < case["worst_ulps"] < 1.1  # rounded stochastically, by less than the step of a code


def test_the_sanitized_script_reaches_every_operation() -> None:
    with serving("cuda") as name:
        done = list(gpu_sanitize.run(gpu_sanitize.Runner(name, CPU)))
    for operation in ("galore_update", "apollo_update", "group", "adam8bit_update", "rotate_moments"):
        assert any(line.startswith(operation) for line in done)
    assert any("int8 weight" in line for line in done)


@pytest.fixture
def figures() -> Callable[..., dict[str, Any]]:
    return lambda backend: gpu_correctness.correctness(DRY_RUN, backend, CPU)[0]


def test_wrong_weights_codes_and_random_results_show(
    figures: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = registry._backends["reference"]

    def planted(change: Callable[[Any], Any]) -> dict[str, Any]:
        def kernel(param: Any, *args: Any) -> None:
            right.kernels["galore_update"](param, *args)
            if param.is_floating_point():
                change((param, args[4]))

        backend = replace(right, name="triton", kernels={"galore_update": kernel})
        monkeypatch.setitem(registry._backends, "triton", backend)
        return figures("triton")

    good = planted(lambda _: None)
    assert (good["codes_equal"], good["codes_apart"], good["bit_identical"]) == (1.0, 0, True)
    assert good["weights_beyond_two_ulps_and_the_directions_rounding"] == 0
    assert planted(lambda x: x[0][-1, -1].mul_(1.1))["weights_beyond_two_ulps_and_the_directions_rounding"] == 1
    assert planted(lambda x: x[0][0, 0].fill_(torch.nan))["weights_finite"] is False
    assert planted(lambda x: x[1].exp_avg[0, 0].fill_(3))["codes_apart"] > 1
    assert planted(lambda x: x[0][0, 0].copy_(torch.rand(())))["bit_identical"] is False
