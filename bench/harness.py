"""Timing: a clock per device, cold caches, and one interleaved run of everything that a row compares."""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from floor import ZERO, Work
from problem import Problem, check_movement

Call = Callable[[], object]

#: The flush reads this many times the last-level cache: caches that keep victims hold some of 1x.
FLUSH_FACTOR = 4
#: Calls before timing starts: they are checked (`problem.check_movement`) and warm code, allocator and state.
CHECKED_CALLS = 3


class UnavailableError(Exception):
    """An implementation that can't run here; the message is the reason that the report prints."""


@dataclass
class Implementation:
    """One implementation, built for one problem.

    Attributes:
        call: one step; the only thing that is timed.
        work: what this implementation must move and compute (its own state format).
        weights: what ``call`` must move; None for a yardstick that updates nothing.
        full_rank: a full-rank optimizer in a low-rank row; its steps are longer.
        before: run untimed ahead of every call (puts back gradients that a rival replaces).
        notes: what a reader must know of it (how it was patched, what it leaves out).
    """

    call: Call
    work: Work
    weights: list[torch.Tensor] | None
    before: Callable[[], object] = lambda: None
    full_rank: bool = False
    notes: str = ""


@dataclass(frozen=True)
class Entry:
    """A name in the tables and how to build it; ``build`` raises UnavailableError if it can't run.

    ``family`` is "ours", "yardstick" or "rival"; ``operations`` are the rows it belongs to.
    """

    name: str
    family: str
    operations: tuple[str, ...]
    build: Callable[[Problem], Implementation]


@dataclass
class Result:
    """One implementation in one row.

    Attributes:
        status: ok, missing (can't run), broken (moved the weights wrongly or not at all), failed (raised).
        reason: why it is not ok.
        seconds: one sample per round; empty if it is not ok.
    """

    name: str
    family: str
    status: str
    reason: str = ""
    notes: str = ""
    work: Work = ZERO
    seconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        """In seconds."""
        return statistics.median(self.seconds)

    def quartiles(self) -> tuple[float, float]:
        """First and third quartile of the samples."""
        return quartiles(self.seconds)


def quartiles(samples: Sequence[float]) -> tuple[float, float]:
    """First and third quartile; of a single sample, that sample twice."""
    if len(samples) == 1:
        return samples[0], samples[0]
    first, _, third = statistics.quantiles(samples, n=4, method="inclusive")
    return first, third


class CpuClock:
    """Wall time of a call on the host."""

    def __init__(self) -> None:
        self.device = torch.device("cpu")

    def seconds(self, call: Call) -> float:
        """How long one call takes."""
        start = time.perf_counter_ns()
        call()
        return (time.perf_counter_ns() - start) * 1e-9


class CudaClock:
    """Time between two events on the current stream of an idle device: launch latency and host gaps count."""

    def __init__(self) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())

    def seconds(self, call: Call) -> float:
        """How long one call takes."""
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
        call()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) * 1e-3


Clock = CpuClock | CudaClock


def last_level_cache_bytes(device: torch.device) -> int:
    """Size of the largest cache that a core (or the GPU) sees; 32 MiB where the system doesn't tell."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    unit = {"K": 1024, "M": 1024**2, "G": 1024**3}
    return max((int(size[:-1]) * unit[size[-1]] for size in sizes), default=32 * 1024**2)


class Flush:
    """Evicts everything by reading a buffer of several last-level caches.

    It reads and doesn't write: dirty lines would be written back during the next call, on that call's time.
    """

    def __init__(self, device: torch.device, cache_bytes: int) -> None:
        self.bytes = FLUSH_FACTOR * cache_bytes
        self._buffer = torch.ones(self.bytes // 4, dtype=torch.float32, device=device)

    def __call__(self) -> None:
        """Leaves no line of anyone's data in a cache."""
        self._buffer.sum()


def order(names: Sequence[str], round_index: int, seed: int = 0) -> list[str]:
    """The order of one round: a permutation of ``names`` that depends on nothing but the seed and the round.

    Rotation alone would keep everyone behind the same neighbour; shuffling varies the neighbours too.
    """
    shuffled = list(names)
    random.Random(f"{seed}/{round_index}").shuffle(shuffled)
    return shuffled


def prepare(problem: Problem, entries: Sequence[Entry]) -> tuple[list[Result], dict[str, Implementation]]:
    """Builds and checks every entry of the operation. Whoever can't run, or runs wrongly, is a result too."""
    results, runnable = [], {}
    for entry in entries:
        if problem.operation not in entry.operations:
            continue
        result = Result(entry.name, entry.family, "ok")
        results.append(result)
        try:
            built = entry.build(problem)
            result.notes, result.work = built.notes, built.work
            before = None if built.weights is None else [w.detach().clone() for w in built.weights]
            for _ in range(CHECKED_CALLS):
                built.before()
                built.call()
            if before is not None and built.weights is not None:
                rank = None if built.full_rank else problem.rank
                fault = check_movement(problem, rank, before, built.weights, CHECKED_CALLS)
                if fault is not None:
                    result.status, result.reason = "broken", fault
                    continue
            runnable[entry.name] = built
        except UnavailableError as error:
            result.status, result.reason = "missing", str(error)
        except Exception as error:  # a rival may raise anything: the table says so and the others go on
            result.status, result.reason = "failed", f"{type(error).__name__}: {error}"
    return results, runnable


def run(
    problem: Problem, entries: Sequence[Entry], *, rounds: int, clock: Clock, flush: Callable[[], object]
) -> list[Result]:
    """Times every runnable entry once per round, in a new order each round, caches cold before each call.

    Returns one Result per entry of the problem's operation, in the entries' order.
    """
    results, runnable = prepare(problem, entries)
    samples: dict[str, list[float]] = {name: [] for name in runnable}
    collecting = gc.isenabled()
    gc.disable()
    try:
        for index in range(rounds):
            for name in order(list(runnable), index):
                implementation = runnable[name]
                implementation.before()
                flush()
                samples[name].append(clock.seconds(implementation.call))
    finally:
        if collecting:
            gc.enable()
    for result in results:
        result.seconds = samples.get(result.name, [])
    return results
