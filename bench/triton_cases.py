"""The calls of the Triton backend's stages whose kernels ``triton_registers.py`` compiles, on made-up batches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from galore_kernels.backends.batch import CONTROL_WORDS, Batch
from galore_kernels.backends.triton import configuration
from galore_kernels.backends.triton.stages import TritonStages
from galore_kernels.ops import AdamOptions, AdamState
from galore_kernels.ops.apollo_update import ApolloOptions
from galore_kernels.ops.random_basis import MAGNITUDES, RandomBasis

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_CODES = (torch.int8, torch.uint8)
_NAMES = dict(zip((*_DTYPES, *_CODES), ("fp32", "bf16", "fp16", "int8", "int4"), strict=True))
_CPU = torch.device("cpu")


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
    fp32, bf16, _ = _DTYPES
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


def call(case: Case) -> None:
    """Calls the stage."""
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
