"""The kernel benchmark itself: its fairness, and that it calls a rival broken which does nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

# Where kernel_bench.py, run as a script, finds its modules.
sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

import kernel_bench
import rivals
import session
from floor import Limits, Work, orient
from harness import CpuClock, Entry, Implementation, Result, UnavailableError, order, prepare, run
from problem import ADAFACTOR, APOLLO, LR, OPERATIONS, SCALE, Case, Problem
from ratios import Goal, Row, all_ratios, goals

BENCH = Path(__file__).parents[1] / "bench"
CPU = torch.device("cpu")
LIMITS = Limits(bandwidth=10e9, copy=10e9, read=8e9, add=9e9, scale=7e9, rate={"fp32": 1e12, "bf16": 2e12})


def _case(operation: str = "galore_update", rank: int | None = 8, dtype: torch.dtype = torch.float32) -> Case:
    return Case(operation, "96x64", ((96, 64),), rank, dtype)


# Interleaving ----------------------------------------------------------------------------------------------------


def test_order_is_a_new_permutation_each_round() -> None:
    names = [f"i{k}" for k in range(6)]
    rounds = [order(names, index) for index in range(40)]
    assert all(sorted(found) == names for found in rounds)
    assert {found[0] for found in rounds} == set(names)
    assert {found[-1] for found in rounds} == set(names)
    assert len({(a, b) for found in rounds for a, b in pairwise(found)}) == 30  # all neighbours
    assert rounds == [order(names, index) for index in range(40)]  # and reproducible


class _ApolloSteps:
    """APOLLO's changes from the definition: Adam on a random projection, factors, limiter."""

    def __init__(self, operation: str) -> None:
        self.scaling, self.scale = APOLLO.get(operation, ("", 0.0))
        self.steps: dict[int, int] = {}
        self.norms: dict[int, Tensor] = {}

    def step(self, index: int, grad: Tensor, rank: int) -> Tensor:
        right = orient((grad.shape[0], grad.shape[1]))[2] == "right"
        rows = grad.float() if right else grad.float().T
        step = self.steps[index] = self.steps.get(index, 0) + 1
        basis = torch.randn(rows.shape[1], rank, generator=torch.Generator().manual_seed(index)) / rank**0.5
        lowrank = rows @ basis
        first, second = 1 - 0.9**step, 1 - 0.999**step
        direction = first * lowrank / (second**0.5 * lowrank.abs())
        axis = 1 if self.scaling == "channel" else None
        scaled = rows * direction.norm(dim=axis, keepdim=True) / lowrank.norm(dim=axis, keepdim=True)
        norm = scaled.norm()
        if index in self.norms:
            limiter = (norm / self.norms[index]).clamp_min(1.01) / 1.01
            scaled, norm = scaled / limiter, norm / limiter
        self.norms[index] = norm
        change = LR * second**0.5 / first * self.scale**0.5 * scaled
        return (change if right else change.T).to(grad.dtype)


def _adam_step(
    problem: Problem, factor: float = 1.0, only: int | None = None
) -> tuple[list[Tensor], Callable[[], None]]:
    """What every right implementation does under a constant gradient, written from the definition."""
    weights, apollo = problem.weights(), _ApolloSteps(problem.operation)

    def step() -> None:
        for index, (weight, grad) in enumerate(zip(weights, problem.grads, strict=True)):
            if only is not None and index != only:
                continue
            if problem.rank is None:
                change = LR * torch.sign(grad)
            elif problem.operation in APOLLO:
                change = apollo.step(index, grad, problem.rank)
            else:
                side = orient(problem.case.shapes[index])[2]
                basis = problem.bases[index]
                lowrank = (grad if side == "right" else grad.T) @ basis
                direction = torch.sign(lowrank)
                if problem.operation == ADAFACTOR:
                    squares = lowrank.square()
                    means = squares.mean(1, keepdim=True) * squares.mean(0) / squares.mean()
                    direction = lowrank / means.sqrt()
                low = LR * SCALE * direction @ basis.T
                change = low if side == "right" else low.T
            weight.sub_(factor * change)

    return weights, step


def _entry(name: str, make: Callable[[Problem], tuple[list[Tensor] | None, Callable[[], object]]]) -> Entry:
    def build(problem: Problem) -> Implementation:
        weights, call = make(problem)
        return Implementation(call, Work(1, 1, 1), weights)

    return Entry(name, "rival", OPERATIONS, build)


def test_run_calls_everyone_once_a_round_behind_a_flush() -> None:
    log: list[str] = []

    def make(name: str) -> Entry:
        return _entry(name, lambda problem: (None, lambda: log.append(name)))

    results = run(
        Problem(_case(), CPU),
        [make("a"), make("b"), make("c")],
        rounds=12,
        clock=CpuClock(),
        flush=lambda: log.append("flush"),
    )
    timed = log[log.index("flush") :]
    assert timed[0::2] == ["flush"] * 36
    rounds = [tuple(timed[1::2][i : i + 3]) for i in range(0, 36, 3)]
    assert all(sorted(found) == ["a", "b", "c"] for found in rounds)
    assert len(set(rounds)) > 2
    assert [len(r.seconds) for r in results] == [12, 12, 12]


def test_run_puts_gradients_back_before_each_call() -> None:
    log: list[str] = []
    implementation = Implementation(
        lambda: log.append("call"), Work(1, 1, 1), None, before=lambda: log.append("before")
    )
    entry = Entry("a", "rival", OPERATIONS, lambda problem: implementation)
    run(Problem(_case(), CPU), [entry], rounds=4, clock=CpuClock(), flush=lambda: None)
    assert log[0::2] == ["before"] * 7  # three checked calls, four timed ones
    assert log[1::2] == ["call"] * 7


# An operation of each kind, at a rank that its matrices have.
JUDGED = [
    ("galore_update", 8),
    ("adam8bit_update", None),
    ("galore_adafactor_update", 8),
    ("apollo_update", 8),
    ("apollo_mini_update", 1),
]


# Honesty -----------------------------------------------------------------------------------------------------------


def _status(problem: Problem, entry: Entry) -> Result:
    results, _ = prepare(problem, [entry])
    return results[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("operation", "rank"),
    # APOLLO's factors at rank 1 have no mean: some indices move a thousand times as far as others
    [*JUDGED, ("apollo_update", 1), ("apollo_update", 64)],
)
def test_a_right_step_passes(operation: str, rank: int | None, dtype: torch.dtype) -> None:
    problem = Problem(Case(operation, "two", ((96, 64), (64, 96)), rank, dtype), CPU)
    assert _status(problem, _entry("right", _adam_step)).status == "ok"


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda problem: (problem.weights(), lambda: None), "does nothing"),
        (lambda problem: _adam_step(problem, only=0), "does nothing: matrix 1"),
        (lambda problem: _adam_step(problem, factor=-1.0), "the wrong way"),
        (lambda problem: _adam_step(problem, factor=0.3), "times as far"),
        (lambda problem: _adam_step(problem, factor=100.0), "times as far"),
    ],
    ids=["nothing", "one matrix only", "climbs", "clipped", "jumps"],
)
@pytest.mark.parametrize(("operation", "rank"), JUDGED)
def test_a_rival_that_moves_the_weights_wrongly_is_called_broken(
    operation: str, rank: int | None, make: Callable[[Problem], tuple[list[Tensor], Callable[[], object]]], reason: str
) -> None:
    problem = Problem(Case(operation, "two", ((96, 64), (64, 96)), rank, torch.float32), CPU)
    result = _status(problem, _entry("planted", make))
    assert result.status == "broken"
    assert reason in result.reason


@pytest.mark.parametrize(
    ("operation", "rank", "factor", "reason"),
    [
        ("apollo_mini_update", 1, 128**-0.5, "times as far"),  # without its scale
        ("apollo_mini_update", 1, 128**0.5, "times as far"),  # the scale instead of its root
        ("apollo_update", 8, 8**-0.5, "times as far"),  # a basis of variance 1 instead of 1 / r
        ("apollo_update", 8, -1.0, "the wrong way"),
    ],
)
def test_an_apollo_step_of_another_length_is_called_broken(
    operation: str, rank: int, factor: float, reason: str
) -> None:
    problem = Problem(Case(operation, "two", ((96, 64), (64, 96)), rank, torch.float32), CPU)
    result = _status(problem, _entry("planted", lambda problem: _adam_step(problem, factor)))
    assert (result.status, reason in result.reason) == ("broken", True)


@pytest.mark.parametrize("rank", [1, 8])
def test_a_raw_gradient_step_is_no_apollo_step(rank: int) -> None:
    problem = Problem(Case("apollo_update", "one", ((96, 64),), rank, torch.float32), CPU)

    def plain(problem: Problem) -> tuple[list[Tensor], Callable[[], None]]:
        weights = problem.weights()

        def step() -> None:
            weights[0].sub_(LR * problem.grads[0])  # no factors

        return weights, step

    result = _status(problem, _entry("planted", plain))
    assert (result.status, "times as far" in result.reason) == ("broken", True)


@pytest.mark.parametrize("shape", [(512, 256), (256, 512)])
# low ranks, where the median's factor counts, and one where the matrix' norm would do as well
@pytest.mark.parametrize(
    ("operation", "rank"), [("apollo_update", 2), ("apollo_update", 64), ("apollo_mini_update", 1)]
)
def test_the_length_of_an_apollo_step_is_known(operation: str, rank: int, shape: tuple[int, int]) -> None:
    problem = Problem(Case(operation, "one", (shape,), rank, torch.float32), CPU)
    (weight,), step = _adam_step(problem)
    before = weight.clone()
    for _ in range(3):
        step()
    length, cosine = problem.movement(0, weight - before, rank)
    expected, aligned = problem.expected_change(shape, rank, steps=3)
    assert length == pytest.approx(expected, rel=0.12)  # the basis' norm is off by 1 / sqrt(2 S rank) = 4 % or so
    assert cosine == pytest.approx(aligned, rel=1e-3)


@pytest.mark.parametrize("operation", list(APOLLO))
def test_a_full_rank_rival_of_an_apollo_row_is_judged_as_adam(operation: str) -> None:
    problem = Problem(Case(operation, "one", ((96, 64),), 1, torch.float32), CPU)
    (entry,) = (entry for entry in rivals.entries() if entry.name == rivals.TORCH_FUSED)
    assert _status(problem, entry).status == "ok"


def test_apollo_minis_rank_is_one_whatever_the_ranks() -> None:
    found = session.cases(["apollo_mini_update", "apollo_update"], ["96x64"], [8, 32, 128], ["fp32"])
    assert [(case.operation, case.rank) for case in found] == [
        ("apollo_mini_update", 1),
        ("apollo_update", 8),
        ("apollo_update", 32),
    ]


def test_a_broken_rival_is_not_timed() -> None:
    entry = _entry("planted", lambda problem: (problem.weights(), lambda: None))
    results = run(Problem(_case(), CPU), [entry], rounds=2, clock=CpuClock(), flush=lambda: None)
    assert [(r.status, r.seconds) for r in results] == [("broken", [])]


def test_a_rival_that_raises_is_listed_with_its_error() -> None:
    def make(problem: Problem) -> tuple[None, Callable[[], object]]:
        raise RuntimeError("no kernel image")

    result = _status(Problem(_case(), CPU), _entry("planted", make))
    assert (result.status, result.reason) == ("failed", "RuntimeError: no kernel image")


def test_an_unavailable_implementation_is_listed_with_its_reason() -> None:
    def make(problem: Problem) -> tuple[None, Callable[[], object]]:
        raise UnavailableError("needs CUDA")

    result = _status(Problem(_case(), CPU), _entry("planted", make))
    assert (result.status, result.reason) == ("missing", "needs CUDA")


def test_missing_packages_are_listed_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("bitsandbytes", "galore_torch", "apollo_torch"):
        monkeypatch.setitem(sys.modules, module, None)  # importing it raises ImportError
    results, runnable = prepare(Problem(_case(), CPU), rivals.entries())
    missing = {r.name: r.reason for r in results if r.status == "missing"}
    assert set(missing) == {rivals.GALORE_8BIT, rivals.GALORE_ADAMW, rivals.BNB_8BIT}
    assert "pip install bitsandbytes" in missing[rivals.BNB_8BIT]
    assert "pip install galore-torch" in missing[rivals.GALORE_ADAMW]
    assert set(runnable) == {rivals.TWO_PRODUCTS, rivals.TORCH_FUSED, rivals.TORCH_FOREACH}
    results, runnable = prepare(Problem(_case("apollo_update"), CPU), rivals.entries())
    missing = {r.name: r.reason for r in results if r.status == "missing"}
    assert set(missing) == {rivals.APOLLO_ADAMW}
    assert "pip install apollo-torch" in missing[rivals.APOLLO_ADAMW]
    assert set(runnable) == {rivals.TORCH_FUSED}
    results, runnable = prepare(Problem(_case("galore_adafactor_update"), CPU), rivals.entries())
    assert {r.name for r in results if r.status == "missing"} == {rivals.GALORE_ADAFACTOR}
    # torch's AdamW and transformers' Adafactor, at full rank: both steps are as long, and neither is broken.
    assert set(runnable) == {rivals.TWO_PRODUCTS, rivals.TORCH_FUSED, rivals.FULL_ADAFACTOR}


# Ratios and goals --------------------------------------------------------------------------------------------------


def _row(operation: str, ours: float, **others: float) -> Row:
    full_rank = operation == "adam8bit_update"
    case = Case(operation, "1024x4096", ((1024, 4096),), None if full_rank else 128, torch.float32)
    names = {
        "bnb": rivals.BNB_8BIT,
        "galore": rivals.GALORE_8BIT,
        "apollo": rivals.APOLLO_ADAMW,
        "products": rivals.TWO_PRODUCTS,
    }
    work = Work(10_000_000, 0, 0)  # 1 ms at LIMITS
    results = [Result("ours: cpu", "ours", "ok", work=work, seconds=[ours] * 3)]
    results += [Result(names[key], "rival", "ok", work=work, seconds=[t] * 3) for key, t in others.items()]
    return Row(case, results)


def _verdicts(row: Row, device: str = "cpu") -> dict[str, Goal]:
    return {goal.text: goal for goal in goals([row], ["ours: cpu"], ["ours: optimizer"], LIMITS, device)}


def test_goals_met_missed_and_unknown() -> None:
    found = _verdicts(_row("galore_update", 0.010, galore=0.017, products=0.008))
    assert found[f"no slower than {rivals.GALORE_8BIT}"].verdict == "met"
    assert found["within 1.3 x of its two products"].value == pytest.approx(1.25)
    assert found["within 1.3 x of its two products"].verdict == "met"
    missed = found[f"at least 1.8 x faster than {rivals.GALORE_8BIT}"]
    assert missed.value == pytest.approx(1.7)
    assert missed.verdict == "missed"
    assert missed.at_floor == pytest.approx(17.0)
    unknown = _verdicts(_row("adam8bit_update", 0.010))[f"at least 8 x faster than {rivals.BNB_8BIT}"]
    assert (unknown.value, unknown.verdict, unknown.reason) == (None, "unknown", "not in this run")


@pytest.mark.parametrize("operation", list(APOLLO))
def test_apollos_goals_depend_on_the_device(operation: str) -> None:
    row = _row(operation, 0.010, apollo=0.020)
    (on_cpu,) = _verdicts(row).values()
    (on_gpu,) = _verdicts(row, "cuda").values()
    assert (on_cpu.text, on_cpu.verdict) == (f"no slower than {rivals.APOLLO_ADAMW}", "met")
    assert (on_gpu.text, on_gpu.verdict) == (f"at least 3 x faster than {rivals.APOLLO_ADAMW}", "missed")
    assert on_gpu.value == pytest.approx(2.0)


@pytest.mark.parametrize(("theirs", "verdict"), [(0.005, "LOSS"), (0.020, "win"), (0.010, "LOSS")])
def test_a_ratio_says_who_won(theirs: float, verdict: str) -> None:
    (ratio,) = all_ratios([_row("adam8bit_update", 0.010, bnb=theirs)], ["ours: cpu"])
    assert ratio.ratio == pytest.approx(theirs / 0.010)
    assert ratio.verdict == verdict


def test_a_ratio_within_the_spread_is_even() -> None:
    row = _row("adam8bit_update", 0.010, bnb=0.010)
    row.results[1].seconds = [0.008, 0.011, 0.013]
    assert all_ratios([row], ["ours: cpu"])[0].verdict == "even"


# The command -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        ["--shapes", "512"],
        ["--shapes", "0x4"],
        ["--ranks", "0"],
        ["--dtypes", "fp8"],
        ["--operations", "sgd"],
        ["--threads", "-1"],
        ["--quick", "--sweep"],
    ],
)
def test_bad_options_are_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        kernel_bench.parse(arguments)
    assert stopped.value.code == 2
    assert "expected" in capsys.readouterr().err or "--sweep" in arguments


def _run_script(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCH / name), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def test_quick_run_end_to_end(tmp_path: Path) -> None:
    out = tmp_path / "quick.json"
    done = _run_script("kernel_bench.py", "--quick", "--device", "cpu", "--out", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    data = json.loads(out.read_text())
    assert {row["operation"] for row in data["rows"]} == set(OPERATIONS)
    assert {row["dtype"] for row in data["rows"]} == {"fp32", "bf16"}
    for row in data["rows"]:
        named = {result["name"] for result in row["results"]}
        assert {"ours: cpu", "ours: cuda", "ours: triton", "ours: reference (unfused torch)"} <= named
        assert named >= {entry.name for entry in rivals.entries() if row["operation"] in entry.operations}
        if row["operation"] in APOLLO:
            assert {"ours: APOLLOFusedAdam8bit.step", "ours: APOLLOFusedAdamW.step"} <= named
        for result in row["results"]:
            assert result["status"] in ("ok", "missing", "broken", "failed")
            if result["status"] == "ok":
                assert len(result["samples_ms"]) == data["method"]["rounds"]
                assert result["first_quartile_ms"] <= result["median_ms"] <= result["third_quartile_ms"]
            else:
                assert result["reason"]
    assert data["machine"]["threads"] == 1
    assert data["machine"]["versions"]["torch"] == torch.__version__
    assert data["ratios"]
    assert data["goals"]


def test_pictures_of_rows_and_of_a_sweep(tmp_path: Path) -> None:
    import picture

    rows = [_row("galore_update", 0.010, galore=0.017, products=0.008)]
    rows[0].results.append(Result("ours: cuda", "ours", "missing", "not part of this build"))
    picture.draw_rows(tmp_path / "rows.png", rows, LIMITS, "footer")
    picture.draw_sweep(tmp_path / "sweep.png", rows, ["ours: cpu"], rivals.GALORE_8BIT, "footer")
    for name in ("rows.png", "sweep.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
