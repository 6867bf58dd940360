"""Prints the facts of this machine as JSON: what a number means nothing without. ``python bench/gpu_facts.py cuda``."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import machine
import torch
from harness import last_level_cache_bytes

_QUERY = "clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.draw,power.limit,temperature.gpu,persistence_mode"


def clocks() -> dict[str, str]:
    """What nvidia-smi says of clocks, power and temperature at the moment; empty where there is none."""
    if shutil.which("nvidia-smi") is None:
        return {}
    command = ["nvidia-smi", f"--query-gpu={_QUERY}", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    values = done.stdout.splitlines()[0].split(", ") if done.stdout else []
    return dict(zip(_QUERY.split(","), values, strict=False))


def _nvcc() -> str:
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if nvcc is None:
        return "not found"
    return subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False).stdout.strip()[-60:]


def main() -> int:
    """Prints them; the exit status is 1, with the reason, if the device isn't there."""
    name = sys.argv[1]
    if name == "cuda" and not torch.cuda.is_available():
        print("torch.cuda.is_available() is False: no CUDA device on this machine; --dry-run rehearses without one")
        return 1
    device = torch.device(name)
    facts = machine.describe(device, torch.get_num_threads(), last_level_cache_bytes(device))
    if name == "cuda":
        facts["multiprocessors"] = torch.cuda.get_device_properties(device).multi_processor_count
        facts["clocks_at_start"] = clocks()
    print(json.dumps({**facts, "nvcc": _nvcc()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
