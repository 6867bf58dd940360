"""The benchmark itself: its counts, its fairness, and that it calls a rival broken which does nothing."""

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
from floor import (
    Limits,
    Work,
    adam_work,
    apollo_work,
    floor_seconds,
    galore_work,
    lowrank_work,
    moments_bytes,
    orient,
    products_work,
)
from harness import CpuClock, Entry, Implementation, Result, UnavailableError, order, prepare, run
from problem import APOLLO, LR, OPERATIONS, SCALE, Case, Problem
from ratios import Goal, Row, all_ratios, goals

BENCH = Path(__file__).parents[1] / "bench"
CPU = torch.device("cpu")
LIMITS = Limits(bandwidth=10e9, copy=10e9, read=8e9, add=9e9, scale=7e9, rate={"fp32": 1e12, "bf16": 2e12})


def _case(operation: str = "galore_update", rank: int | None = 8, dtype: torch.dtype = torch.float32) -> Case:
    return Case(operation, "96x64", ((96, 64),), rank, dtype)


# Counts, by hand -----------------------------------------------------------------------------------------------


def test_orient_is_galore_torchs_std() -> None:
    assert orient((1024, 4096)) == (4096, 1024, "left")
    assert orient((4096, 1024)) == (4096, 1024, "right")
    assert orient((512, 512)) == (512, 512, "right")


@pytest.mark.parametrize(
    ("state", "expected"),
    # 257 elements are two blocks: two moments of 257 codes and 2 absmax of 4 bytes
    [("8bit", 2 * (257 + 8)), ("fp32", 2 * 4 * 257), ("param", 2 * 2 * 257), ("none", 0)],
)
def test_moments_bytes(state: str, expected: int) -> None:
    assert moments_bytes(257, state, itemsize=2) == expected


def test_moments_bytes_refuses_an_unknown_format() -> None:
    with pytest.raises(ValueError, match="8bit, fp32, param, none"):
        moments_bytes(1, "int4", itemsize=2)


def test_adam_work_by_hand() -> None:
    # 2 x 128 fp32: W and G read, W written (1024 B each); moments 2 * (256 + 4) read and written
    assert adam_work((2, 128), 4, "8bit") == Work(2 * 1024 + 520, 1024 + 520, 0)


def test_galore_work_by_hand() -> None:
    # 1024 x 4096 bf16, r = 128: L = 4096, S = 1024. Moments: 524,288 codes and 2,048 absmax, twice.
    moments = 2 * (524_288 + 8_192)
    read = 2 * 8_388_608 + 262_144 + moments
    assert galore_work((1024, 4096), 128, 2, "8bit") == Work(read, 8_388_608 + moments, 2_147_483_648)


def test_lowrank_work_reads_r_instead_of_g_and_halves_the_products() -> None:
    full, low = galore_work((64, 96), 8, 4, "8bit"), lowrank_work((64, 96), 8, 4, "8bit")
    assert full.bytes_read - low.bytes_read == (96 * 64 - 96 * 8) * 4
    assert low.bytes_written == full.bytes_written
    assert low.operations * 2 == full.operations


def test_apollo_work_by_hand() -> None:
    # 1024 x 4096 bf16, r = 1: G twice, W both ways, 8,388,608 B each. Moments: 4,096 codes and 16 absmax, twice.
    moments = 2 * (4_096 + 64)
    assert apollo_work((1024, 4096), 1, 2, "8bit") == Work(3 * 8_388_608 + moments, 8_388_608 + moments, 8_388_608)
    assert apollo_work((4096, 1024), 128, 4, "fp32").operations == 2 * 4096 * 1024 * 128


def test_products_work_by_hand() -> None:
    # R = G @ P: reads 96 x 64 and 64 x 8, writes 96 x 8; R @ P.T: reads R, writes 96 x 64 (P was counted)
    both = products_work((96, 64), 8, 4, count=2)
    assert both == Work(4 * (6144 + 512 + 768), 4 * (768 + 6144), 2 * 2 * 96 * 64 * 8)
    assert products_work((96, 64), 8, 4, count=1) == Work(4 * (768 + 512), 4 * 6144, 2 * 96 * 64 * 8)


def test_floor_is_the_slower_of_memory_and_products() -> None:
    assert floor_seconds(Work(6_000_000_000, 4_000_000_000, 10), LIMITS, "fp32") == pytest.approx(1.0)
    assert floor_seconds(Work(10, 10, 3_000_000_000_000), LIMITS, "fp32") == pytest.approx(3.0)
    assert floor_seconds(Work(10, 10, 3_000_000_000_000), LIMITS, "bf16") == pytest.approx(1.5)


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
                low = LR * SCALE * torch.sign(lowrank) @ basis.T
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
JUDGED = [("galore_update", 8), ("adam8bit_update", None), ("apollo_update", 8), ("apollo_mini_update", 1)]


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


def test_state_bytes_of_llama_60m_by_hand() -> None:
    pytest.importorskip("transformers", reason="pretrain extra")
    import state_bytes

    counted = {count.optimizer: count.bytes for count in state_bytes.counts("60m")}
    hidden, middle, rank, layers, words = 512, 1376, 128, 8, 32_000
    scalars = 4 + 8  # step and skipped
    # 8-bit moments of n elements, n a multiple of 256 here: 2 (n + 4 n / 256) bytes
    moments = {n: 2 * (n + n // 64) for n in (hidden * rank, middle * rank, words * hidden)}
    bases = 2 * hidden * rank  # bfloat16; the short side is 512 in all seven matrices
    layer = 4 * moments[hidden * rank] + 3 * moments[middle * rank] + 7 * (bases + scalars)
    norms = (2 * layers + 1) * (2 * 4 * hidden + scalars)  # small tensors: float32 moments
    expected = layers * layer + norms + 2 * (moments[words * hidden] + scalars)
    assert counted["GaLoreFusedAdam8bit"] == expected
    parameters = layers * (4 * hidden**2 + 3 * hidden * middle) + 2 * words * hidden + (2 * layers + 1) * hidden
    assert counted["AdamW, bf16 moments"] == 4 * parameters


def test_the_overhead_of_a_step_is_less_in_groups() -> None:
    import step_overhead

    found = {what: step_overhead.measure(what, True, steps=3, layers=4).median for what in step_overhead.GROUPS}
    assert max(found["optimizer"], found["optimizer and pipeline"]) < found["one at a time"]


def test_subspaces_are_judged_and_timed(tmp_path: Path) -> None:
    pytest.importorskip("galore_torch", reason="bench extra")
    import subspace_bench

    assert subspace_bench.main(["--quick", "--json", str(tmp_path / "subspace.json")]) == 0
    data = json.loads((tmp_path / "subspace.json").read_text())
    ours = [row for row in data["quality"] if row["method"] == "ours, cold"]
    assert len(ours) == 11 * 3
    assert all(0.8 < row["share"] <= 1.001 and row["orthonormality"] < 1e-5 for row in ours)
    assert {row["method"] for row in data["timings"]} >= {"ours, cold", "ours, warm", "galore_torch"}


def test_runs_with_several_seeds_are_compared_seed_by_seed(tmp_path: Path) -> None:
    import pretrain_seeds

    def run(name: str, seed: int, loss: float, final: str = "final") -> None:
        config = dict.fromkeys(("preset", "optimizer", "steps", "lr", "rank", "update_proj_gap", "split"), 1)
        log = [
            {"kind": "header", "config": config | {"seed": seed}, "corpus": {"sha256": "0"}},
            {"kind": "subspaces", "step": 9, "layers": {"a": {"refreshes": 3}, "b": {"refreshes": 4}}},
            {"kind": final, "step": 9, "validation_loss": loss, "optimizer_state_bytes": 100},
        ]
        (tmp_path / f"{name}-{seed}").mkdir()
        (tmp_path / f"{name}-{seed}" / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))

    for seed, losses in enumerate([(1.5, 1.25), (1.75, 1.25)]):
        run("svd", seed, losses[0])
        run("warm-staggered", seed, losses[1])
    first, second = pretrain_seeds.read_options(tmp_path)
    assert (first.name, first.mean, first.refreshes) == ("warm-staggered", 1.25, 7)
    assert first.differences == {"0": -0.25, "1": -0.5}
    assert (second.name, second.mean) == ("svd", 1.625)
    run("int8", 0, 1.0, final="train")
    with pytest.raises(ValueError, match=r"int8-0.*expected a finished run"):
        pretrain_seeds.read_options(tmp_path)
