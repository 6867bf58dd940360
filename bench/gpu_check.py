"""Everything that a machine with a GPU is asked for, in under eight minutes; ``--help`` lists the options.

    python bench/gpu_check.py OUT_DIR --wheels DIR     # builds, tests, sanitizes, measures
    python bench/gpu_check.py OUT_DIR --dry-run        # the same in miniature on a CPU: a rehearsal, not a result

OUT_DIR gets results.json (rewritten after every stage), pictures, report.txt and logs.txt. The exit status is 1 if
something is wrong: a test, a figure of correctness, a finding of compute-sanitizer; 0 otherwise, whatever the times.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gpu_stages
from gpu_plan import DRY_RUN, GPU, Plan
from gpu_stages import Workplace
from gpu_watch import Measurement
from rich.console import Console

FORMAT = 1
#: Seconds kept for the pictures and tables; share of the time that measuring gets whatever the tests take; the build's.
FINISH, MEASURE_SHARE, BUILD_SHARE = 12.0, 0.5, 0.3
LONGEST_LOG = 200_000


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path, help="folder for results.json, pictures and logs.txt")
    parser.add_argument("--dry-run", action="store_true", help="rehearse on this machine's CPU")
    parser.add_argument("--wheels", type=Path, help="folder with the rivals' wheels")
    parser.add_argument("--package", type=Path, help="folder that holds a built galore_kernels: build nothing")
    parser.add_argument("--minutes", type=float, default=8.0, help="for everything (8)")
    parser.add_argument("--commit", help="what to note where there is no git")
    parser.add_argument("--skip", default="", help="comma-separated beginnings of stages to leave out: tests,sanitizer")
    return parser.parse_args(arguments)


class Check:
    """One run: its stages, its time, and what it has found so far."""

    def __init__(self, options: argparse.Namespace, plan: Plan) -> None:
        self.options, self.plan = options, plan
        self.console = Console(width=118, record=True)
        self._start = time.monotonic()
        self._lock = threading.Lock()
        self.found: dict[str, Any] = {
            "format": FORMAT,
            "dry_run": plan.dry_run,
            "what": "DRY RUN on a CPU: no number in this file is a result" if plan.dry_run else "GPU check",
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "complete": False,
            "plan": plan.as_dict(),
            "machine": {},
            "stages": {},
            "measurements": {},
            "goals": [],
            "failures": [],
        }

    def left(self) -> float:
        """Seconds before the tables have to be made."""
        return self.options.minutes * 60 - FINISH - (time.monotonic() - self._start)

    def save(self, **changes: Any) -> None:
        """Writes everything, whole or not at all."""
        with self._lock:
            self.found.update(changes)
            self.found["seconds"] = round(time.monotonic() - self._start, 1)
            path = self.options.out / "results.json"
            path.with_suffix(".new").write_text(json.dumps(self.found, indent=1) + "\n")
            path.with_suffix(".new").replace(path)

    def stage(self, name: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Runs one stage and records how it ended; whatever it raises is recorded too."""
        start = time.monotonic()
        skipped = any(name.startswith(beginning) for beginning in self.options.skip.split(",") if beginning)
        result: dict[str, Any]
        try:
            result = {"status": "skipped", "reason": "--skip"} if skipped else work()
        except Exception as error:
            result = {
                "status": "failed",
                "reason": f"{type(error).__name__}: {error}",
                "output": traceback.format_exc(),
            }
        result["seconds"] = round(time.monotonic() - start, 1)
        with self._lock:
            self.found["stages"][name] = result
        self.save()
        reason = f": {result['reason']}" if "reason" in result else ""
        self.console.print(f"{name}: {result['status']} after {result['seconds']} s{reason[:300]}", markup=False)
        return result

    def stages(self, place: Workplace) -> None:
        """All but the tables."""
        total = self.options.minutes * 60
        machine = self.stage("machine", lambda: gpu_stages.machine(place, 60))
        facts = machine.get("facts", {})
        if facts.get("commit") == "unknown" and self.options.commit:
            facts["commit"] = self.options.commit
        self.save(machine=facts)
        if machine["status"] != "ok":
            return
        capability = facts.get("gpu_capability")
        limit = total * BUILD_SHARE
        build = self.stage("build", lambda: gpu_stages.build(place, self.options.package, capability, limit))
        if build["status"] == "failed" or place.package is None:
            return
        self.stage("rivals", lambda: gpu_stages.rivals(place, self.options.wheels, 60))
        limit = max(20.0, self.left() - total * MEASURE_SHARE)
        side_by_side: dict[str, Callable[[], dict[str, Any]]] = {
            f"tests {name}": lambda name=name, chosen=chosen: gpu_stages.tests(place, name, chosen, limit)  # type: ignore[misc]
            for name, chosen in self.plan.tests.items()
        }
        for tool in gpu_stages.SANITIZER_TOOLS:
            side_by_side[f"sanitizer {tool}"] = lambda tool=tool: gpu_stages.sanitizer(place, tool, limit)  # type: ignore[misc]
        with ThreadPoolExecutor(len(side_by_side)) as pool:  # nothing is timed yet
            for started in [pool.submit(self.stage, name, work) for name, work in side_by_side.items()]:
                started.result()
        measurement = Measurement(place, self.left(), lambda state: self.save(measurements=state["units"]))
        self.stage("measure", measurement.run)

    def keep_logs(self, place: Workplace) -> None:
        """The ends of all logs in one file: what can be brought back is a few files."""
        with (self.options.out / "logs.txt").open("w") as logs:
            for path in sorted(place.folder.glob("*.log")):
                logs.write(f"\n===== {path.name}\n{path.read_text(errors='replace')[-LONGEST_LOG:]}\n")

    def finish(self, place: Workplace) -> None:
        """Goals, tables and pictures; they need the package, whose names they use."""
        if place.package is None:
            raise RuntimeError("there is no package, so nothing was measured")
        sys.path[:0] = [str(folder) for folder in (place.package, place.rivals) if folder]
        import gpu_report  # late: it imports torch and the package

        self.found["goals"] = gpu_report.goals(self.found, self.plan)
        self.found["failures"] = gpu_report.failures(self.found, self.plan)
        self.save()
        gpu_report.draw(self.options.out, self.found, self.plan)
        gpu_report.show(self.console, self.found, self.plan)
        self.console.save_text(str(self.options.out / "report.txt"))

    def status(self) -> int:
        """The exit status. Tests that didn't finish count as failed: a hang looks like that."""
        wrong = {
            name: stage for name, stage in self.found["stages"].items() if stage["status"] in ("failed", "stopped")
        }
        for name, stage in wrong.items():
            self.console.print(f"WRONG: {name}: {stage['status']}: {stage['reason'][:300]}", markup=False)
        for failure in self.found["failures"]:
            self.console.print(f"WRONG: {failure[:300]}", markup=False)
        return 1 if wrong or self.found["failures"] else 0


def main(arguments: list[str]) -> int:
    """Runs it all; the exit status as the module's text says."""
    options = parse(arguments)
    check = Check(options, DRY_RUN if options.dry_run else GPU)
    options.out.mkdir(parents=True, exist_ok=True)
    check.save()
    with tempfile.TemporaryDirectory(prefix="gpu_check_") as folder:
        place = Workplace(check.plan, Path(folder))
        try:
            check.stages(place)
        finally:
            check.keep_logs(place)

        def finish() -> dict[str, Any]:
            check.finish(place)
            return {"status": "ok"}

        check.stage("report", finish)
    check.save(complete=True)
    return check.status()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
