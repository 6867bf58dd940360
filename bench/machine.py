"""Facts about the machine, the versions and the commit: what a number means nothing without."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "galore-kernels", "bitsandbytes", "galore-torch", "transformers", "triton", "numpy")


def describe(device: torch.device, threads: int, cache_bytes: int) -> dict[str, Any]:
    """Plain data for the JSON: device, threads, load, versions, commit ("+changes" if dirty), date."""
    facts: dict[str, Any] = {
        "cpu": _cpu_model(),
        "cpu_flags": _cpu_flags(),
        "cores": os.cpu_count(),
        "load_at_start": load(),
        "threads": threads,
        "last_level_cache_bytes": cache_bytes,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts["gpu"] = properties.name
        facts["gpu_memory_bytes"] = properties.total_memory
        facts["gpu_capability"] = f"{properties.major}.{properties.minor}"
        facts["cuda"] = torch.version.cuda
        facts["driver"] = _driver()
    return facts


def summary(facts: dict[str, Any]) -> str:
    """One line for the table's head and the picture's foot."""
    versions = facts["versions"]
    known = ", ".join(f"{name} {version}" for name, version in versions.items() if version is not None)
    where = (
        f"{facts['gpu']} (driver {facts['driver']})" if "gpu" in facts else f"{facts['cpu']}, {facts['cores']} cores"
    )
    running = f"{facts['threads']} thread(s), load {facts['load_at_start']}"
    return f"{where}, {running}; {known}; commit {facts['commit']}; {facts['date']}"


def load() -> float:
    """Mean number of running processes over the last minute: timings of a busy machine say little."""
    return round(os.getloadavg()[0], 2)


def _cpu_model() -> str:
    for line in _cpuinfo():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or "unknown"


def _cpu_flags() -> list[str]:
    """The vector extensions that matter here: "AMD EPYC" names no generation, these do."""
    wanted = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
    for line in _cpuinfo():
        if line.startswith("flags"):
            flags = line.split(":", 1)[1].split()
            return [name for name in wanted if name in flags]
    return []


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    here = Path(__file__).parent
    try:
        done = subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _commit() -> str:
    commit = _git("rev-parse", "--short=12", "HEAD")
    if commit is None:
        return "unknown"
    # Results of earlier runs lie in the tree and are no change of what is measured.
    changes = _git("status", "--porcelain", "--", ":/", ":(exclude,top)bench/results")
    return f"{commit}+changes" if changes else commit


def _driver() -> str:
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0].strip()
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"
