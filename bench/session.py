"""One run of the benchmark, from its options to its tables and files."""

from __future__ import annotations

import argparse
from typing import Any

import machine
import ours
import picture
import rivals
import torch
from floor import Shape, measure_limits
from harness import FLUSH_FACTOR, Clock, CpuClock, CudaClock, Entry, Flush, last_level_cache_bytes
from harness import run as run_row
from problem import FULL_RANK, LAYERS, MINI, OPERATIONS, Case, Problem
from ratios import Row, all_ratios, goals
from report import as_json, print_goals, print_head, print_ratios, print_row, write_json
from rich.console import Console
from rich.progress import Progress

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

#: Square, wide and tall; 60M's matrices, the goals' matrix both ways, and one of 7B.
SWEEP_SHAPES = ["512x512", "512x1376", "1376x512", "1024x4096", "4096x1024", "4096x4096"]
SWEEP_RANKS = [4, 32, 128, 256, 512]  # fine-tuning's, then the papers' for 60M to 1B


def _default(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """What the command line left open."""
    if options.quick:
        base: dict[str, Any] = {
            "shapes": ["96x64", "64x96"],
            "ranks": [8],
            "rounds": 3,
            "operations": list(OPERATIONS),
        }
    elif options.sweep:
        base = {"shapes": SWEEP_SHAPES, "ranks": SWEEP_RANKS, "rounds": 9, "operations": ["galore_update"]}
    elif device.type == "cuda":
        base = {"shapes": ["llama-7b", "4096x4096", "11008x4096", "4096x11008"], "ranks": [128, 1024]}
    else:
        base = {"shapes": ["llama-60m", "512x512", "1376x512", "512x1376", "1024x4096"], "ranks": [128]}
    base = {"rounds": 25, "operations": list(OPERATIONS), "dtypes": ["fp32", "bf16"], **base}
    return {name: getattr(options, name) or value for name, value in base.items()}


def cases(operations: list[str], shapes: list[str], ranks: list[int], dtypes: list[str]) -> list[Case]:
    """Every row: operation x shape x rank x dtype, without ranks beyond a matrix' smaller side."""
    found = []
    for operation in operations:
        for text in shapes:
            matrices = _matrices(text)
            label = text if text not in LAYERS else f"{text} layer ({len(matrices)} matrices)"
            smallest = min(min(shape) for shape in matrices)
            wanted: list[int | None] = [rank for rank in ranks if rank <= smallest]
            for rank in [None] if operation in FULL_RANK else [1] if operation == MINI else wanted:
                found += [Case(operation, label, matrices, rank, DTYPES[name]) for name in dtypes]
    return found


def _matrices(text: str) -> tuple[Shape, ...]:
    if text in LAYERS:
        return LAYERS[text]
    rows, cols = text.split("x")
    return ((int(rows), int(cols)),)


def _clock(name: str) -> Clock:
    if name == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: torch.cuda.is_available() is False here; use --device cpu")
    return CudaClock() if name == "cuda" or (name == "auto" and torch.cuda.is_available()) else CpuClock()


def _sweep_entries(entries: list[Entry]) -> list[Entry]:
    # The sweep asks one question of many shapes; everyone else would take most of its time.
    wanted = {*ours.native_names(), ours.GALORE_OPTIMIZER, rivals.TWO_PRODUCTS, rivals.GALORE_8BIT}
    return [entry for entry in entries if entry.name in wanted]


def run(options: argparse.Namespace, entries: list[Entry] | None = None) -> dict[str, Any]:
    """Measures limits and rows, prints the tables, writes the files; returns what the JSON holds.

    Args:
        options: the parsed command line.
        entries: what to compare; by default ours and the rivals.
    """
    torch.set_num_threads(options.threads)
    console = Console(width=None if Console().is_terminal else 180)
    clock = _clock(options.device)
    settings = _default(options, clock.device)
    cache = last_level_cache_bytes(clock.device)
    flush = Flush(clock.device, 2**20 if options.quick else cache)
    if entries is None:
        entries = [*ours.entries(), *rivals.entries()]
    if options.sweep:
        entries = _sweep_entries(entries)
    facts = {**machine.describe(clock.device, options.threads, cache), "backends": ours.backends()}
    method = {
        **settings,
        "flush_bytes": flush.bytes,
        "flush": f"a buffer of {FLUSH_FACTOR} last-level caches is read before every call"
        if not options.quick
        else "1 MiB",
        "order": "every implementation once per round, shuffled anew each round",
        "refresh": "excluded: rivals are given a basis, ours finds its own before timing",
        "statistic": "median and quartiles over rounds",
    }
    buffer = 2**20 if options.quick else FLUSH_FACTOR * cache
    size = 128 if options.quick else 8192 if clock.device.type == "cuda" else 2048
    limits = measure_limits(clock, [DTYPES[d] for d in settings["dtypes"]], buffer_bytes=buffer, gemm_size=size)
    print_head(console, facts, limits, method)

    todo = cases(settings["operations"], settings["shapes"], settings["ranks"], settings["dtypes"])
    if not todo:
        raise SystemExit("no row to measure: every rank exceeds the smaller side of every shape; lower --ranks")
    rows: list[Row] = []
    with Progress(console=console, transient=True) as progress:
        bar = progress.add_task("", total=len(todo))
        for case in todo:
            progress.update(bar, description=case.title)
            problem = Problem(case, clock.device)
            rows.append(Row(case, run_row(problem, entries, rounds=settings["rounds"], clock=clock, flush=flush)))
            print_row(console, rows[-1], limits)
            progress.advance(bar)

    facts["load_at_end"] = machine.load()
    kernels = ours.native_names()
    optimizers = (ours.GALORE_OPTIMIZER, ours.APOLLO_OPTIMIZER, ours.ADAFACTOR_OPTIMIZER)
    ratios = all_ratios(rows, kernels)
    reached = goals(rows, kernels, optimizers, limits, clock.device.type)
    print_ratios(console, ratios)
    print_goals(console, reached)
    data = as_json(facts, method, limits, rows, ratios, reached)
    if options.out is not None:
        write_json(options.out, data)
        footer = machine.summary(facts)
        if options.sweep:
            picture.draw_sweep(options.out.with_suffix(".png"), rows, kernels, rivals.GALORE_8BIT, footer)
        else:
            picture.draw_rows(options.out.with_suffix(".png"), rows, limits, footer)
        console.print(f"wrote {options.out} and {options.out.with_suffix('.png').name}")
    return data


def sound(data: dict[str, Any]) -> bool:
    """True if none of ours failed or moved the weights wrongly. A rival's faults are the rival's."""
    results = (result for row in data["rows"] for result in row["results"] if result["family"] == "ours")
    return all(result["status"] in ("ok", "missing") for result in results)
