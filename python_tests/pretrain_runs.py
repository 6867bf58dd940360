"""Pre-training runs small enough for a test: a Llama of 0.1 M parameters on forty short files, a dozen steps."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from forks import fork, run_ranks
from worker_processes import difference

from galore_kernels import checkpoint
from galore_kernels.pretrain import main

STEPS = 12

NANO = ["--hidden", "64", "--intermediate", "176", "--layers", "2", "--heads", "2", "--sequence", "32", "--batch", "4",
        "--steps", str(STEPS), "--rank", "8", "--update-proj-gap", "5", "--eval-every", "4", "--val-windows", "8",
        "--device", "cpu"]  # fmt: skip

#: What a run imports when it needs it.
_LATE = ("transformers.models.llama.modeling_llama", "matplotlib.pyplot", "torch.distributed.fsdp",
         "torch.distributed.checkpoint.state_dict")  # fmt: skip

# Neither divides the other nor the steps: sessions end between lines of the log, and between saves.
EVERY = ["--log-every", "3", "--save-every", "5"]


def write_text(folder: Path) -> Path:
    """Forty files of which some validate (by their names, so always the same)."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(40):
        lines = [f"{number * line % 97} bottles of beer on the wall {line}\n" for line in range(40)]
        (folder / f"d{number}.txt").write_text("".join(lines))
    return folder


def nano(text: Path, out: Path, name: str, *more: str) -> list[str]:
    """Arguments of a run that begins."""
    return ["--text", str(text), "--out", str(out), "--name", name, *NANO, *EVERY, *more]


def last_state(out: Path, name: str) -> dict[str, Any]:
    """The final checkpoint of a run without what differs between equal runs: the times it took."""
    state: dict[str, Any] = checkpoint.load(out / name / f"checkpoint-{STEPS:08d}.pt")
    for key in ("seconds", "interval_seconds"):
        del state["progress"][key]
    return state


def log_lines(out: Path, name: str, *kinds: str) -> list[dict[str, Any]]:
    """Lines of a run's log of these kinds without what differs between equal runs: times and memory."""
    entries = [json.loads(line) for line in (out / name / "log.jsonl").read_text().splitlines()]
    timed = ("seconds", "tokens_per_second", "peak_memory_bytes")
    return [{key: value for key, value in entry.items() if key not in timed} for entry in entries
            if entry["kind"] in kinds]  # fmt: skip


def assert_equal_runs(out: Path, one: str, other: str) -> None:
    """Weights, optimizer state and every figure in the log, bit for bit."""
    assert_equal(last_state(out, one), last_state(out, other))
    kinds = ("train", "validation", "final")
    assert log_lines(out, one, *kinds) == log_lines(out, other, *kinds)


def assert_equal(left: Any, right: Any, place: str = "") -> None:
    """Nested states are equal, tensors in dtype and bits."""
    assert type(left) is type(right), place
    if isinstance(left, dict):
        assert left.keys() == right.keys(), place
        for key in left:
            assert_equal(left[key], right[key], f"{place}/{key}")
    elif isinstance(left, (list, tuple)):
        assert len(left) == len(right), place
        for number, (a, b) in enumerate(zip(left, right, strict=True)):
            assert_equal(a, b, f"{place}/{number}")
    elif isinstance(left, torch.Tensor):
        assert left.dtype == right.dtype, place
        assert torch.equal(left, right), place
    else:
        assert left == right, place


def start_in_child(arguments: list[str]) -> int:
    """Run the command line in a forked child."""
    return fork(lambda: main(arguments))


def run_parallel(world: int, arguments: list[str], before: Callable[[int], None] | None = None) -> list[int]:
    """The exit statuses of the command line in so many processes; ``before(rank)`` is called first."""
    for module in _LATE:  # once here, not once in each process
        importlib.import_module(module)

    def work(rank: int) -> int:
        if before is not None:
            before(rank)
        return main(arguments)

    return run_ranks(world, work)


def resume(out: Path, name: str, *more: str) -> list[str]:
    """Arguments that go on with a run."""
    return ["--out", str(out), "--resume", str(out / name), "--device", "cpu", "--threads", "1", *EVERY, *more]


def weights_differ(out: Path, one: str, other: str) -> float:
    """The largest relative difference of two runs' final weights, tensor by tensor."""
    return difference(*(last_state(out, name)["model"] for name in (one, other)))
