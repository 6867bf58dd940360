"""How good a refreshed subspace is, and how long it takes to find: ours, PyTorch's and galore_torch's.

    python bench/subspace_bench.py
    python bench/subspace_bench.py --json bench/results/subspace.json

*Quality*: matrices of 2048 x 640 with known spectra, rounded to each dtype. Everyone's basis P of rank r is judged by
the share of the exact top-r energy that it captures, |G P|_F^2 over the sum of the r largest squared singular values of
the same rounded matrix, in float64: the worst over the seeds. Ours starts cold, from a sketch, or warm, from the basis
of a gradient of which 0.3 lay in other directions. torch.svd_lowrank is given q = r + 8 columns, niter 0, 1 and 2, and
the matrix in float32, since it takes nothing narrower; where its decomposition does not converge it has no share.

*Time*: a gradient of 1024 x 4096 normal entries, rank 128, one thread; one round calls everyone once in an order
shuffled anew; medians and quartiles. galore_torch's is its projector's own function. Everyone gets the gradient in the
dtype named, and converts it where it must, inside the time.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from itertools import product
from pathlib import Path

import machine
import torch
from report import write_json
from rich.console import Console
from rich.progress import track
from rich.table import Table
from spectra import DECAYING, NOISE_LIKE, gradient
from torch import Tensor

from galore_kernels.subspace import find_subspace, refresh_basis

JUDGED_SHAPE = (2048, 640)
TIMED_SHAPE = (1024, 4096)
RANKS = (16, 64, 128, 256)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DRIFT = 0.3
TIMED_RANK = 128

Find = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Quality:
    """The worst share of the exact energy, and the worst departure from orthonormality."""

    spectrum: str
    rank: int
    dtype: str
    method: str
    share: float | None
    orthonormality: float | None


@dataclass(frozen=True)
class Timing:
    """Seconds."""

    dtype: str
    method: str
    median: float
    first_quartile: float
    third_quartile: float


def lowrank(rank: int, iterations: int) -> Find:
    """``torch.svd_lowrank``, with random numbers of its own."""

    def find(grad: Tensor) -> Tensor:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return torch.svd_lowrank(grad.float(), q=rank + 8, niter=iterations)[2][:, :rank]

    return find


def ours_cold(rank: int) -> Find:
    """From a sketch."""
    return lambda grad: find_subspace(grad, rank).basis


def ours_warm(rank: int, before: Tensor) -> Find:
    """From the basis of an earlier gradient; what it captures is not looked at, so that no cold search follows."""
    previous = refresh_basis(before, rank)
    return lambda grad: find_subspace(grad, rank, previous=previous, captured=0.0).basis


def drifted(grad: Tensor, seed: int) -> Tensor:
    """A gradient of the same length, of which ``DRIFT`` lies in other directions."""
    noise = torch.randn(grad.shape, generator=torch.Generator().manual_seed(1000 + seed), dtype=grad.dtype)
    return (1 - DRIFT**2) ** 0.5 * grad + DRIFT * noise * (grad.norm() / noise.norm())


def qualities(shape: tuple[int, int], ranks: Sequence[int], seeds: int, console: Console) -> list[Quality]:
    """Every spectrum, rank, dtype and method."""
    found = []
    cases = list(product((*DECAYING, *NOISE_LIKE), ranks, DTYPES))
    for name, rank, dtype in track(cases, "quality", console=console, transient=True):
        worst: dict[str, list[tuple[float, float]]] = {}
        failed: set[str] = set()
        for seed in range(seeds):
            whole = gradient(name, *shape, rank, seed)
            grad, before = whole.to(DTYPES[dtype]), drifted(whole, seed).to(DTYPES[dtype])
            wide = grad.double()
            exact = torch.linalg.eigvalsh(wide.T @ wide).flip(0)[:rank].sum()
            methods = {"ours, cold": ours_cold(rank), "ours, warm": ours_warm(rank, before)}
            methods.update({f"svd_lowrank, niter {i}": lowrank(rank, i) for i in (0, 1, 2)})
            for method, find in methods.items():
                try:
                    basis = find(grad).double()
                except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
                    failed.add(method)
                    continue
                active = basis[:, basis.any(dim=0)]
                apart = active.T @ active - torch.eye(active.shape[1], dtype=torch.float64)
                share = ((wide @ basis).square().sum() / exact).item()
                worst.setdefault(method, []).append((share, apart.abs().max().item()))
        for method in methods:
            if method in failed:
                found.append(Quality(name, rank, dtype, method, None, None))
                continue
            shares, errors = zip(*worst[method], strict=True)
            found.append(Quality(name, rank, dtype, method, min(shares), max(errors)))
    return found


def timings(shape: tuple[int, int], rounds: int, dtype: str) -> list[Timing]:
    """Everyone interleaved on one gradient."""
    rank = TIMED_RANK
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(DTYPES[dtype])
    projector = import_module("galore_torch.galore_projector").GaLoreProjector(rank, proj_type="std")
    methods: dict[str, Callable[[], object]] = {
        "ours, cold": lambda: ours_cold(rank)(grad.T),
        "ours, exact": lambda: refresh_basis(grad.T, rank, method="svd"),
        "galore_torch": lambda: projector.get_orthogonal_matrix(grad, rank, type="left"),
        "torch.linalg.svd": lambda: torch.linalg.svd(grad.float(), full_matrices=False),
        **{f"svd_lowrank, niter {i}": lambda i=i: lowrank(rank, i)(grad.T) for i in (0, 1, 2)},  # type: ignore[misc]
    }
    warm = ours_warm(rank, drifted(grad.float(), 0).T)
    methods["ours, warm"] = lambda: warm(grad.T)
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    order = random.Random(0)
    for turn in range(rounds + 1):
        for name in order.sample(list(methods), len(methods)):
            start = time.perf_counter()
            methods[name]()
            if turn:  # the first is a warm-up
                seconds[name].append(time.perf_counter() - start)
    found = []
    for name, values in seconds.items():
        first, median, third = statistics.quantiles(values, n=4)
        found.append(Timing(dtype, name, median, first, third))
    return found


def print_quality(console: Console, found: list[Quality]) -> None:
    """A row for each spectrum, rank and dtype."""
    methods = list(dict.fromkeys(quality.method for quality in found))
    table = Table(title="Worst share of the exact top-r energy", title_justify="left")
    for column in ("spectrum", "r", "dtype", *methods):
        table.add_column(column)
    rows: dict[tuple[str, int, str], dict[str, float | None]] = {}
    for quality in found:
        rows.setdefault((quality.spectrum, quality.rank, quality.dtype), {})[quality.method] = quality.share
    for (spectrum, rank, dtype), shares in rows.items():
        cells = ["failed" if shares[method] is None else f"{shares[method]:.4f}" for method in methods]
        table.add_row(spectrum, str(rank), dtype, *cells)
    console.print(table)
    worst = max(quality.orthonormality or 0.0 for quality in found if quality.method.startswith("ours"))
    console.print(f"ours: orthonormal to {worst:.1e} throughout")


def print_timings(console: Console, found: list[Timing]) -> None:
    """A row for each method, with ratios to our cold start."""
    table = Table(title=f"Seconds at 1024 x 4096, rank {TIMED_RANK}", title_justify="left")
    for column in ("dtype", "method", "median ms", "quartiles", "over ours, cold"):
        table.add_column(column, justify="left" if column in ("dtype", "method") else "right")
    ours = {timing.dtype: timing.median for timing in found if timing.method == "ours, cold"}
    for timing in found:
        quartiles = f"{timing.first_quartile * 1e3:.0f} - {timing.third_quartile * 1e3:.0f}"
        ratio = f"{timing.median / ours[timing.dtype]:.2f}"
        table.add_row(timing.dtype, timing.method, f"{timing.median * 1e3:.1f}", quartiles, ratio)
    console.print(table)


def main(arguments: list[str]) -> int:
    """Prints both tables and writes the JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, help="where to write the result")
    parser.add_argument("--rounds", type=int, default=9, help="of the timing")
    parser.add_argument("--seeds", type=int, default=3, help="matrices of each spectrum")
    parser.add_argument("--quick", action="store_true", help="small matrices and few rounds: does everything run?")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    facts = machine.describe(torch.device("cpu"), 1, 0)
    console = Console(width=None if Console().is_terminal else 120)
    console.print(machine.summary(facts))
    timed_shape, shape = ((300, 320), (400, 300)) if options.quick else (TIMED_SHAPE, JUDGED_SHAPE)
    rounds, seeds = (2, 1) if options.quick else (options.rounds, options.seeds)
    timed = [timing for dtype in ("float32", "bfloat16") for timing in timings(timed_shape, rounds, dtype)]
    print_timings(console, timed)
    judged = qualities(shape, RANKS[:1] if options.quick else RANKS, seeds, console)
    print_quality(console, judged)
    if options.json is not None:
        data = {
            "format": 1,
            "machine": facts,
            "method": (__doc__ or "").strip(),
            "judged_shape": shape,
            "timed_shape": timed_shape,
            "timings": [asdict(timing) for timing in timed],
            "quality": [asdict(quality) for quality in judged],
        }
        write_json(options.json, data)
        console.print(f"wrote {options.json}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
