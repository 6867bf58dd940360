"""``gradient_factors``: what the gradient's long indices are multiplied by, as csrc/core/apollo.h has it.

Two launches: one takes the norms of the long indices, of Adam's direction and of R; the other, one program for each
tensor, the norm of the scaled gradient, limits its growth and finishes the factors. All sums are in double and always
in the same order.
"""

from __future__ import annotations

import math

import triton
from torch import Tensor
from triton import language as tl

from galore_kernels.backends.batch import Batch
from galore_kernels.backends.triton import configuration
from galore_kernels.backends.triton.elements import (
    GRADIENT_SCALE,
    SCALED_NORM,
    coefficients,
    exact_step_size,
    multiple,
    row_pointer,
    skip_flag,
)
from galore_kernels.backends.triton.launch import launch
from galore_kernels.backends.triton.prepare import as_double
from galore_kernels.ops.apollo_update import NORM_EPS as _NORM_EPS
from galore_kernels.ops.apollo_update import ApolloOptions

NORM_EPS = tl.constexpr(_NORM_EPS)


@triton.jit
def _gradient_factor(direction_norm: tl.tensor, lowrank_norm: tl.tensor) -> tl.tensor:
    """s, of the norms of Adam's direction and of the low-rank gradient."""
    return tl.div_rn(direction_norm, lowrank_norm + NORM_EPS)


@triton.jit
def _growth_limiter(norm: tl.tensor, previous: tl.tensor, limit: tl.tensor) -> tl.tensor:
    """l, which the scaled gradient of this norm is divided by. limit: 0 for none. previous: 1e-8 tells nothing."""
    growth = norm / (previous + as_double(NORM_EPS))
    limited = (limit != 0.0) & (previous > as_double(NORM_EPS))
    return tl.where(limited, tl.maximum(growth, limit) / tl.where(limited, limit, 1.0), 1.0)


@triton.jit(do_not_specialize=["long", "rank", "programs_each"])
def long_norms_kernel(
    control: tl.tensor,
    lowrank: tl.tensor,
    direction: tl.tensor,
    norms: tl.tensor,
    factors: tl.tensor,
    long: tl.int64,
    rank: tl.int64,
    programs_each: tl.int32,
    CHANNEL: tl.constexpr,
    MULTIPLE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    tensor, part = (tl.program_id(0) // programs_each).to(tl.int64), tl.program_id(0) % programs_each
    if skip_flag(control, tensor) != 0:
        return
    rank = multiple(rank, MULTIPLE)
    rows = part.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    first = tensor * (long * rank)
    direction_squares, lowrank_squares = tl.zeros((ROWS,), tl.float64), tl.zeros((ROWS,), tl.float64)
    for step in range(tl.cdiv(rank, COLUMNS)):
        columns = tl.full((), step, tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
        offsets, there = rows[:, None] * rank + columns[None, :], (rows < long)[:, None] & (columns < rank)[None, :]
        u = tl.load(direction + first + offsets, there, other=0.0).to(tl.float64)
        r = tl.load(lowrank + first + offsets, there, other=0.0).to(tl.float64)
        direction_squares += tl.sum(u * u, axis=1)
        lowrank_squares += tl.sum(r * r, axis=1)
    own, rows_there = tensor * long + rows, rows < long
    direction_norm, lowrank_norm = tl.sqrt(direction_squares).to(tl.float32), tl.sqrt(lowrank_squares).to(tl.float32)
    if CHANNEL:
        tl.store(factors + own, _gradient_factor(direction_norm, lowrank_norm), rows_there)
    else:
        tl.store(factors + own, direction_norm, rows_there)
        tl.store(norms + own, lowrank_norm, rows_there)


@triton.jit(do_not_specialize=["long"])
def gradient_factors_kernel(
    table: tl.tensor,
    control: tl.tensor,
    squares: tl.tensor,
    norms: tl.tensor,
    factors: tl.tensor,
    norm_scale: tl.float64,
    limit: tl.float64,
    long: tl.int64,
    CHANNEL: tl.constexpr,
    ELEMENTS: tl.constexpr,
) -> None:
    tensor = tl.program_id(0).to(tl.int64)
    if skip_flag(control, tensor) != 0:
        return
    factors += tensor * long
    squares += tensor * long
    norms += tensor * long
    scaled, whole = tl.zeros((ELEMENTS,), tl.float64), tl.zeros((ELEMENTS,), tl.float64)
    lowrank_squares = tl.zeros((ELEMENTS,), tl.float64)
    steps = tl.cdiv(long, ELEMENTS)
    for step in range(steps):
        own = tl.full((), step, tl.int64) * ELEMENTS + tl.arange(0, ELEMENTS)
        # |u_j| and |R_j|, or s_j.
        factor = tl.load(factors + own, own < long, other=0.0).to(tl.float64)
        gradient_squares = tl.load(squares + own, own < long, other=0.0).to(tl.float64)
        if CHANNEL:
            scaled += factor * factor * gradient_squares
        else:
            scaled += factor * factor
            lowrank_norm = tl.load(norms + own, own < long, other=0.0).to(tl.float64)
            lowrank_squares += lowrank_norm * lowrank_norm
            whole += gradient_squares
    total = tl.sum(scaled, axis=0)
    if not CHANNEL:
        factor = _gradient_factor(
            tl.sqrt(total).to(tl.float32), tl.sqrt(tl.sum(lowrank_squares, axis=0)).to(tl.float32)
        )
        total = factor.to(tl.float64) * factor.to(tl.float64) * tl.sum(whole, axis=0)
    norm = tl.sqrt(total) * tl.abs(tl.load(coefficients(control, tensor) + GRADIENT_SCALE).to(tl.float64))
    norm = norm * as_double(norm_scale)
    last = row_pointer(table, tensor, SCALED_NORM, tl.float32, False)
    previous = tl.load(last).to(tl.float64)
    tl.debug_barrier()  # every thread has loaded it before one stores the next
    limiter = _growth_limiter(norm, previous, as_double(limit))
    tl.store(last, (norm / limiter).to(tl.float32))
    coefficient = (tl.load(exact_step_size(control, tensor)) / limiter).to(tl.float32)
    for step in range(steps):
        own = tl.full((), step, tl.int64) * ELEMENTS + tl.arange(0, ELEMENTS)
        if CHANNEL:
            factor = tl.load(factors + own, own < long, other=0.0)
        tl.store(factors + own, tl.zeros((ELEMENTS,), tl.float32) + factor * coefficient, own < long)


def gradient_factors(
    batch: Batch,
    table: Tensor,
    control: Tensor,
    lowrank: Tensor,
    direction: Tensor,
    squares: Tensor,
    norms: Tensor,
    factors: Tensor,
    apollo: ApolloOptions,
) -> None:
    """factors = s times step size times sqrt(scale) / l, and the new ``scaled_norm``."""
    long, _ = batch.long_short()
    channel = apollo.scaling == "channel"
    tile = configuration.panel_tile("long_norms", long, batch.rank)
    programs_each = -(-long // tile.rows)
    launch(
        long_norms_kernel,
        batch.count * programs_each,
        batch.device,
        control,
        lowrank,
        direction,
        norms,
        factors,
        long,
        batch.rank,
        programs_each,
        CHANNEL=channel,
        MULTIPLE=configuration.known_factor(batch.rank, True),
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        warps=tile.warps,
    )
    whole = configuration.element_tile("gradient_factors", long)
    launch(
        gradient_factors_kernel,
        batch.count,
        batch.device,
        table,
        control,
        squares,
        norms,
        factors,
        math.sqrt(apollo.scale) if apollo.scale_front else 1.0,
        float(apollo.norm_growth_limit or 0.0),
        long,
        CHANNEL=channel,
        ELEMENTS=whole.blocks * 256,
        warps=whole.warps,
    )
