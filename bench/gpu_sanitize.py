"""Every kernel on small shapes with odd tails, for compute-sanitizer to watch:

    compute-sanitizer --tool memcheck python bench/gpu_sanitize.py

Inputs are made on the CPU and copied, so that nearly every kernel that runs is one of ours.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from galore_kernels import ops
from galore_kernels.ops import registry
from galore_kernels.ops.group import UpdateGroup
from galore_kernels.quantizers import BASIS_FORMATS, quantize_basis, quantize_weight

sys.path.append(str(Path(__file__).resolve().parents[1] / "python_tests"))

from update_cases import options, tensors, warm_state

#: Long and short dimension and rank.
SINGLE = [
    (1, 1, 1),  # the smallest
    (131, 67, 5),  # tails everywhere, no vectors
    (136, 264, 24),  # whole chunks, tails of tiles
    (40, 1100, 8),  # the short dimension is split
    (130, 70, 129),  # one column more than a tile of the basis
]
#: Of groups that take one pass where enough panels fill the device.
GROUPED = [(304, 200, 24), (256, 64, 128)]
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class Runner:
    """The backend under watch, and the device that it runs on."""

    def __init__(self, backend: str, device: torch.device) -> None:
        self.backend, self.device = backend, device
        self.options = replace(options(weight_decay=0.1), lr=torch.tensor(0.01, dtype=torch.float64).to(device))

    def normal(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Normal numbers on the device."""
        return torch.randn(shape).to(dtype).to(self.device)

    def state(self, shape: tuple[int, ...], *, eight_bit: bool) -> ops.AdamState:
        """A warm state on the device."""
        state = warm_state(shape, eight_bit=eight_bit)
        return replace(state, **{key: value.to(self.device) for key, value in tensors(state).items()})

    def codes(self, short: int, rank: int, basis_format: str) -> tuple[Tensor, Tensor]:
        """A quantized basis on the device."""
        codes, scale = quantize_basis(torch.randn(short, rank), basis_format)
        return codes.to(self.device), scale.to(self.device)

    def seeded(self, dtype: torch.dtype) -> ops.AdamOptions:
        """Stochastic rounding where it exists."""
        return replace(self.options, rounding_seed=7 if dtype == torch.bfloat16 else None)

    def one_matrix(self, long: int, short: int, rank: int, side: str, dtype: torch.dtype, *, eight_bit: bool) -> None:
        """galore_update and lowrank_update, and a gradient that is to be skipped."""
        shape = (long, short) if side == "right" else (short, long)
        param, grad, basis = (self.normal(size, dtype) for size in (shape, shape, (short, rank)))
        state = self.state((long, rank), eight_bit=eight_bit)
        where = {"side": side, "scale": 0.25, "backend": self.backend}
        ops.galore_update(param, grad, basis, state, self.seeded(dtype), **where)  # type: ignore[arg-type]
        mixed = self.normal((long, rank), torch.float32)
        ops.lowrank_update(param, mixed, basis, state, self.options, **where)  # type: ignore[arg-type]
        bad = torch.full(shape, torch.nan, dtype=dtype).to(self.device)
        ops.galore_update(param, bad, basis, state, self.options, **where)  # type: ignore[arg-type]

    def quantized_matrix(self, long: int, short: int, rank: int, side: str, basis_format: str) -> None:
        """galore_update with a quantized basis."""
        shape = (long, short) if side == "right" else (short, long)
        param, grad = self.normal(shape, torch.bfloat16), self.normal(shape, torch.bfloat16)
        codes, scale = self.codes(short, rank, basis_format)
        state = self.state((long, rank), eight_bit=True)
        where = {"side": side, "scale": 0.25, "basis_scale": scale, "backend": self.backend}
        ops.galore_update(param, grad, codes, state, self.options, **where)  # type: ignore[arg-type]

    def int8_matrix(self, long: int, short: int, rank: int, side: str, basis_format: str | None) -> None:
        """galore_update of an int8 weight."""
        shape = (long, short) if side == "right" else (short, long)
        codes, weight_scale = (x.to(self.device) for x in quantize_weight(torch.randn(shape)))
        if basis_format is None:
            basis, basis_scale = self.normal((short, rank), torch.bfloat16), None
        else:
            basis, basis_scale = self.codes(short, rank, basis_format)
        ops.galore_update(
            codes,
            self.normal(shape, torch.bfloat16),
            basis,
            self.state((long, rank), eight_bit=True),
            self.seeded(torch.bfloat16),
            side=side,
            scale=0.25,
            basis_scale=basis_scale,
            weight_scale=weight_scale,
            backend=self.backend,
        )

    def apollo_matrix(self, long: int, short: int, rank: int, side: str, dtype: torch.dtype) -> None:
        """apollo_update with a drawn basis and a stored one, and a gradient that is to be skipped; random_basis."""
        shape = (long, short) if side == "right" else (short, long)
        param, grad, stored = (self.normal(size, dtype) for size in (shape, shape, (short, rank)))
        state, norm = self.state((long, rank), eight_bit=True), torch.ones(()).to(self.device)
        drawn, bad = ops.RandomBasis(rank, 7), torch.full(shape, torch.nan, dtype=dtype).to(self.device)
        for g, basis, scaling in ((grad, drawn, "channel"), (grad, stored, "tensor"), (bad, drawn, "tensor")):
            apollo = ops.ApolloOptions(scaling=scaling)
            o = self.seeded(dtype)
            ops.apollo_update(param, g, basis, state, norm, o, apollo, side=side, backend=self.backend)
        codes, weight_scale = (x.to(self.device) for x in quantize_weight(torch.randn(shape)))
        o, apollo = self.seeded(torch.bfloat16), ops.ApolloOptions()
        where = {"side": side, "weight_scale": weight_scale, "backend": self.backend}
        ops.apollo_update(codes, grad, drawn, state, norm, o, apollo, **where)  # type: ignore[arg-type]
        ops.random_basis(short, drawn, device=self.device, backend=self.backend)

    def rotated(self, long: int, rank: int, new_rank: int, *, eight_bit: bool) -> None:
        """rotate_moments."""
        state, rotation = self.state((long, rank), eight_bit=eight_bit), self.normal((rank, new_rank), torch.float32)
        ops.rotate_moments(state, rotation, beta1=0.9, beta2=0.999, backend=self.backend)

    def group(
        self, long: int, short: int, rank: int, side: str, dtype: torch.dtype, count: int, basis_format: str | None
    ) -> None:
        """A grouped update."""
        make = registry.select("galore_update", self.backend, self.device).group
        if make is None:
            return
        shape = (long, short) if side == "right" else (short, long)
        if basis_format is None:
            bases, scales = tuple(self.normal((short, rank), dtype) for _ in range(count)), ()
        else:
            bases, scales = zip(*(self.codes(short, rank, basis_format) for _ in range(count)), strict=True)
        group = UpdateGroup(
            "galore_update",
            tuple(self.normal(shape, dtype) for _ in range(count)),
            tuple(self.state((long, rank), eight_bit=True) for _ in range(count)),
            bases,
            side,
            0.25,
            basis_scales=scales,
        )
        make(group)([self.normal(shape, dtype) for _ in range(count)], self.options)

    def full_rank(self, elements: int, dtype: torch.dtype, *, eight_bit: bool) -> None:
        """adam8bit_update and the 8-bit format."""
        param, grad = self.normal((elements,), dtype), self.normal((elements,), dtype)
        state = self.state((elements,), eight_bit=eight_bit)
        ops.adam8bit_update(param, grad, state, self.seeded(dtype), backend=self.backend)
        for signed, x in ((True, grad), (False, self.normal((elements,), dtype).abs())):
            codes, absmax = ops.quantize_blockwise(x, signed, backend=self.backend)
            ops.dequantize_blockwise(codes, absmax, signed, backend=self.backend)


def _waits(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def run(runner: Runner) -> Iterator[str]:
    """Everything, one case at a time; yields what it has done."""
    for (long, short, rank), side, dtype in itertools.product(SINGLE, ("right", "left"), DTYPES):
        eight_bit = (long + rank) % 2 == 0 or dtype == torch.bfloat16
        runner.one_matrix(long, short, rank, side, dtype, eight_bit=eight_bit)
        yield f"galore_update, lowrank_update {long} x {short} r={rank} {side} {dtype}"
    for (long, short, rank), side, basis_format in itertools.product(SINGLE, ("right", "left"), BASIS_FORMATS):
        runner.quantized_matrix(long, short, rank, side, basis_format)
        yield f"galore_update {long} x {short} r={rank} {side} {basis_format} basis"
    for (long, short, rank), side, basis in itertools.product(SINGLE, ("right", "left"), (None, *BASIS_FORMATS)):
        runner.int8_matrix(long, short, rank, side, basis)
        yield f"galore_update {long} x {short} r={rank} {side} {basis or torch.bfloat16} basis, int8 weight"
    for (long, short, rank), side, dtype in itertools.product(SINGLE, ("right", "left"), DTYPES):
        runner.apollo_matrix(long, short, rank, side, dtype)
        yield f"apollo_update {long} x {short} r={rank} {side} {dtype}"
    for (long, short, rank), eight_bit in itertools.product(SINGLE, (True, False)):
        runner.rotated(long, rank, short, eight_bit=eight_bit)
        yield f"rotate_moments {long} x {rank} to r={short}"
    # As many as fill an H200's 132 multiprocessors at two blocks each; 3 for the emulation.
    many = 60 if runner.device.type == "cuda" else 3
    bases = [*itertools.product(DTYPES[:2], [None]), *itertools.product(DTYPES[:1], BASIS_FORMATS)]
    for (long, short, rank), side, (dtype, basis_format) in itertools.product(GROUPED, ("right", "left"), bases):
        for count in (2, many):
            runner.group(long, short, rank, side, dtype, count, basis_format)
            yield f"group of {count}, {long} x {short} r={rank} {side} {basis_format or dtype} basis"
    for elements, dtype, eight_bit in itertools.product((1, 255, 257, 20_001), DTYPES, (True, False)):
        runner.full_rank(elements, dtype, eight_bit=eight_bit)
        yield f"adam8bit_update, quantize, dequantize {elements} {dtype}"


def main() -> int:
    """Runs it; the last line says that nothing was left out."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--backend", default="cuda")
    parser.add_argument("--device", default="cuda")
    arguments = parser.parse_args()
    runner = Runner(arguments.backend, torch.device(arguments.device))
    count = 0
    for done in run(runner):
        _waits(runner.device)
        print(done, flush=True)
        count += 1
    print(f"all {count} cases done", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
