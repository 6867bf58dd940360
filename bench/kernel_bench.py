"""Times this library's operations and their rivals in one interleaved run; ``--help`` lists the options.

bench/README.md says how it measures and how to read it.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from pathlib import Path
from typing import Any


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line; a bad value ends the program with a message that says what was expected."""
    parser = argparse.ArgumentParser(description="Benchmark of galore-kernels against its rivals.")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--threads", type=_positive, default=1, help="threads of every implementation on the CPU (1)")
    parser.add_argument("--rounds", type=_positive, help="samples per implementation (25; sweep 9; quick 3)")
    parser.add_argument("--operations", type=_operations, help="comma-separated; default all")
    parser.add_argument("--shapes", type=_shapes, help="such as 512x512,1024x4096, or llama-60m, llama-7b: one layer")
    parser.add_argument("--ranks", type=_ranks, help="comma-separated; clipped ranks are left out; APOLLO-Mini's is 1")
    parser.add_argument("--dtypes", type=_dtypes, help="comma-separated of fp32, bf16, fp16; default fp32,bf16")
    parser.add_argument("--out", type=Path, help="JSON file; the picture gets the same name with .png")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--sweep", action="store_true", help="galore_update over shapes and ranks, against galore_torch")
    mode.add_argument("--quick", action="store_true", help="small matrices, few rounds: does it run?")
    return parser.parse_args(arguments)


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number >= 1")
    return int(text)


def _ranks(text: str) -> list[int]:
    return [_positive(part) for part in text.split(",")]


def _choices(text: str, known: tuple[str, ...]) -> list[str]:
    parts = text.split(",")
    for part in parts:
        if part not in known:
            raise argparse.ArgumentTypeError(f"{part!r}: expected one of {', '.join(known)}")
    return parts


def _operations(text: str) -> list[str]:
    # As in problem.py, which can't be imported yet: it imports torch.
    adam, others = ("galore_update", "lowrank_update", "adam8bit_update"), ("apollo_update", "apollo_mini_update")
    return _choices(text, (*adam, "galore_adafactor_update", *others))


def _dtypes(text: str) -> list[str]:
    return _choices(text, ("fp32", "bf16", "fp16"))


def _shapes(text: str) -> list[str]:
    for part in text.split(","):
        if part not in ("llama-60m", "llama-7b") and not re.fullmatch(r"[1-9]\d*x[1-9]\d*", part):
            raise argparse.ArgumentTypeError(f"{part!r}: expected ROWSxCOLUMNS, llama-60m or llama-7b")
    return text.split(",")


def main(arguments: list[str]) -> int:
    """Runs the benchmark; returns the exit status: 1 if one of ours failed or moved the weights wrongly."""
    options = parse(arguments)
    # Before torch is imported: OpenMP reads it once, and bitsandbytes' library has its own copy of OpenMP.
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    import session  # late: it imports torch

    result: dict[str, Any] = session.run(options)
    return 0 if session.sound(result) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
