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

from galore_kernels.backends.batch import CONTROL_WORDS, Batch
from galore_kernels.backends.triton import configuration
from galore_kernels.backends.triton.stages import TritonStages
from galore_kernels.ops import AdamOptions, AdamState
from galore_kernels.ops.apollo_update import SCALINGS, ApolloOptions
from galore_kernels.ops.random_basis import MAGNITUDES, RandomBasis

#: Shared memory that one program may take, in bytes (CUDA C++ Programming Guide, technical specifications).
SHARED_MEMORY_LIMITS = {"sm_80": 163 * 1024, "sm_89": 99 * 1024, "sm_90": 227 * 1024}

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_CODES = (torch.int8, torch.uint8)
_NAMES = dict(zip((*_DTYPES, *_CODES), ("fp32", "bf16", "fp16", "int8", "int4"), strict=True))
_CPU = torch.device("cpu")


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


@dataclass(frozen=True)
class Case:
    """One call of a stage."""

    stage: str
    batch: Batch
    scaling: str | None = None  # APOLLO's, of stages that are its own or do more for it

    @property
    def name(self) -> str:
        """The stage and what sets this call apart."""
        batch = self.batch
        dtypes = "/".join(_NAMES[d] for d in (batch.weight_dtype, batch.grad_dtype, batch.basis_dtype))
        marks = [f"r{batch.rank} {batch.side}"] if batch.rank else []
        marks += ["drawn"] if batch.magnitudes is not None else []
        marks += [self.scaling] if self.scaling else []
        marks += [mark for mark in ("eight_bit", "stochastic") if getattr(batch, mark)]
        marks += [] if batch.aligned else ["unaligned"]
        return " ".join([self.stage, dtypes, *marks])


def _batch(
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype],
    rank: int = 0,
    side: str = "right",
    *,
    eight_bit: bool = True,
    stochastic: bool = False,
    aligned: bool = True,
    drawn: bool = False,
) -> Batch:
    extent = 4096 if aligned else 4095
    shape = (extent, extent) if rank else (extent * extent, 1)
    weight, grad, basis = dtypes
    return Batch(
        addresses=((16,) * 10,),
        gradients=(16,),
        table=None,
        shape=shape,
        rank=rank,
        side=side,
        moments=extent * (rank or extent),
        weight_dtype=weight,
        grad_dtype=grad,
        basis_dtype=basis,
        magnitudes=torch.empty(MAGNITUDES, dtype=torch.bfloat16) if drawn else None,
        eight_bit=eight_bit,
        stochastic=stochastic,
        fixed_aligned=aligned,
        aligned=aligned,
        device=_CPU,
    )


def _product_cases(architecture: str, stage: str, quick: bool) -> Iterator[Case]:
    fp32, bf16, fp16 = _DTYPES
    mixed = (bf16, bf16, fp32) if stage == "project" else (bf16, bf16, bf16)
    for bits, dtypes in ((16, (bf16, bf16, bf16)), (32, (fp32, fp32, fp32))):
        limits = configuration.limits(architecture, stage, bits)
        for rank in limits[-1:] if quick else limits:
            for side in ("right", "left"):
                yield Case(stage, _batch(dtypes, rank, side))
    if quick:
        yield Case(stage, _batch((bf16, bf16, bf16), 127, aligned=False, stochastic=stage == "back_project_update"))
        return
    for side in ("right", "left"):
        yield Case(stage, _batch(mixed, 128, side, stochastic=stage == "back_project_update"))
        yield Case(stage, _batch((fp16, fp16, fp16), 128, side))
        for dtypes in ((bf16, bf16, bf16), (fp32, fp32, fp32)):
            yield Case(stage, _batch(dtypes, 127, side, aligned=False))
    if stage == "back_project_update":
        yield Case(stage, _batch((fp32, bf16, bf16), 128))  # a master weight
        for basis in (bf16, fp32):
            yield Case(stage, _batch((bf16, bf16, basis), 128, stochastic=True))
            yield Case(stage, _batch((bf16, bf16, basis), 127, stochastic=True, aligned=False))


def _quantized_cases(architecture: str, stage: str, quick: bool) -> Iterator[Case]:
    """Products with the codes of a basis, which stand beside operands of either size."""
    fp32, bf16, _ = _DTYPES
    for codes in _CODES:
        for bits, dtype in ((16, bf16), (32, fp32)):
            limits = [r for r in configuration.limits(architecture, stage, bits) if codes == torch.int8 or r > 16]
            for side in ("right", "left"):
                for rank in limits[-1:] if quick else limits:  # at 16 rows of packed codes are not aligned
                    yield Case(stage, _batch((dtype, dtype, codes), rank, side))
                if not quick:
                    yield Case(stage, _batch((dtype, dtype, codes), 127, side, aligned=False))
        if stage == "back_project_update" and not quick:
            yield Case(stage, _batch((bf16, bf16, codes), 128, stochastic=True))
            yield Case(stage, _batch((bf16, bf16, codes), 127, stochastic=True, aligned=False))


def _int8_weight_cases(architecture: str, quick: bool) -> Iterator[Case]:
    """Back-projections into int8 weights, whose gradients play no part in them."""
    fp32, bf16, fp16 = _DTYPES

    def case(basis: torch.dtype, rank: int, side: str = "right", *, aligned: bool = True) -> Case:
        return Case(
            "back_project_update", _batch((torch.int8, bf16, basis), rank, side, stochastic=True, aligned=aligned)
        )

    for bits, bases in ((16, (bf16, *_CODES)), (32, (fp32,))):
        limits = configuration.limits(architecture, "back_project_update_int8", bits)
        for basis in bases:
            for rank in limits[-1:] if quick else limits:
                for side in ("right",) if quick else ("right", "left"):
                    if basis != torch.uint8 or rank > 16:
                        yield case(basis, rank, side)
            if not quick or basis == bf16:
                yield case(basis, 127, aligned=False)
    if not quick:
        yield case(fp16, 128)


def _apollo_cases(architecture: str, quick: bool) -> Iterator[Case]:
    """APOLLO's: projections with sums of squares, bases drawn or stored, and the stages after Adam's."""
    fp32, bf16, fp16 = _DTYPES
    int8_weight = (torch.int8, bf16, bf16)
    for bits, dtype in ((16, bf16), (32, fp32)):
        limits = configuration.limits(architecture, "project", bits)
        for rank in limits[-1:] if quick else limits:
            for side in ("left",) if quick else ("right", "left"):
                yield Case("project", _batch((dtype, dtype, bf16), rank, side, drawn=True), "channel")
                if not quick:
                    yield Case("project", _batch((dtype, dtype, dtype), rank, side), "channel")
    yield Case("random_basis", _batch((bf16, bf16, bf16), 128, drawn=True))
    yield Case("gradient_factors", _batch((bf16, bf16, bf16), 128, drawn=True), "channel")
    yield Case("gradient_factors", _batch((bf16, bf16, bf16), 1, drawn=True), "tensor")
    yield Case("scaled_gradient_update", _batch((bf16, bf16, bf16), 128, "left", stochastic=True))
    yield Case("scaled_gradient_update", _batch(int8_weight, 128, stochastic=True, aligned=False))
    if quick:
        return
    for side in ("right", "left"):
        for dtype in _DTYPES:
            yield Case("project", _batch((dtype, dtype, bf16), 127, side, drawn=True), "channel")
            yield Case("project", _batch((dtype, dtype, bf16), 127, side, aligned=False, drawn=True), "channel")
            for aligned in (True, False):
                yield Case("scaled_gradient_update", _batch((dtype, dtype, bf16), 128, side, aligned=aligned))
        yield Case("scaled_gradient_update", _batch(int8_weight, 128, side, stochastic=True))
        yield Case("scaled_gradient_update", _batch((fp32, bf16, bf16), 128, side))  # a master weight


def cases(architecture: str, *, quick: bool = False) -> Iterator[Case]:
    """The calls whose kernels are compiled: every tile of the table, or the largest of each stage and dtype."""
    fp32, bf16, fp16 = _DTYPES
    for stage in ("project", "back_project_update"):
        yield from _product_cases(architecture, stage, quick)
        yield from _quantized_cases(architecture, stage, quick)
    yield from _int8_weight_cases(architecture, quick)
    yield from _apollo_cases(architecture, quick)
    for stage in ("prepare", "scale_and_check", "lowrank_adam", "quantize_blockwise", "dequantize_blockwise"):
        yield Case(stage, _batch((bf16, bf16, bf16), 128))
    yield Case("lowrank_adam", _batch((bf16, bf16, torch.int8), 128))
    yield Case("adam_update", _batch((bf16, bf16, fp32), stochastic=True))
    for eight_bit in (True, False):
        for rank in (128, 127):
            yield Case("rotate_moments", _batch((bf16, bf16, bf16), rank, eight_bit=eight_bit))
    if quick:
        return
    for aligned in (True, False):
        for eight_bit in (True, False):
            for basis in (fp32, torch.int8):
                yield Case("lowrank_adam", _batch((fp32, fp32, basis), 127, eight_bit=eight_bit, aligned=aligned))
            for dtype in (fp32, bf16, fp16):
                yield Case("adam_update", _batch((dtype, dtype, fp32), eight_bit=eight_bit, aligned=aligned))
        yield Case("quantize_blockwise", _batch((fp32, fp32, fp32), aligned=aligned))


def _call(case: Case) -> None:
    stages, batch = TritonStages(), case.batch
    control = torch.empty((1, CONTROL_WORDS), dtype=torch.int32)
    # Of the tensors that kernels get, dtypes count, and addresses as multiples of 16; these are allocated to 64.
    lowrank = torch.empty((1, batch.moments), dtype=torch.float32)
    direction = torch.empty((1, batch.moments), dtype=batch.factor_dtype)
    of_long = torch.empty((1, batch.long_short()[0]), dtype=torch.float32)
    if case.stage == "prepare":
        one = torch.ones(())
        options = AdamOptions(one, grad_scale=one.double(), found_inf=one)
        stages.prepare(batch, control, options, 0.25)
    elif case.stage == "project":
        squares = None if case.scaling is None else of_long
        for splits in (None, 4):
            partial, partial_squares = (
                None if splits is None or whole is None else torch.empty((splits, *whole.shape))
                for whole in (lowrank, squares)
            )
            stages.project(
                batch, control, lowrank, partial, final=True, squares=squares, partial_squares=partial_squares
            )
    elif case.stage == "scale_and_check":
        stages.scale_and_check(direction, control, lowrank)
    elif case.stage == "lowrank_adam":
        stages.lowrank_adam(batch, control, lowrank, direction)
    elif case.stage == "back_project_update":
        stages.back_project_update(batch, control, direction)
    elif case.stage == "gradient_factors":
        apollo = ApolloOptions(scaling=case.scaling or "")
        stages.gradient_factors(batch, control, lowrank, lowrank, of_long, of_long, of_long, apollo)
    elif case.stage == "scaled_gradient_update":
        stages.scaled_gradient_update(batch, control, of_long)
    elif case.stage == "random_basis" and batch.magnitudes is not None:
        stages.random_basis(direction.view(-1, batch.rank), RandomBasis(batch.rank, 1), batch.magnitudes)
    elif case.stage == "adam_update":
        stages.adam_update(batch, control)
    elif case.stage == "rotate_moments":
        source, target = (AdamState.zeros((64, batch.rank), eight_bit=batch.eight_bit) for _ in range(2))
        stages.rotate_moments(source, target, torch.empty((batch.rank, batch.rank)), 0.9, 0.999)
    elif case.stage == "quantize_blockwise":
        stages.quantize_blockwise(direction, signed=True)
    else:
        stages.dequantize_blockwise(direction.to(torch.uint8), lowrank, signed=False)


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
            _call(case)
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
