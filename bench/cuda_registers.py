"""Registers, spills, shared memory and occupancy of every CUDA kernel, from the compiler: needs nvcc, and no GPU.

    python bench/cuda_registers.py --json bench/results/cuda_registers.json

Compiles ``csrc/cuda/*.cu`` with the options of CMakeLists.txt and reads what ``ptxas -v`` says.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

from rich.console import Console
from rich.table import Table

from galore_kernels import _native

ROOT = Path(__file__).resolve().parents[1]
ARCHITECTURES = (80, 89, 90)

#: Per multiprocessor, from the CUDA programming guide's table of compute capabilities: shared memory in all, most of
#: it for one block, threads. All three have 65,536 registers.
LIMITS = {80: (164 * 1024, 163 * 1024, 2048), 89: (100 * 1024, 99 * 1024, 1536), 90: (228 * 1024, 227 * 1024, 2048)}
REGISTERS = 65536
RESERVED_SHARED = 1024  # of each block, by the system

#: Kernels whose stage has another name than they.
STAGES = {"check_gradient": "adam_update", "dequantize_blockwise": "quantize_blockwise"}


@dataclass(frozen=True)
class Kernel:
    """What the compiler says of one kernel on one architecture. Bytes, but for registers, threads and blocks."""

    name: str
    arguments: str
    architecture: int
    registers: int
    stack: int
    spill_stores: int
    spill_loads: int
    threads: int
    shared: int

    @property
    def blocks(self) -> int:
        """Blocks that a multiprocessor holds at once; 0 if one has more shared memory than it may."""
        in_all, for_one, threads = LIMITS[self.architecture]
        if self.shared > for_one:
            return 0
        warp_registers = -(-self.registers // 8) * 8 * 32
        by_registers = REGISTERS // warp_registers // (self.threads // 32)
        return min(by_registers, threads // self.threads, in_all // (self.shared + RESERVED_SHARED))


def cuda_options() -> list[str]:
    """The options that CMakeLists.txt gives nvcc, without the host compiler's."""
    found = re.search(r"set\(GK_CUDA_OPTIONS ([^)]*)\)", (ROOT / "CMakeLists.txt").read_text())
    if found is None:
        raise SystemExit("CMakeLists.txt: no GK_CUDA_OPTIONS; this script reads the compiler's options there")
    return [option for option in found[1].split() if not option.startswith("-Xcompiler")]


def compiled(source: Path, architecture: int, nvcc: str) -> str:
    """What ptxas says of one translation unit."""
    code = f"-gencode=arch=compute_{architecture},code=sm_{architecture}"
    options = ["-std=c++17", "-O3", f"-I{ROOT / 'csrc'}", *cuda_options(), code, "-Xptxas", "-v", "-cubin"]
    with tempfile.TemporaryDirectory() as folder:
        command = [nvcc, *options, "-o", str(Path(folder, "kernels.cubin")), str(source)]
        run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode != 0:
        raise SystemExit(f"{source.name} for sm_{architecture}: nvcc failed\n{run.stderr}")
    return run.stderr


_ENTRY = re.compile(
    r"Compiling entry function '(?P<symbol>\w+)'"
    r".*?(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads"
    r".*?Used (?P<registers>\d+) registers",
    re.DOTALL,
)
_TEMPLATE = {"(gk::DType)0": "float32", "(gk::DType)1": "bfloat16", "(gk::DType)2": "float16"}
_SIDES = {"(gk::Side)0": "right", "(gk::Side)1": "left"}
_CODED = {"true": "quantized basis", "false": ""}  # the only bool of a kernel's template


def demangled(symbols: list[str]) -> list[tuple[str, str]]:
    """(kernel, its template's arguments) of each symbol."""
    text = subprocess.run(["c++filt"], input="\n".join(symbols), capture_output=True, text=True, check=True).stdout
    names = []
    for line in text.splitlines():
        found = re.search(r"(\w+)_kernel(?:<(.*?)>)?\(", line)
        if found is None:
            raise SystemExit(f"{line}: expected the name of a kernel to end in _kernel")
        arguments = [argument.strip() for argument in (found[2] or "").split(",") if argument]
        named = [{**_TEMPLATE, **_SIDES, **_CODED}.get(a, a) for a in arguments]
        names.append((found[1], ", ".join(filter(None, named))))
    return names


def measure(architectures: tuple[int, ...] = ARCHITECTURES, nvcc: str = "nvcc") -> list[Kernel]:
    """Every kernel on every architecture."""
    shapes = _native.cuda_launch_shapes()
    kernels = []
    for source, architecture in product(sorted((ROOT / "csrc" / "cuda").glob("*.cu")), architectures):
        entries = list(_ENTRY.finditer(compiled(source, architecture, nvcc)))
        for entry, (name, arguments) in zip(entries, demangled([e["symbol"] for e in entries]), strict=True):
            threads, shared = shapes[STAGES.get(name, name)]
            kernels.append(
                Kernel(
                    name,
                    arguments,
                    architecture,
                    int(entry["registers"]),
                    int(entry["stack"]),
                    int(entry["stores"]),
                    int(entry["loads"]),
                    threads,
                    shared,
                )
            )
    return kernels


def main() -> int:
    """Prints the table and writes the JSON; 1 if a kernel spills or does not fit."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, help="where to write the table")
    parser.add_argument("--nvcc", default="nvcc")
    options = parser.parse_args()
    kernels = measure(nvcc=options.nvcc)
    table = Table(title="CUDA kernels, from the compiler: none of this ran on a device")
    for column in ("kernel", "of", "sm", "registers", "spills", "stack", "threads", "shared KB", "blocks per SM"):
        table.add_column(column)
    for k in kernels:
        spills = k.spill_stores + k.spill_loads
        cells = (k.architecture, k.registers, spills, k.stack, k.threads, f"{k.shared / 1024:.1f}", k.blocks)
        table.add_row(k.name, k.arguments, *map(str, cells), style="red" if spills or not k.blocks else None)
    Console(width=120).print(table)
    if options.json:
        version = subprocess.run([options.nvcc, "--version"], capture_output=True, text=True, check=True).stdout
        facts = [{**asdict(k), "blocks_per_multiprocessor": k.blocks} for k in kernels]
        options.json.write_text(json.dumps({"nvcc": version.splitlines()[-1], "kernels": facts}, indent=1) + "\n")
    return int(any(k.spill_stores or k.spill_loads or not k.blocks for k in kernels))


if __name__ == "__main__":
    sys.exit(main())
