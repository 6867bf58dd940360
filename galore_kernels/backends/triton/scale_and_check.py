"""``scale_and_check``: projected gradients scaled, signed and looked at; also the sum of ``project``'s parts."""

from __future__ import annotations

import triton
from torch import Tensor
from triton import language as tl

from galore_kernels.backends.triton import configuration
from galore_kernels.backends.triton.adam import tile_offsets
from galore_kernels.backends.triton.elements import (
    GRADIENT_SCALE,
    coefficients,
    flag_unless_finite,
    flag_unless_representable,
    multiple,
    to_float,
)
from galore_kernels.backends.triton.launch import launch
from galore_kernels.quantizers import block_count


@triton.jit(do_not_specialize=["count", "elements", "splits", "programs_each"])
def scale_and_check_kernel(
    source: tl.tensor,
    control: tl.tensor,
    lowrank: tl.tensor,
    count: tl.int64,
    elements: tl.int64,
    splits: tl.int32,
    programs_each: tl.int32,
    SCALED: tl.constexpr,
    FINITE: tl.constexpr,
    MULTIPLE: tl.constexpr,
    BLOCKS: tl.constexpr,
) -> None:
    tensor, part = tl.program_id(0) // programs_each, tl.program_id(0) % programs_each
    elements = multiple(elements, MULTIPLE)
    _, offsets = tile_offsets(part, BLOCKS)
    there = offsets < elements
    offsets += tensor.to(tl.int64) * elements
    sums = to_float(tl.load(source + offsets, there, other=0.0))
    for split in range(1, splits):  # in order: the same bits from run to run
        sums += to_float(tl.load(source + split * (count * elements) + offsets, there, other=0.0))
    if SCALED:
        sums = sums * tl.load(coefficients(control, tensor) + GRADIENT_SCALE)
        flag_unless_representable(sums, there, control, tensor)
    if FINITE:
        flag_unless_finite(sums, there, control, tensor)
    tl.store(lowrank + offsets, sums, there)


def _launch(source: Tensor, splits: int, control: Tensor, lowrank: Tensor, scaled: bool, finite: bool = False) -> None:
    count, elements = lowrank.shape
    tile = configuration.element_tile("scale_and_check", elements)
    programs_each = -(-block_count(elements) // tile.blocks)
    aligned = source.data_ptr() % 16 == 0 and lowrank.data_ptr() % 16 == 0
    launch(
        scale_and_check_kernel,
        count * programs_each,
        lowrank.device,
        source,
        control,
        lowrank,
        count,
        elements,
        splits,
        programs_each,
        SCALED=scaled,
        FINITE=finite,
        MULTIPLE=configuration.known_factor(elements, aligned),
        BLOCKS=tile.blocks,
        warps=tile.warps,
    )


def scale_and_check(source: Tensor, control: Tensor, lowrank: Tensor) -> None:
    """lowrank = source (N, elements) of any dtype scaled and signed, and the skip flag."""
    _launch(source, 1, control, lowrank, scaled=True)


def sum_parts(parts: Tensor, control: Tensor, lowrank: Tensor, *, scaled: bool) -> None:
    """lowrank = the sum of parts (splits, N, elements), if ``scaled`` as ``scale_and_check`` leaves it."""
    _launch(parts, parts.shape[0], control, lowrank, scaled)


def sum_squares(parts: Tensor, control: Tensor, squares: Tensor) -> None:
    """squares = the sum of parts (splits, N, L), and the skip flag where one is not finite."""
    _launch(parts, parts.shape[0], control, squares, scaled=False, finite=True)
