"""``adam_update``: full-rank Adam from gradient to weight.

A first launch looks for gradients that have no second moment, since nothing of the tensor may change then; the
gradient of all but the largest tensors is still in the second-level cache when the second launch reads it again.
"""

from __future__ import annotations

import triton
from torch import Tensor
from triton import language as tl

from galore_kernels.backends.batch import Batch
from galore_kernels.backends.triton import configuration
from galore_kernels.backends.triton.adam import tile_offsets, update_moments, updated_weight
from galore_kernels.backends.triton.code_tables import code_tables
from galore_kernels.backends.triton.dtypes import triton_dtype
from galore_kernels.backends.triton.elements import (
    BLOCK,
    GRADIENT,
    GRADIENT_SCALE,
    PARAM,
    SEED,
    coefficients,
    count_step,
    flag_unless_representable,
    from_float,
    multiple,
    row_pointer,
    row_value,
    skip_flag,
    to_float,
)
from galore_kernels.backends.triton.launch import launch
from galore_kernels.backends.triton.random_bits import PER_BLOCK, random_of_groups, step_number, stochastic_bfloat16
from galore_kernels.quantizers import block_count


@triton.jit
def _load_gradient(
    table: tl.tensor,
    control: tl.tensor,
    tensor: tl.tensor,
    offsets: tl.tensor,
    there: tl.tensor,
    GRAD_DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
) -> tl.tensor:
    gradient = tl.load(row_pointer(table, tensor, GRADIENT, GRAD_DTYPE, ALIGNED) + offsets, there, other=0.0)
    return to_float(gradient) * tl.load(coefficients(control, tensor) + GRADIENT_SCALE)


@triton.jit(do_not_specialize=["elements", "programs_each"])
def check_gradient_kernel(
    table: tl.tensor,
    control: tl.tensor,
    elements: tl.int64,
    programs_each: tl.int32,
    GRAD_DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    MULTIPLE: tl.constexpr,
    BLOCKS: tl.constexpr,
) -> None:
    tensor, part = tl.program_id(0) // programs_each, tl.program_id(0) % programs_each
    _, offsets = tile_offsets(part, BLOCKS)
    there = offsets < multiple(elements, MULTIPLE)
    g = _load_gradient(table, control, tensor, offsets, there, GRAD_DTYPE, ALIGNED)
    flag_unless_representable(g, there, control, tensor)


@triton.jit(do_not_specialize=["elements", "programs_each"])
def adam_update_kernel(
    table: tl.tensor,
    control: tl.tensor,
    maps: tl.tensor,
    first_codes: tl.tensor,
    elements: tl.int64,
    programs_each: tl.int32,
    WEIGHT_DTYPE: tl.constexpr,
    GRAD_DTYPE: tl.constexpr,
    EIGHT_BIT: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    ALIGNED: tl.constexpr,
    MULTIPLE: tl.constexpr,
    BLOCKS: tl.constexpr,
) -> None:
    tensor, part = tl.program_id(0) // programs_each, tl.program_id(0) % programs_each
    skip = skip_flag(control, tensor)
    if part == 0:
        count_step(table, tensor, skip)
    if skip != 0:
        return
    elements = multiple(elements, MULTIPLE)
    blocks, offsets = tile_offsets(part, BLOCKS)
    there = offsets < elements
    g = _load_gradient(table, control, tensor, offsets, there, GRAD_DTYPE, ALIGNED)
    u = update_moments(g, table, control, tensor, blocks, offsets, elements, maps, first_codes, EIGHT_BIT, ALIGNED)
    weights = row_pointer(table, tensor, PARAM, WEIGHT_DTYPE, ALIGNED) + offsets
    weight = updated_weight(to_float(tl.load(weights, there, other=0.0)), u, control, tensor)
    if STOCHASTIC:
        group = blocks[:, None] * (BLOCK // PER_BLOCK) + tl.arange(0, BLOCK // PER_BLOCK)[None, :]
        random = random_of_groups(row_value(table, tensor, SEED), step_number(control, tensor), group)
        tl.store(weights, stochastic_bfloat16(weight, random), there)
    else:
        tl.store(weights, from_float(weight, WEIGHT_DTYPE), there)


def adam_update(batch: Batch, table: Tensor, control: Tensor) -> None:
    """Checks the gradients, then updates weights, moments, ``step`` and ``skipped``."""
    elements = batch.moments
    check = configuration.element_tile("check_gradient", elements)
    programs_each = -(-block_count(elements) // check.blocks)
    launch(
        check_gradient_kernel,
        batch.count * programs_each,
        batch.device,
        table,
        control,
        elements,
        programs_each,
        GRAD_DTYPE=triton_dtype(batch.grad_dtype),
        ALIGNED=batch.aligned,
        MULTIPLE=configuration.known_factor(elements, batch.aligned),
        BLOCKS=check.blocks,
        warps=check.warps,
    )
    tile = configuration.element_tile("adam_update", elements)
    programs_each = max(1, -(-block_count(elements) // tile.blocks))  # a step counts without elements too
    launch(
        adam_update_kernel,
        batch.count * programs_each,
        batch.device,
        table,
        control,
        *code_tables(batch.device),
        elements,
        programs_each,
        WEIGHT_DTYPE=triton_dtype(batch.weight_dtype),
        GRAD_DTYPE=triton_dtype(batch.grad_dtype),
        EIGHT_BIT=batch.eight_bit,
        STOCHASTIC=batch.stochastic,
        ALIGNED=batch.aligned,
        MULTIPLE=configuration.known_factor(elements, batch.aligned),
        BLOCKS=tile.blocks,
        warps=tile.warps,
    )
