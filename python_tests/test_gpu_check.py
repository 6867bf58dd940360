"""The GPU check without a GPU: its rehearsal, what it does about failures, and its verdicts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

# Where gpu_check.py, run as a script, finds its modules.
sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

import gpu_check
import gpu_goals
import gpu_measure
import gpu_refresh
import gpu_stages
import gpu_watch
import rivals
from gpu_entries import STRONGEST, UNFUSED, single_name
from gpu_plan import DRY_RUN, LAYER
from gpu_processes import Ended, run
from gpu_stages import Workplace
from gpu_units import correctness

BENCH = Path(__file__).parents[1] / "bench"


# The rehearsal ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rehearsal(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, dict[str, Any], subprocess.CompletedProcess[str]]:
    """The whole command, once."""
    out = tmp_path_factory.mktemp("rehearsal") / "out"
    command = [sys.executable, str(BENCH / "gpu_check.py"), str(out), "--dry-run"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    return out, json.loads((out / "results.json").read_text()), done


Rehearsal = tuple[Path, dict[str, Any], "subprocess.CompletedProcess[str]"]


@pytest.mark.slow
def test_the_rehearsal_goes_through_every_stage(rehearsal: Rehearsal) -> None:
    _, found, done = rehearsal
    assert done.returncode == 0, done.stdout + done.stderr
    assert found["complete"] is True
    assert found["failures"] == []
    status = {name: stage["status"] for name, stage in found["stages"].items()}
    assert status == {
        "machine": "ok",
        "build": "skipped",
        "rivals": "skipped",
        "tests rehearsal": "ok",
        **{f"sanitizer {tool}": "skipped" for tool in gpu_stages.SANITIZER_TOOLS},
        "measure": "ok",
        "report": "ok",
    }
    assert all(stage["reason"] for stage in found["stages"].values() if stage["status"] == "skipped")
    assert found["stages"]["tests rehearsal"]["passed"] > 0
    assert found["machine"]["versions"]["torch"] == torch.__version__


@pytest.mark.slow
def test_the_rehearsal_measures_everything(rehearsal: Rehearsal) -> None:
    _, found, _ = rehearsal
    units = found["measurements"]
    assert list(units) == list(gpu_measure.units(DRY_RUN))
    assert {unit["status"] for unit in units.values()} == {"ok"}
    step = units["step r=4"]
    assert sum(count for *_, count in step["shapes"]) == 224
    assert step["elements"] == sum(m * n for m, n in LAYER) * 32 // 64**2
    names = {result["name"]: result for result in step["results"]}
    assert {"ours: cpu", "ours: reference", gpu_measure.OPTIMIZER, rivals.TORCH_FUSED, UNFUSED, STRONGEST} <= set(names)
    for name in (UNFUSED, STRONGEST, rivals.TORCH_FUSED):  # nobody else tests that the chains are right steps
        assert (names[name]["status"], names[name]["reason"]) == ("ok", "")
    for unit_name, unit in units.items():
        rounds = {DRY_RUN.rounds} if unit_name != "refresh r=4" else {1, DRY_RUN.refresh_rounds}
        for result in unit.get("results", []):
            if result["status"] == "ok":
                assert len(result["samples_ms"]) in rounds
                assert 0 < result["first_quartile_ms"] <= result["median_ms"] <= result["third_quartile_ms"]
                assert result["host_ms"] > 0
            else:
                assert result["reason"]
    refresh = {result["name"]: result["status"] for result in units["refresh r=4"]["results"]}
    assert len(refresh) == 6 + len(DRY_RUN.eigenvalues)
    assert set(refresh.values()) == {"ok"}
    for case in units["correctness"]["cases"]:
        assert case["codes_equal"] > 0.99
        assert case["weights_compared"] > 0


@pytest.mark.slow
def test_nobody_takes_the_rehearsal_for_a_result(rehearsal: Rehearsal) -> None:
    out, found, done = rehearsal
    assert found["dry_run"] is True
    assert "DRY RUN" in found["what"]
    assert "DRY RUN" in done.stdout
    assert "DRY RUN" in (out / "report.txt").read_text()
    files = sorted(path.name for path in out.iterdir())
    assert files == ["layerwise.png", "logs.txt", "ranks.png", "report.txt", "results.json", "step.png"]  # 8 at most
    assert all(path.stat().st_size < 2**20 for path in out.iterdir())


# Failures --------------------------------------------------------------------------------------------------------


def check_in(folder: Path, *arguments: str) -> gpu_check.Check:
    return gpu_check.Check(gpu_check.parse([str(folder), "--dry-run", *arguments]), DRY_RUN)


def test_a_failing_stage_is_recorded_and_the_next_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object) -> dict[str, Any]:
        raise OSError("planted")

    ran: list[str] = []

    class Measurement:
        def __init__(self, *_: object) -> None:
            pass

        def run(self) -> dict[str, Any]:
            ran.append("measure")
            return {"status": "ok"}

    monkeypatch.setattr(gpu_stages, "machine", lambda *_: {"status": "ok", "facts": {"commit": "unknown"}})
    monkeypatch.setattr(gpu_stages, "tests", broken)
    monkeypatch.setattr(gpu_check, "Measurement", Measurement)
    monkeypatch.setattr(gpu_check.Check, "finish", lambda *_: None)
    assert gpu_check.main([str(tmp_path), "--dry-run", "--commit", "0123abc"]) == 1
    found = json.loads((tmp_path / "results.json").read_text())
    stage = found["stages"]["tests rehearsal"]
    assert (stage["status"], stage["reason"]) == ("failed", "OSError: planted")
    assert "broken" in stage["output"]
    assert ran == ["measure"]
    assert found["complete"] is True
    assert found["machine"]["commit"] == "0123abc"
    assert "WRONG: tests rehearsal" in capsys.readouterr().out


def test_what_a_killed_run_has_found_is_there(tmp_path: Path) -> None:
    check = check_in(tmp_path)
    check.stage("first", lambda: {"status": "ok"})
    seen = json.loads((tmp_path / "results.json").read_text())
    assert seen["stages"]["first"]["status"] == "ok"
    assert seen["complete"] is False


@pytest.mark.parametrize(("status", "code"), [("failed", 1), ("stopped", 1), ("incomplete", 0), ("refused", 0)])
def test_the_exit_status(tmp_path: Path, status: str, code: int) -> None:
    check = check_in(tmp_path)
    check.stage("tests", lambda: {"status": status, "reason": "planted"})
    assert check.status() == code


def test_a_missed_figure_of_correctness_is_a_failure(tmp_path: Path) -> None:
    check = check_in(tmp_path)
    check.found["failures"] = gpu_goals.failures({"correctness": correctness(codes_equal=0.5)}, DRY_RUN)
    assert check.status() == 1


def test_a_command_that_takes_too_long_is_stopped_with_its_children(tmp_path: Path) -> None:
    child = tmp_path / "child"
    script = f"import subprocess, sys; print('on', flush=True); subprocess.run(['sh', '-c', 'sleep 2; touch {child}'])"
    ended = run([sys.executable, "-c", script], log=tmp_path / "log", environment={}, folder=tmp_path, seconds=0.8)
    assert (ended.status, ended.output) == (None, "on\n")
    assert "stopped after" in ended.stopped
    time.sleep(2)
    assert not child.exists()


FAKE_MEASURE = """
import json, pathlib, sys, time
path = pathlib.Path(sys.argv[1])
state = json.loads(path.read_text()) if path.exists() else {{"units": {{}}, "without": {{}}}}
for unit, entries in {{"one": ["a", "b"], "two": ["a"]}}.items():
    if unit in state["units"]:
        continue
    for entry in entries:
        if entry in state["without"].get(unit, {{}}):
            continue
        path.with_suffix(".now").write_text(json.dumps({{"unit": unit, "entry": entry}}))
        if (unit, entry) == ("one", "b"):
            {fault}
    state["units"][unit] = {{"status": "ok"}}
    path.write_text(json.dumps(state))
"""


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("raise SystemExit('error: illegal address')", "took the process down (exit status 1): error: illegal address"),
        ("time.sleep(60)", "made no progress"),
    ],
    ids=["crashes", "hangs"],
)
def test_measuring_goes_on_without_what_takes_it_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str, reason: str
) -> None:
    (tmp_path / "gpu_measure.py").write_text(FAKE_MEASURE.format(fault=fault))
    monkeypatch.setattr(gpu_watch, "BENCH", tmp_path)
    work = tmp_path / "work"
    work.mkdir()
    seen: list[dict[str, Any]] = []
    measurement = gpu_watch.Measurement(Workplace(DRY_RUN, work), 30, seen.append)
    measurement.stalled_seconds = 1.5
    result = measurement.run()
    assert result["status"] == "ok", result
    assert len(result["restarted_without"]) == 1
    assert result["restarted_without"][0].startswith(f"one: b: {reason}")
    assert seen[-1]["units"] == {"one": {"status": "ok"}, "two": {"status": "ok"}}
    assert seen[-1]["without"]["one"]["b"].startswith(reason)


def test_what_was_left_out_is_listed_as_failed(tmp_path: Path) -> None:
    session = gpu_measure.Session(tmp_path / "state.json", DRY_RUN)
    session.unit = "limits"
    session.record(gpu_measure._limits(session))
    session.unit = "layerwise square"
    name = single_name("reference", False)
    session.state["without"] = {session.unit: {name: "took the process down"}}
    row = gpu_measure.units(DRY_RUN)[session.unit](session)
    by_name = {result["name"]: result for result in row["results"]}
    assert (by_name[name]["status"], by_name[name]["reason"]) == ("failed", "took the process down")
    assert by_name[single_name("cpu", False)]["status"] == "ok"
    failures = gpu_goals.failures({session.unit: row, "correctness": correctness()}, DRY_RUN)
    assert failures == [f"layerwise square: {name}: failed: took the process down"]


def test_the_refresh_is_measured_beside_a_step(tmp_path: Path) -> None:
    session = gpu_measure.Session(tmp_path / "state.json", DRY_RUN)
    session.unit = "limits"
    session.record(gpu_measure._limits(session))
    session.unit = "refresh r=4"
    session.state["without"] = {session.unit: {gpu_refresh.SVD: "took the process down"}}
    row = gpu_measure.units(DRY_RUN)[session.unit](session)
    status = {result["name"]: (result["status"], result["reason"]) for result in row["results"]}
    assert status.pop(gpu_refresh.SVD) == ("failed", "took the process down")
    assert {"ours: cpu", gpu_refresh.COLD, gpu_refresh.ONE_SEED, gpu_refresh.WARM, gpu_refresh.LOWRANK} <= set(status)
    assert set(status.values()) == {("ok", "")}
    goals = gpu_goals.refresh({session.unit: row}, DRY_RUN)
    assert [goal.ours for goal in goals if goal.value is None] == [gpu_refresh.COLD]  # against the decomposition


# What other programs say -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ended", "status"),
    [
        (Ended(0, "group of 2, x\nall 1 cases done\n========= ERROR SUMMARY: 0 errors\n"), "ok"),
        (
            Ended(9, "========= Invalid __global__ write\nall 1 cases done\n========= ERROR SUMMARY: 3 errors\n"),
            "failed",
        ),
        (Ended(0, "========= ERROR SUMMARY: 0 errors\n"), "failed"),  # it stopped half-way
        (Ended(0, "all 1 cases done\n"), "failed"),  # the tool was not there
        (Ended(1, "========= Error: Device not supported. Please refer to the documentation\n"), "refused"),
        (Ended(None, "group of 2, x\n", "stopped after 60 s"), "stopped"),
    ],
)
def test_compute_sanitizers_verdicts(ended: Ended, status: str) -> None:
    result = gpu_stages.verdict(ended)
    assert result["status"] == status
    assert status == "ok" or result["reason"]


def test_a_run_of_tests_is_summed_up_also_when_it_was_stopped(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    records = [
        {"test": "a", "outcome": "passed", "seconds": 1.0, "text": ""},
        {"test": "b", "outcome": "failed", "seconds": 2.0, "text": "E assert 1 == 2"},
        {"test": "c", "outcome": "skipped", "seconds": 0.0, "text": "no device"},
    ]
    log.write_text("".join(json.dumps(record) + "\n" for record in records))
    failed = gpu_stages.summary(log, Ended(1, "..."))
    assert (failed["status"], failed["passed"], failed["failed"], failed["skipped"]) == ("failed", 1, 1, 1)
    assert failed["failures"] == [{"test": "b", "text": "E assert 1 == 2"}]
    assert failed["skipped_because"] == {"no device": 1}
    assert gpu_stages.summary(log, Ended(None, "", "stopped after 60 s"))["status"] == "stopped"
    assert gpu_stages.summary(tmp_path / "none", Ended(4, "usage"))["status"] == "failed"


def test_the_log_of_tests_holds_every_outcome(tmp_path: Path) -> None:
    (tmp_path / "test_x.py").write_text(
        "import pytest\ndef test_a(): pass\ndef test_b(): assert 1 == 2\n"
        "@pytest.mark.skip(reason='no device')\ndef test_c(): pass\n"
    )
    (tmp_path / "test_y.py").write_text("import nothing_of_that_name\n")
    log = tmp_path / "log.jsonl"
    environment = {**os.environ, "GPU_TEST_LOG": str(log), "PYTHONPATH": str(BENCH)}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "gpu_test_log",
        "-p",
        "no:cacheprovider",
        "--continue-on-collection-errors",
    ]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    summary = gpu_stages.summary(log, Ended(done.returncode, done.stdout))
    assert (summary["passed"], summary["failed"], summary["skipped"]) == (1, 2, 1), done.stdout
    assert "nothing_of_that_name" in summary["failures"][0]["text"]
    assert "assert 1 == 2" in summary["failures"][1]["text"]
    assert list(summary["skipped_because"]) == ["Skipped: no device"]
