"""The stages of ``gpu_check.py`` apart from measuring: machine, build, rivals, tests, compute-sanitizer."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gpu_processes
from gpu_plan import Plan
from gpu_processes import Ended

BENCH = Path(__file__).resolve().parent
ROOT = BENCH.parent

TEST_FILES = (
    "test_galore_update.py",
    "test_galore_update_quantized.py",
    "test_apollo_update.py",
    "test_device_adafactor.py",
    "test_rotate_moments.py",
    "test_adam8bit_update.py",
    "test_quantize_blockwise.py",
    "test_device_backend.py",
    "test_cuda_device.py",
    "test_subspace_refresh.py",
    "test_subspace_batch.py",
)
SANITIZER_TOOLS = ("memcheck", "racecheck", "initcheck")

_CUDA_HOME = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
_PIP = (sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-cache-dir", "--upgrade")
# Warnings of other people's packages in versions that CI does not have are no failures of ours.
_LENIENT = [
    part for kind in ("Deprecation", "PendingDeprecation", "Future") for part in ("-W", f"default::{kind}Warning")
]

Result = dict[str, Any]


@dataclass
class Workplace:
    """Where a run keeps what it doesn't hand over.

    Attributes:
        folder: for logs and for what the processes write. package, rivals: put in front of the import path.
    """

    plan: Plan
    folder: Path
    package: Path | None = None
    rivals: Path | None = None

    def environment(self, *more: Path) -> dict[str, str]:
        """Of the processes that import the package."""
        folders = [*more, self.package, self.rivals, os.environ.get("PYTHONPATH")]
        path = os.pathsep.join(str(folder) for folder in folders if folder)
        threads = {"OMP_NUM_THREADS": "1"} if self.plan.dry_run else {}
        return {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **threads}

    def run(self, name: str, command: list[str | Path], seconds: float, **environment: str) -> Ended:
        """A process of this run, away from the checkout, whose package it would import."""
        return gpu_processes.run(
            command,
            log=self.log(name),
            environment={**self.environment(), **environment},
            folder=self.folder,
            seconds=seconds,
        )

    def log(self, name: str) -> Path:
        """The file of a process's output."""
        return self.folder / f"{name.replace(' ', '_')}.log"


def _failed(ended: Ended) -> Result:
    reason = ended.stopped or f"exit status {ended.status}"
    return {"status": "stopped" if ended.stopped else "failed", "reason": reason, "output": ended.tail}


def machine(place: Workplace, seconds: float) -> Result:
    """Facts of the machine."""
    ended = place.run("machine", [sys.executable, BENCH / "gpu_facts.py", place.plan.device], seconds)
    if ended.status != 0:
        return _failed(ended) | {"reason": ended.tail.strip().splitlines()[-1] if ended.tail.strip() else "no output"}
    return {"status": "ok", "facts": json.loads(ended.output.strip().splitlines()[-1])}


def build(place: Workplace, given: Path | None, capability: str | None, seconds: float) -> Result:
    """The package in a folder of its own: built for this card alone, or given, or (in a rehearsal) as installed."""
    if given is None and place.plan.dry_run:
        found = importlib.util.find_spec("galore_kernels")
        if found is None or found.origin is None:
            return {"status": "failed", "reason": "galore_kernels can't be imported: install it, or give --package"}
        place.package = Path(found.origin).resolve().parents[1]
        return {"status": "skipped", "reason": "a rehearsal takes the installed package"}
    if given is not None:
        place.package = given.resolve()
        return {"status": "skipped", "reason": f"given: {given}"}
    target = ROOT / "build" / "gpu_check" / "package"
    shutil.rmtree(target, ignore_errors=True)
    search = f"{os.environ.get('PATH', os.defpath)}{os.pathsep}{_CUDA_HOME / 'bin'}"
    architecture = "native" if capability is None else capability.replace(".", "") + "-real"
    command: list[str | Path] = [*_PIP, "--no-build-isolation", "--target", target, ROOT]
    ended = place.run("build", command, seconds, PATH=search, CUDAARCHS=architecture, GALORE_KERNELS_CUDA="1")
    if ended.status != 0:
        return _failed(ended)
    place.package = target
    return {"status": "ok", "architecture": architecture, "folder": str(target.relative_to(ROOT))}


def rivals(place: Workplace, wheels: Path | None, seconds: float) -> Result:
    """Other people's packages, from wheels."""
    if wheels is None:
        return {"status": "skipped", "reason": "no --wheels: whatever is installed"}
    found = sorted(wheels.resolve().glob("*.whl"))
    target = ROOT / "build" / "gpu_check" / "rivals"
    shutil.rmtree(target, ignore_errors=True)
    if not found:
        return {"status": "failed", "reason": f"no wheel in {wheels}"}
    ended = place.run("rivals", [*_PIP, "--no-compile", "--target", target, *found], seconds)
    if ended.status != 0:
        return _failed(ended)
    place.rivals = target
    return {"status": "ok", "wheels": [wheel.name for wheel in found]}


def tests(place: Workplace, name: str, selection: str, seconds: float) -> Result:
    """One run of pytest over the operations' own tests and the device's."""
    outcomes = place.folder / f"tests_{name}.jsonl"
    command: list[str | Path] = [sys.executable, "-m", "pytest", "-q", "-p", "gpu_test_log", "-p", "no:cacheprovider"]
    command += ["-c", ROOT / "pyproject.toml", "--rootdir", ROOT, "--tb=short", "-k", selection, *_LENIENT]
    if place.plan.workers > 1 and importlib.util.find_spec("xdist") is not None:
        command += ["-p", "xdist.plugin", "-n", str(place.plan.workers)]
    command += [ROOT / "python_tests" / file for file in TEST_FILES]
    # Plugins that happen to be there may warn, and the project's settings make every warning an error.
    environment = place.environment(BENCH) | {"GPU_TEST_LOG": str(outcomes), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    ended = place.run(f"tests {name}", command, seconds, **environment)
    return summary(outcomes, ended)


def summary(outcomes: Path, ended: Ended) -> Result:
    """What a run of tests came to, also one that was stopped."""
    lines = outcomes.read_text().splitlines() if outcomes.exists() else []
    records = [json.loads(line) for line in lines]
    counts = Counter(record["outcome"] for record in records)
    failures = [record for record in records if record["outcome"] == "failed"]
    skips = Counter(record["text"] for record in records if record["outcome"] == "skipped")
    result: Result = {
        "status": "ok",
        **{outcome: counts[outcome] for outcome in ("passed", "failed", "skipped")},
        "failures": [{"test": record["test"], "text": record["text"]} for record in failures[:5]],
        "failed_tests": [record["test"] for record in failures[:200]],
        "skipped_because": dict(skips.most_common(8)),
        "slowest": sorted(((r.get("seconds", 0.0), r["test"]) for r in records), reverse=True)[:5],
    }
    if ended.stopped:
        reason = f"{ended.stopped}, with {len(records)} tests done"
        return result | {"status": "stopped", "reason": reason, "output": ended.tail}
    if ended.status != 0:
        reason = f"{counts['failed']} failed" if failures else f"pytest's exit status is {ended.status}"
        return result | {"status": "failed", "reason": reason, "output": ended.tail}
    return result


def sanitizer(place: Workplace, tool: str, seconds: float) -> Result:
    """One tool of compute-sanitizer over every kernel, on small shapes."""
    if place.plan.dry_run:
        return {"status": "skipped", "reason": "a rehearsal runs no kernel on a device"}
    program = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=str(_CUDA_HOME / "bin"))
    if program is None:
        return {"status": "skipped", "reason": "compute-sanitizer is not installed"}
    command: list[str | Path] = [program, "--tool", tool, "--print-limit", "20", "--error-exitcode", "9"]
    command += [sys.executable, BENCH / "gpu_sanitize.py"]
    # Each tensor is an allocation of its own: what lies behind its end is then nobody's.
    ended = place.run(f"sanitizer {tool}", command, seconds, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    return verdict(ended)


def verdict(ended: Ended) -> Result:
    """What a tool has said."""
    cases = len(re.findall(r"^(?:galore_update|apollo_update|group|adam8bit_update)", ended.output, re.MULTILINE))
    found = re.search(r"(?:ERROR|RACECHECK) SUMMARY: (.*)", ended.output)
    result: Result = {"status": "ok", "cases": cases, "summary": found.group(1) if found else ""}
    if "Device not supported" in ended.output:
        return result | {"status": "refused", "reason": "compute-sanitizer refuses this device", "output": ended.tail}
    if ended.stopped or ended.status != 0 or not found or "cases done" not in ended.output:
        start = ended.output.find("=========     ")
        shown = ended.output[max(0, start - 500) :][:4000] if start >= 0 else ended.tail
        return result | _failed(ended) | {"output": shown}
    return result
