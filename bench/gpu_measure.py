"""The measurements of ``gpu_check.py``, in a process of their own: ``python bench/gpu_measure.py STATE.json``.

The state holds what has been measured, and what is to be left out. It is rewritten after every unit; a process that is
started again goes on behind the last. A second file says what is being tried at the moment: whoever watches learns from
it which implementation has taken the process down, or hangs.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gpu_entries
import gpu_facts
import gpu_refresh
import harness
import ours
import rivals
import torch
from floor import Limits, measure_limits
from gpu_correctness import correctness
from gpu_plan import DRY_RUN, GPU, LAYER, LAYERS, Plan, roofline_seconds
from gpu_problem import SharedProblem
from harness import Call, CpuClock, CudaClock, Entry, Implementation
from problem import Case, Problem
from ratios import Row
from report import result_json

from galore_kernels.ops import registry

#: Exit status that asks for another process, without what is named as being tried: its device may no longer answer.
ANOTHER = 3

OPTIMIZER = "ours: GaLoreFusedAdam8bit.step"
RIVALS = (rivals.BNB_8BIT, rivals.TORCH_FUSED, rivals.GALORE_8BIT)


class Session:
    """What the units share: plan, clock, and the files."""

    def __init__(self, path: Path, plan: Plan) -> None:
        self.plan, self._path = plan, path
        self.device = torch.device(plan.device)
        self.clock = CudaClock() if plan.device == "cuda" else CpuClock()
        self.state: dict[str, Any] = {"units": {}, "without": {}}
        if path.exists():
            self.state |= json.loads(path.read_text())
        self.unit, self.host_seconds = "", dict[str, list[float]]()
        self.trying: str | None = None

    def mark(self, entry: str | None) -> None:
        """Says what is about to be tried."""
        self.trying = entry
        text = json.dumps({"unit": self.unit, "entry": entry})
        self._path.with_suffix(".now").write_text(text)

    def record(self, result: dict[str, Any]) -> None:
        """Keeps a unit's result."""
        self.state["units"][self.unit] = result
        written = self._path.with_suffix(".new")
        written.write_text(json.dumps(self.state, indent=1))
        written.replace(self._path)

    @property
    def limits(self) -> Limits:
        """As measured by the first unit."""
        found = self.state["units"].get("limits", {})
        if found.get("status") != "ok":
            raise RuntimeError("the limits of this machine could not be measured")
        return Limits(**found["limits"])

    def watched(self, entry: Entry) -> Entry:
        """The entry, marked whenever it is tried, and its calls timed on the host as well."""

        def build(problem: Problem) -> Implementation:
            self.mark(entry.name)
            built = entry.build(problem)
            before = built.before

            def marked() -> None:
                self.mark(entry.name)
                before()

            call = self._timed_on_host(entry.name, built.call)
            return dataclasses.replace(built, call=call, before=marked)

        return dataclasses.replace(entry, build=build)

    def _timed_on_host(self, name: str, call: Call) -> Call:
        samples = self.host_seconds.setdefault(name, [])

        def timed() -> None:
            start = time.perf_counter()
            call()
            samples.append(time.perf_counter() - start)

        return timed


def lost(device: torch.device) -> bool:
    """Whether an error has taken the device's context with it, as a bad address does."""
    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize(device)
        return bool(torch.ones(8, device=device).sum().item() != 8)
    except RuntimeError:
        return True


def measured(
    session: Session,
    case: Case,
    entries: Sequence[Entry],
    rounds: int | None = None,
    singles: Sequence[gpu_refresh.Single] = (),
) -> dict[str, Any]:
    """One row: everyone interleaved, nothing flushed in between, for a call goes through more than any cache holds.

    ``rounds`` is the plan's if None; ``singles`` follow one after another.
    """
    left_out = session.state["without"].get(session.unit, {})
    session.host_seconds.clear()
    problem = SharedProblem(case, session.device)
    tried = [session.watched(entry) for entry in entries if entry.name not in left_out]
    results = harness.run(problem, tried, rounds=rounds or session.plan.rounds, clock=session.clock, flush=lambda: None)
    clocks = gpu_facts.clocks() if session.device.type == "cuda" else {}  # while it is still warm
    for single in singles:
        if single.name not in left_out:
            session.mark(single.name)
            results.append(single.timed(problem, session.clock))
            session.host_seconds[single.name] = results[-1].seconds  # the host waits for each
    failed = [result.name for result in results if result.status == "failed"]
    if failed and lost(session.device):
        session.mark(failed[0])
        sys.exit(ANOTHER)
    families = {either.name: either.family for group in (entries, singles) for either in group}
    results += [
        harness.Result(name, family, "failed", left_out[name]) for name, family in families.items() if name in left_out
    ]
    return {**row_json(session, Row(case, results)), "clocks": clocks}


def row_json(session: Session, row: Row) -> dict[str, Any]:
    """A row's facts; rates and shares are of the step's own roofline, whoever takes it."""
    limits, case = session.limits, row.case
    elements = sum(rows * cols for rows, cols in case.shapes)
    seconds = None
    if case.rank is not None:
        seconds = roofline_seconds(case.shapes, case.rank, limits.copy, limits.rate["bf16"])
    found = []
    for result in row.results:
        facts = result_json(result, row, limits)
        if result.seconds:
            host = session.host_seconds[result.name][-len(result.seconds) :]
            facts["host_ms"] = 1e3 * sorted(host)[len(host) // 2]
            facts["own_gb_per_s"] = result.work.bytes_moved / result.median / 1e9
            if seconds is not None:
                facts["of_roofline"] = seconds / result.median
        found.append(facts)
    return {
        "status": "ok",
        "row": case.title,
        "operation": case.operation,
        "rank": case.rank,
        "shapes": [[*shape, count] for shape, count in Counter(case.shapes).items()],
        "elements": elements,
        "roofline_ms": None if seconds is None else seconds * 1e3,
        "results": found,
    }


def _named(entries: Sequence[Entry], names: Sequence[str]) -> list[Entry]:
    return [entry for name in names for entry in entries if entry.name == name]


def _limits(session: Session) -> dict[str, Any]:
    plan = session.plan
    limits = measure_limits(session.clock, [torch.bfloat16], buffer_bytes=plan.copy_bytes, gemm_size=plan.product_size)
    return {"status": "ok", "limits": limits.as_dict(), "backends": ours.backends()}


def _step(rank: int, *, everyone: bool) -> Callable[[Session], dict[str, Any]]:
    """The whole set. Rivals of full rank take as long at every rank, and are there at one of them."""

    def unit(session: Session) -> dict[str, Any]:
        plan = session.plan
        entries = [gpu_entries.grouped(name) for name in plan.ours]
        if everyone:
            entries += _named(ours.entries(), [OPTIMIZER]) + _named(rivals.entries(), RIVALS)
            entries += gpu_entries.chains(plan)
        return measured(session, _whole_set(plan, rank), entries)

    return unit


def _chain(rank: int) -> Callable[[Session], dict[str, Any]]:
    """The strongest chain beside ours: apart from the steps, for compiling it takes longer than all the rest."""

    def unit(session: Session) -> dict[str, Any]:
        plan = session.plan
        return measured(
            session, _whole_set(plan, rank), [gpu_entries.grouped(plan.ours[0]), gpu_entries.chains(plan)[1]]
        )

    return unit


def _whole_set(plan: Plan, rank: int) -> Case:
    return Case("galore_update", "llama-7b", plan.whole_set(), rank, torch.bfloat16)


def _refresh(session: Session) -> dict[str, Any]:
    plan = session.plan
    entries = [gpu_entries.grouped(plan.ours[0]), *gpu_refresh.searches()]
    return measured(session, _whole_set(plan, plan.ranks[0]), entries, plan.refresh_rounds, gpu_refresh.singles(plan))


def _layerwise(index: int) -> Callable[[Session], dict[str, Any]]:
    def unit(session: Session) -> dict[str, Any]:
        plan = session.plan
        rows, cols = plan.scaled(LAYER[index])
        case = Case("galore_update", f"{rows}x{cols}", ((rows, cols),) * plan.matrices, plan.ranks[0], torch.bfloat16)
        return measured(
            session, case, [gpu_entries.single(name, graph=graph) for name in plan.ours for graph in (False, True)]
        )

    return unit


def _full_rank(session: Session) -> dict[str, Any]:
    plan = session.plan
    case = Case("adam8bit_update", "16 of 4096x4096", (plan.scaled((4096, 4096)),) * 16, None, torch.bfloat16)
    entries = [gpu_entries.grouped(name) for name in plan.ours]
    return measured(session, case, entries + _named(rivals.entries(), RIVALS[:2]))


def _square(plan: Plan) -> Case:
    shapes = (plan.scaled(LAYER[0]),) * 4 * LAYERS
    return Case("galore_update", "128 of 4096x4096", shapes, plan.ranks[0], torch.bfloat16)


def _one_pass(session: Session) -> dict[str, Any]:
    return measured(session, _square(session.plan), gpu_entries.one_pass_and_four_launches())


def _int8_weights(session: Session) -> dict[str, Any]:
    """Beside bfloat16 weights, whose roofline the row has."""
    plan = session.plan
    entries = [gpu_entries.grouped(plan.ours[0]), *(gpu_entries.grouped(name, int8=True) for name in plan.ours)]
    return measured(session, _square(plan), entries)


def _correctness(session: Session) -> dict[str, Any]:
    left_out = session.state["without"].get(session.unit, {})
    found: dict[str, Any] = {"status": "ok", "cases": [], "left_out": left_out, "refused": {}}
    for name in session.plan.ours:
        if name in left_out:
            continue
        session.mark(name)
        try:
            registry.select("galore_update", name, session.device)
        except (ValueError, RuntimeError) as error:
            found["refused"][name] = str(error)
            continue
        found["cases"] += correctness(session.plan, name, session.device)
    return found


def units(plan: Plan) -> dict[str, Callable[[Session], dict[str, Any]]]:
    """Name -> measurement, the most important first."""
    first, *others = plan.ranks
    return {
        "limits": _limits,
        "correctness": _correctness,
        f"step r={first}": _step(first, everyone=True),
        f"refresh r={first}": _refresh,
        "layerwise square": _layerwise(0),
        "layerwise wide": _layerwise(-1),
        **{f"step r={rank}": _step(rank, everyone=False) for rank in others},
        "full rank": _full_rank,
        "one pass": _one_pass,
        "int8 weights": _int8_weights,
        **{f"chain r={rank}": _chain(rank) for rank in others},
    }


def run(session: Session) -> int:
    """Every unit that has no result yet."""
    for name, unit in units(session.plan).items():
        if name in session.state["units"]:
            continue
        session.unit = name
        session.mark(None)
        start = time.perf_counter()
        try:
            result = unit(session)
        except Exception as error:
            traceback.print_exc()
            if session.trying is not None or lost(session.device):
                return ANOTHER
            result = {"status": "failed", "reason": f"{type(error).__name__}: {error}"}
        session.record({**result, "seconds": time.perf_counter() - start})
        print(f"{name}: {result['status']}, {time.perf_counter() - start:.1f} s", flush=True)
        gc.collect()
        if session.device.type == "cuda":
            torch.cuda.empty_cache()
    return 0


def main() -> int:
    """Goes on where the state ends; the exit status is 0 if every unit has a result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("state", type=Path)
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args()
    return run(Session(options.state, DRY_RUN if options.dry_run else GPU))


if __name__ == "__main__":
    sys.exit(main())
