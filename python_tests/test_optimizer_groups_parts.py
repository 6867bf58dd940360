"""What a step in groups is built from: counters, the look at skips, scalars on devices; and what it costs."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from galore_kernels.optim import skip_monitor
from galore_kernels.optim.counters import Counter, Counters
from galore_kernels.optim.options import check_lr
from galore_kernels.optim.scalars import LearningRates, Unscaling
from galore_kernels.optim.skip_monitor import CALLS_BETWEEN_LOOKS, SkipMonitor

CPU, META = torch.device("cpu"), torch.device("meta")


def state(steps: int = 0, skips: int = 0) -> dict[str, Tensor]:
    return {"step": torch.tensor(float(steps)), "skipped": torch.tensor(skips)}


# ---------------------------------------------------------------------- counters


@given(
    start=st.integers(0, 20),
    period=st.integers(1, 7),
    skipped=st.lists(st.booleans(), min_size=1, max_size=40),
)
def test_no_due_step_comes_unannounced(start: int, period: int, skipped: list[bool]) -> None:
    counters, own = Counters(), state(start)
    (counter,) = counters.watch([own])
    due = start + period
    for skip in skipped:
        if counter.call_of(due) <= counters.calls:
            counters.update([counter])
            due += period if counter.steps >= due else 0
        elif int(own["step"]) >= due:
            pytest.fail(f"step {int(own['step'])} was not expected")
        own["step"] += not skip
        counters.calls += 1


def test_counters_know_a_state_by_its_tensors() -> None:
    counters, own = Counters(), state(3, 2)
    assert counters.of(own) is None
    (counter,) = counters.watch([own])
    assert (counter.steps, counter.skips, counter.calls) == (3, 2, 0)
    own["step"] += 1
    assert counters.watch([own]) == [counter]
    assert counter.steps == 3  # known: not read again
    counters.calls = 5
    assert counters.note(own, 7, before=4, skips=4) == 2
    assert (counter.steps, counter.skips, counter.calls) == (7, 4, 6)
    for key in ("step", "skipped"):
        replaced = {**own, key: own[key].clone()}
        assert counters.of(replaced) is None
    counters.keep([own])
    assert counters.of(own) is counter
    counters.keep([])
    assert counters.of(own) is None


# ---------------------------------------------------------------------- the look at skips


class Landing:
    """Copies that land when they are told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.landed, self.copies = False, 0
        monkeypatch.setattr(skip_monitor, "to_host", self)

    def __call__(self, values: Tensor) -> tuple[Tensor, Callable[[], bool]]:
        self.copies += 1
        return values.clone(), lambda: self.landed


def watched(*skips: int) -> list[tuple[str, Counter]]:
    return [
        (name, Counter(torch.tensor(0.0), torch.tensor(count), 0, 0, count))
        for name, count in zip("abc", skips, strict=False)
    ]


def test_the_monitor_waits_for_its_copy_and_makes_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    landing, monitor, pair = Landing(monkeypatch), SkipMonitor(), watched(0, 5)
    pair[0][1].skipped += 1
    assert list(monitor.look(0, CPU, pair)) == []
    pair[1][1].skipped += 3  # after the copy was made: the next one's
    for call in range(1, 3 * CALLS_BETWEEN_LOOKS):
        assert list(monitor.look(call, CPU, pair)) == []
    assert landing.copies == 1
    landing.landed = True
    assert list(monitor.look(3 * CALLS_BETWEEN_LOOKS, CPU, pair)) == [("a", 0, 1)]
    assert landing.copies == 2
    assert list(monitor.look(3 * CALLS_BETWEEN_LOOKS + 1, CPU, pair)) == [("b", 5, 8)]
    for call in range(3 * CALLS_BETWEEN_LOOKS + 2, 4 * CALLS_BETWEEN_LOOKS):
        assert list(monitor.look(call, CPU, pair)) == []
    assert landing.copies == 2
    assert list(monitor.look(4 * CALLS_BETWEEN_LOOKS, CPU, pair)) == []
    assert landing.copies == 3


def test_what_is_known_from_elsewhere_is_no_news(monkeypatch: pytest.MonkeyPatch) -> None:
    landing, monitor, (one,) = Landing(monkeypatch), SkipMonitor(), watched(0)
    one[1].skipped += 1
    list(monitor.look(0, CPU, [one]))
    one[1].skips = 2  # read by a step of this tensor alone
    landing.landed = True
    assert list(monitor.look(1, CPU, [one])) == []
    assert one[1].skips == 2


def test_a_report_that_was_not_taken_comes_again(monkeypatch: pytest.MonkeyPatch) -> None:
    landing, monitor, pair = Landing(monkeypatch), SkipMonitor(), watched(0, 0)
    landing.landed = True
    for _, counter in pair:
        counter.skipped += 1
    list(monitor.look(0, CPU, pair))
    for name, _, _ in monitor.look(1, CPU, pair):
        assert name == "a"
        break  # as a warning that is an error does
    reported = [report for call in range(2, 40) for report in monitor.look(call, CPU, pair)]
    assert reported == [("b", 0, 1)]


# ---------------------------------------------------------------------- scalars


def test_learning_rates_on_a_device() -> None:
    rates = LearningRates()
    first = rates.on(CPU, 0.1, 1)
    assert first.dtype == torch.float64
    version = first._version
    assert rates.on(CPU, 0.1, 1) is first
    assert first._version == version  # nothing was written
    assert rates.on(CPU, 0.1, 2) is not first  # each group's own: they may part
    assert rates.on(CPU, 0.2, 1) is first
    assert float(first) == 0.2
    captured = rates.on(CPU, 0.3, 1, capturing=True)
    assert (float(captured), float(first)) == (0.3, 0.2)
    assert rates.on(CPU, 0.3, 1) is first
    assert float(first) == 0.3
    assert rates.on(META, torch.tensor(0.5), 1).device == META  # a tensor on the host is a number to a device
    assert rates.on(META, torch.tensor(0.5), 1) is rates.on(META, 0.5, 1)
    own = torch.tensor(0.5)
    assert rates.on(CPU, own, 1) is own
    assert rates.on(CPU, own.view(1), 1).data_ptr() == own.data_ptr()
    assert rates.on(CPU, own.bfloat16(), 1).dtype == torch.float64


def test_unscaling_moves_once_for_each_device() -> None:
    scale, found = torch.tensor([2.0]), torch.tensor(0.0)
    unscaling = Unscaling(scale, found)
    assert unscaling.on(CPU) == {"grad_scale": scale, "found_inf": found}
    assert unscaling.on(CPU)["grad_scale"] is scale
    moved = unscaling.on(META)
    assert moved["grad_scale"].device == moved["found_inf"].device == META
    assert unscaling.on(META)["grad_scale"] is moved["grad_scale"]
    assert Unscaling(None, None).on(META) == {"grad_scale": None, "found_inf": None}
    with pytest.raises(ValueError, match=r"found_inf: .*single number"):
        Unscaling(None, torch.zeros(2))


def test_a_learning_rate_on_a_device_is_not_read() -> None:
    check_lr({"lr": torch.tensor(0.1, device="meta")}, "here")  # reading it would raise
    with pytest.raises(ValueError, match=r"^lr=.* in here"):
        check_lr({"lr": torch.tensor([0.1, 0.2], device="meta")}, "here")
    with pytest.raises(ValueError, match=r"^lr=.* in here"):
        check_lr({"lr": torch.tensor(-0.1)}, "here")


# ---------------------------------------------------------------------- its cost


def test_the_benchmark_of_the_cost_runs(tmp_path: Path) -> None:
    script = Path(__file__).parents[1] / "bench" / "step_overhead.py"
    # Where the tests find the package, whether it is installed or on a path; the script's folder comes first.
    program = f"import runpy, sys; sys.path[:] = {[str(script.parent), *sys.path]!r}; sys.argv[0] = {str(script)!r}; "
    program += f"runpy.run_path({str(script)!r}, run_name='__main__')"
    out = tmp_path / "overhead.json"
    command = [sys.executable, "-c", program, "--steps", "4", "--layers", "1", "--json", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode in (0, 1), done.stderr  # 1: over a millisecond, as it may be on a busy machine
    rows = json.loads(out.read_text())["rows"]
    assert {row["what"] for row in rows} == {"optimizer", "optimizer and pipeline", "one at a time"}
    assert all(0 < row["median"] <= row["slowest"] for row in rows)
