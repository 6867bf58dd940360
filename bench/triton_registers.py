"""Registers, spills and shared memory of every Triton kernel as it is shipped, without a GPU.

    python bench/triton_registers.py                            # the whole table: minutes
    python bench/triton_registers.py --quick --arch sm_90       # what the tests look at, of one architecture
    python bench/triton_registers.py --out bench/results/triton_registers.json

The backend's own stages are called on made-up batches. Where they launch a kernel, Triton compiles it for the
architecture asked for, as it would on such a device, and nothing runs; its assembler (ptxas -v) says what the kernel
takes. Importing this needs no Triton, ``report`` does, and not in its interpreter.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from triton_cases import Case, call, cases

from galore_kernels.backends.triton import configuration

#: Shared memory that one program may take, in bytes (CUDA C++ Programming Guide, technical specifications).
SHARED_MEMORY_LIMITS = {"sm_80": 163 * 1024, "sm_89": 99 * 1024, "sm_90": 227 * 1024}


@dataclass(frozen=True)
class KernelResources:
    """What one compiled kernel takes.

    Attributes:
        registers: of a thread. spill_bytes: of a thread, stores and loads together. stack_bytes: of a thread.
        shared_bytes: of a program. ptx: its virtual assembly, if asked for.
    """

    architecture: str
    case: str
    kernel: str
    warps: int
    registers: int
    spill_bytes: int
    stack_bytes: int
    shared_bytes: int
    ptx: str | None = None

    def faults(self) -> list[str]:
        """Why this may not be shipped."""
        found = []
        if self.spill_bytes or self.stack_bytes:
            found.append(f"{self.spill_bytes} bytes spilled, {self.stack_bytes} bytes of stack")
        limit = SHARED_MEMORY_LIMITS[self.architecture]
        if self.shared_bytes > limit:
            found.append(f"{self.shared_bytes} bytes of shared memory, of {limit}")
        return [f"{self.architecture} {self.case} {self.kernel}: {fault}" for fault in found]


class _NoDevice:
    """Stands in for Triton's driver: says which architecture is compiled for, and launches nothing."""

    _devices = itertools.count()

    def __init__(self, architecture: str) -> None:
        from triton.backends.compiler import GPUTarget

        self._target = GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32)
        # Triton keeps what it compiled for each device: a new one finds nothing, and so gets a log.
        self._device = next(self._devices)

    def get_current_device(self) -> int:
        return self._device

    def get_current_stream(self, device: int) -> int:
        return device

    def get_current_target(self) -> Any:
        return self._target


@contextlib.contextmanager
def _compiling_only(architecture: str) -> Iterator[list[tuple[Any, str]]]:
    """Within the context launches compile for ``architecture`` instead. Yields the (kernel, ptxas' words) they append.

    The words are empty where a kernel had been compiled before.
    """
    import triton
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    launched: list[tuple[Any, str]] = []
    run, active, knobs = JITFunction.run, driver._active, triton.knobs

    def compile_only(self: Any, *args: Any, warmup: bool, **kwargs: Any) -> None:
        log = io.StringIO()
        with contextlib.redirect_stdout(log):
            kernel = run(self, *args, warmup=True, **kwargs)
        launched.append((kernel, log.getvalue()))

    with tempfile.TemporaryDirectory() as cache, contextlib.ExitStack() as changes:
        for group in (knobs.compilation, knobs.nvidia, knobs.cache):
            changes.enter_context(group.scope())
        knobs.compilation.always_compile = True  # a kernel from the cache has no log
        knobs.compilation.disable_line_info = True
        knobs.nvidia.dump_ptxas_log = True
        knobs.cache.dir = cache
        JITFunction.run = compile_only
        driver.set_active(_NoDevice(architecture))
        try:
            with configuration.override(architecture=architecture):
                yield launched
        finally:
            JITFunction.run, driver._active = run, active


def _resources(architecture: str, case: Case, kernel: Any, log: str) -> KernelResources:
    def number(pattern: str) -> int:
        return sum(int(found) for found in re.findall(pattern, log))

    registers = number(r"Used (\d+) registers")
    if not registers:
        raise RuntimeError(f"ptxas said nothing of {kernel.name} ({case.name}): {log!r}")
    return KernelResources(
        architecture=architecture,
        case=case.name,
        kernel=kernel.name,
        warps=kernel.metadata.num_warps,
        registers=registers,
        spill_bytes=number(r"(\d+) bytes spill (?:stores|loads)"),
        stack_bytes=number(r"(\d+) bytes stack frame"),
        shared_bytes=kernel.metadata.shared,
        ptx=kernel.asm["ptx"],
    )


def report(architecture: str, *, quick: bool = False) -> Iterator[KernelResources]:
    """The resources of each different kernel that ``cases`` launch, as they are compiled."""
    with _compiling_only(architecture) as launched:
        for case in cases(architecture, quick=quick):
            call(case)
            yield from (_resources(architecture, case, kernel, log) for kernel, log in launched if log)
            launched.clear()


def main(arguments: list[str] | None = None) -> int:
    """The command line; the status is 1 if a kernel spills or takes too much shared memory."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--arch", action="append", choices=configuration.ARCHITECTURES, help="default: all of them")
    parser.add_argument("--quick", action="store_true", help="the largest tile of each stage and dtype")
    parser.add_argument("--ptx", action="store_true", help="add each kernel's PTX to the JSON")
    parser.add_argument("--out", type=Path, help="write JSON here instead of lines to the terminal")
    chosen = parser.parse_args(arguments)
    started, rows, faults = time.monotonic(), [], []
    for architecture in chosen.arch or configuration.ARCHITECTURES:
        for found in report(architecture, quick=chosen.quick):
            faults += found.faults()
            rows.append({k: v for k, v in asdict(found).items() if k != "ptx" or chosen.ptx})
            print(
                f"{found.architecture} {found.kernel:28} {found.case:52} {found.warps} warps {found.registers:3} regs "
                f"{found.spill_bytes:4} B spilled {found.shared_bytes:6} B shared",
                file=sys.stderr,
                flush=True,
            )
    facts = {
        "what": "ptxas -v of every Triton kernel as shipped, compiled ahead of time",
        "triton": metadata.version("triton"),
        "torch": torch.__version__,
        "seconds": round(time.monotonic() - started, 1),
        "shared_memory_limits": SHARED_MEMORY_LIMITS,
        "faults": faults,
        "kernels": rows,
    }
    text = json.dumps(facts, indent=1) + "\n"
    if chosen.out is None:
        print(text, end="")
    else:
        chosen.out.write_text(text)
    for fault in faults:
        print(fault, file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
