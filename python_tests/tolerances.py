"""Every tolerance of the operations' tests, each derived from the dtype. u is the unit roundoff of float32.

A tolerance that passes with the term under test deleted is not a test: these are rounding-error bounds, three to six
orders of magnitude below the terms (lr * direction, lr * weight_decay * w, eps against sqrt(v)) that the tests vary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import oracle
import torch
from numpy.typing import NDArray

Array = NDArray[Any]

#: Unit roundoff of float32: the relative error of one operation.
U32 = 2.0**-24

#: Bits of the significand after the leading one, and the exponent of the smallest normal number.
_FORMAT = {torch.float32: (23, -126), torch.bfloat16: (7, -126), torch.float16: (10, -14)}

#: sup |m| / sqrt(v) of exact Adam with the usual betas, by Cauchy and Schwarz on the two weighted sums:
#: (1 - beta1) / sqrt((1 - beta2) (1 - beta1^2 / beta2)) = 7.27.
LARGEST_DIRECTION = (1 - 0.9) / math.sqrt((1 - 0.999) * (1 - 0.9**2 / 0.999))

#: The 8-bit code's distortion of a direction in which both moments are stored away from zero: it can shrink v at most
#: by 0.534 (unsigned map, just below the midpoint of 7.75e-7 and 2.125e-6) and grow m at most by 1.71 (signed map,
#: just above the midpoint of 5.5e-7 and 3.25e-6). A positive v below the first code grows, which only shortens steps.
LARGEST_8BIT_DIRECTION = LARGEST_DIRECTION * 1.71 / math.sqrt(0.534)

#: Share of 8-bit codes that must be equal when two computations of one float32 number differ in their last bits. A
#: number's chance to fall on different sides of a rounding boundary is its error over the code's spacing, about 1e-5
#: where R was summed in another order: 0.1 % leaves room for small samples. Those that differ are neighbours.
EQUAL_CODES = 0.999

#: Share of int8 weights' codes that must be equal when two computations of one float32 weight differ in their last
#: bits. A code changes with a probability of the difference over the scale: about 1e-4 where the direction's rounding
#: to 16 bits went another way, 127 u where the scale is new, and 2^-16 where the weight did not move.
EQUAL_INT8_CODES = 0.998

#: Float32 parity with galore_torch over several steps: its operations in another order, at a rank whose sums have up
#: to 64 terms; about 100 u, relative to the largest weight.
GALORE_TORCH_PARITY = 1e-5

#: Significance of statistical tests. Seeds are fixed, so each test's outcome is too; this is the chance that a right
#: implementation would have failed when the seed was chosen.
SIGNIFICANCE = 1e-4


def ulp(x: Array, dtype: torch.dtype) -> Array:
    """Spacing of ``dtype``'s numbers at |x|, subnormals included."""
    fraction_bits, least_exponent = _FORMAT[dtype]
    exponent = np.frexp(np.abs(x))[1] - 1  # of the leading bit; -1 for 0, clamped below
    exponent = np.where(x == 0, least_exponent, np.maximum(exponent, least_exponent))
    return np.exp2(exponent.astype(np.float64) - fraction_bits)


def rounded(x: Array, dtype: torch.dtype) -> Array:
    """The numbers of ``dtype`` nearest to x."""
    return torch.from_numpy(x).to(dtype).double().numpy()


def rounding_of(x: Array, dtype: torch.dtype) -> Array:
    """Largest error of rounding x to ``dtype``, to nearest."""
    return ulp(x, dtype) / 2


def first_moment(largest_gradient: float, steps: int) -> float:
    """|m - exact|: m is a convex combination of gradients. A step rounds beta, the product and the sum, and the new
    gradient twice more where it is scaled: at most 5 u of the largest.
    """
    return 5 * steps * U32 * largest_gradient


def second_moment_relative(steps: int) -> float:
    """Relative error of v, a sum of positive terms: beta, product, sum, square, and the scaled gradient's two twice."""
    return 8 * steps * U32


def adam_weight(w: Array, lr: float, steps: int, dtype: torch.dtype) -> Array:
    """|w - exact| after full-rank steps from one state, apart from what the first step's rounding may have changed.

    Each step: the difference and the decay round w once each, and so does the constant of the decay: 3 u |w|. The
    direction, at most LARGEST_DIRECTION, carries the moments' errors (5 + 8 / 2 for each step so far) and five
    roundings of its own (sqrt, + eps, /, the step size, the product).
    """
    per_step = 3 * U32 * np.abs(w) + lr * LARGEST_DIRECTION * (9 * steps + 5) * U32
    return steps * (per_step + (rounding_of(w, dtype) if dtype != torch.float32 else 0.0))


@dataclass(frozen=True)
class GaloreStep:
    """One exact GaLore step from one state, and the bounds of a float32 computation's errors, to first order in u.

    A sum of n products, in any order, errs by at most n u times the sum of their magnitudes (Higham, Accuracy and
    Stability of Numerical Algorithms, section 3.1). Later stages add their roundings to what comes in.
    """

    m: Array
    v: Array
    weight: Array
    m_bound: Array
    v_bound: Array
    weight_bound: Array


def galore_step(
    w: Array,
    g: Array,
    basis: Array,
    long_basis: Array | None,
    m: Array,
    v: Array,
    a: oracle.Adam,
    *,
    side: str,
    scale: float,
    weight_dtype: torch.dtype,
    factor_dtype: torch.dtype,
    rounds_direction: bool,
    basis_scale: Array | None = None,
) -> GaloreStep:
    """The step in float64.

    ``rounds_direction``: to ``factor_dtype``, the basis' or for codes the weight's, if that has 16 bits.
    ``basis_scale``: of the columns of ``basis``, which is codes.
    """
    rounds = rounds_direction and factor_dtype != torch.float32
    unscale = 1 / a.grad_scale
    codes, scales = basis, np.ones(basis.shape[1]) if basis_scale is None else basis_scale
    basis = codes * scales
    lowrank = oracle.project(g, basis, long_basis, side) * unscale
    m, v = oracle.adam_moments(lowrank, m, v, replace(a, grad_scale=1.0))
    direction = oracle.adam_direction(m, v, a)
    long_magnitudes = None if long_basis is None else np.abs(long_basis)
    wide, wide_basis = direction * scales, long_basis
    if rounds:  # what is rounded is the factor beside the basis
        wide = wide if long_basis is None else long_basis @ wide
        # The unscaled direction m / (sqrt(v) + eps) is what an implementation rounds; the correction comes after.
        correction = (1 - a.beta1**a.step) / np.sqrt(1 - a.beta2**a.step)
        wide, wide_basis = rounded(wide * correction, factor_dtype) / correction, None
    change = oracle.back_project(wide, codes, wide_basis, side)
    weight = oracle.descend(w, scale * change, a)

    # The three are the gradient's scale twice and, of codes, the columns' scale.
    sums = (basis.shape[0] + (0 if long_basis is None else long_basis.shape[0]) + 3) * U32
    lowrank_bound = sums * oracle.project(np.abs(g), np.abs(basis), long_magnitudes, side) * unscale
    m_bound = (1 - a.beta1) * lowrank_bound + 5 * U32 * (np.abs(m) + np.abs(lowrank))
    square_bound = (2 * np.abs(lowrank) + lowrank_bound) * lowrank_bound
    v_bound = (1 - a.beta2) * square_bound + 8 * U32 * v
    m_share = np.divide(m_bound, np.abs(m), out=np.zeros_like(m), where=m != 0)
    v_share = np.divide(v_bound, v, out=np.zeros_like(v), where=v != 0)
    # Where R is about 0, its sign is noise and the direction may take either.
    wide_bound = np.abs(direction * scales) * np.minimum(m_share + v_share / 2 + 5 * U32, 2.0)
    if rounds:
        if long_magnitudes is not None:
            inner = (long_magnitudes.shape[1] + 1) * U32
            wide_bound = long_magnitudes @ (wide_bound + inner * np.abs(direction))
            long_magnitudes = None
        # Some errors carry the direction across a rounding boundary, one unit of its dtype further.
        wide_bound = wide_bound + ulp(wide, factor_dtype)
    sums = (basis.shape[1] + (0 if long_basis is None else long_basis.shape[1]) + 3) * U32
    change_bound = oracle.back_project(wide_bound + sums * np.abs(wide), np.abs(codes), long_magnitudes, side)
    weight_bound = a.lr * abs(scale) * change_bound + 3 * U32 * (np.abs(w) + np.abs(weight))
    if weight_dtype != torch.float32:
        weight_bound = weight_bound + rounding_of(weight, weight_dtype)
    return GaloreStep(m, v, weight, m_bound, v_bound, weight_bound)


@dataclass(frozen=True)
class ApolloStep(GaloreStep):
    """One exact APOLLO step, as ``GaloreStep``."""

    norm: float
    norm_bound: float


def apollo_step(
    w: Array,
    g: Array,
    basis: Array,
    m: Array,
    v: Array,
    norm: float,
    a: oracle.Adam,
    o: oracle.Apollo,
    *,
    side: str,
    weight_dtype: torch.dtype,
) -> ApolloStep:
    """The step in float64. Norms err by no more than the norms of their elements' errors."""
    weight, new_m, new_v, size = oracle.apollo(w, g, basis, m, v, norm, a, o, side)
    # Four: the gradient's scale, the random entries' 1 / sqrt(rank), and the rounding of both.
    sums = (basis.shape[0] + 4) * U32
    lowrank = oracle.project(g, basis, None, side) / a.grad_scale
    lowrank_bound = sums * oracle.project(np.abs(g), np.abs(basis), None, side) / a.grad_scale
    m_bound = (1 - a.beta1) * lowrank_bound + 5 * U32 * (np.abs(new_m) + np.abs(lowrank))
    v_bound = (1 - a.beta2) * (2 * np.abs(lowrank) + lowrank_bound) * lowrank_bound + 8 * U32 * new_v
    m_share = np.divide(m_bound, np.abs(new_m), out=np.zeros_like(new_m), where=new_m != 0)
    v_share = np.divide(v_bound, new_v, out=np.zeros_like(new_v), where=new_v != 0)
    direction = oracle.adam_direction(new_m, new_v, a)
    direction_bound = np.abs(direction) * np.minimum(m_share + v_share / 2 + 5 * U32, 2.0)

    def share(of: Array, bound: Array) -> Array:
        norms = oracle.long_norms(of, o.per_tensor)
        bounds = oracle.long_norms(bound, o.per_tensor)
        return np.divide(bounds, norms, out=np.ones_like(norms), where=norms > 0) + (basis.shape[1] + 4) * U32

    factor_share = share(direction, direction_bound) + share(lowrank, lowrank_bound)
    # The squared norm is a sum of positive terms, each off by twice its factor's share; a 16-bit sum has fp32 lanes.
    norm_share = float(factor_share.max(initial=0)) + (max(g.shape) + 4) * U32
    change_share = factor_share + norm_share + 8 * U32
    change = np.abs(w - weight / (1 - a.lr * a.weight_decay))
    weight_bound = change * (change_share if side == "right" else change_share.T)
    weight_bound = weight_bound + 4 * U32 * (np.abs(w) + np.abs(weight))
    if weight_dtype != torch.float32:
        weight_bound = weight_bound + rounding_of(weight, weight_dtype)
    # Squares below float32's range are 0.
    norm_bound = size * (norm_share + 4 * U32) + 1e-20
    return ApolloStep(new_m, new_v, weight, m_bound, v_bound, weight_bound, size, norm_bound)


@dataclass(frozen=True)
class AdafactorStep:
    """One exact step of Adafactor from one state, and the bounds of a float32 computation's errors."""

    weight: Array
    weight_bound: Array
    moments: oracle.AdafactorMoments
    moment_bounds: oracle.AdafactorMoments


def adafactor_step(
    w: Array,
    g: Array,
    s: oracle.AdafactorMoments,
    a: oracle.Adafactor,
    *,
    weight_dtype: torch.dtype,
    basis: Array | None = None,
    long_basis: Array | None = None,
    side: str = "right",
    scale: float = 1.0,
    factor_dtype: torch.dtype = torch.float32,
) -> AdafactorStep:
    """The step in float64, at full rank without ``basis``. Norms err by no more than the norms of elements' errors."""
    if basis is None:
        low, low_bound = g, 2 * U32 * np.abs(g)  # the gradient's scale twice
    else:
        long_magnitudes = None if long_basis is None else np.abs(long_basis)
        sums = (basis.shape[0] + (0 if long_basis is None else long_basis.shape[0]) + 3) * U32
        low = oracle.project(g, basis, long_basis, side)
        low_bound = sums * oracle.project(np.abs(g), np.abs(basis), long_magnitudes, side)
    low_bound = low_bound / a.grad_scale
    new, v = oracle.adafactor_second_moment(low, s, a)
    size = np.abs(low) / a.grad_scale
    rest = 1 - a.beta2()
    square_bound = rest * ((2 * size + low_bound) * low_bound + 3 * U32 * (size**2 + a.eps1))

    def share(bound: Array, of: Array) -> Array:
        return np.divide(bound, of, out=np.zeros_like(of), where=of > 0)

    # Six: the decay's rounding, two products, a sum, and the mean's quotient once more.
    if low.ndim < 2:
        bounds = replace(new, v=square_bound + 6 * U32 * new.v)
        v_share = share(bounds.v, new.v)
    else:
        rows, cols = low.shape[-2:]
        row_bound = square_bound.mean(axis=-1) + (cols + 6) * U32 * new.row
        col_bound = square_bound.mean(axis=-2) + (rows + 6) * U32 * new.col
        bounds = replace(new, row=row_bound, col=col_bound)
        means = share(row_bound.mean(axis=-1, keepdims=True), new.row.mean(axis=-1, keepdims=True)) + (rows + 2) * U32
        rows_share = share(row_bound, new.row) + means
        v_share = rows_share[..., None] + share(col_bound, new.col)[..., None, :]
    u = oracle.adafactor_unclipped(low, v, a)
    u_bound = share(low_bound, np.sqrt(v)) + np.abs(u) * (v_share / 2 + 8 * U32)
    change, new = oracle.adafactor_change(w, u, new, a)
    norm = float(np.sqrt((u**2).sum()))
    clipped = a.alpha(w) / max(1.0, norm / np.sqrt(max(1, u.size)) / a.clip)
    norm_share = float(np.sqrt((u_bound**2).sum())) / norm if norm else 0.0
    change_bound = clipped * (u_bound + (norm_share + 8 * U32) * np.abs(u))
    if a.beta1 is not None:
        change_bound = (1 - a.beta1) * change_bound + 8 * U32 * (np.abs(new.m) + np.abs(a.beta1 * s.m))
        bounds = replace(bounds, m=change_bound)
    if basis is not None:
        if factor_dtype != torch.float32:  # what is rounded has a root mean square of 1: none of it is subnormal
            change_bound = change_bound + 2.0 ** -(1 + _FORMAT[factor_dtype][0]) * np.abs(change)
        sums = (basis.shape[1] + (0 if long_basis is None else long_basis.shape[1]) + 4) * U32
        wide_bound = change_bound + sums * np.abs(change)
        change_bound = abs(scale) * oracle.back_project(wide_bound, np.abs(basis), long_magnitudes, side)
        change = scale * oracle.back_project(change, basis, long_basis, side)
    weight = w - a.alpha(w) * a.weight_decay * w - change
    weight_bound = change_bound + 4 * U32 * (np.abs(w) + np.abs(change))
    if weight_dtype != torch.float32:
        weight_bound = weight_bound + rounding_of(weight, weight_dtype)
    return AdafactorStep(weight, weight_bound, new, bounds)


@dataclass(frozen=True)
class TurnedMoments:
    """Exact moments in another basis, and the bounds of a float32 computation's errors, to first order in u."""

    m: Array
    v: Array
    m_bound: Array
    v_bound: Array


def rotate_moments(
    m: Array, v: Array, rotation: Array, long_rotation: Array | None, beta1: float, beta2: float, step: int
) -> TurnedMoments:
    """From moments that may be decoded, which rounds them once more. Sums err as in ``galore_step``."""
    exact_m, exact_v = oracle.rotate_moments(m, v, rotation, long_rotation, beta1, beta2, step)
    c = (1 - beta2**step) / (1 - beta1**step) ** 2 if step else 0.0
    magnitudes, long_magnitudes = np.abs(rotation), None if long_rotation is None else np.abs(long_rotation)
    squares, long_squares = rotation**2, None if long_rotation is None else long_rotation**2
    sums = (m.shape[1] + (0 if long_rotation is None else m.shape[0])) * U32
    m_bound = (sums + U32) * oracle.turn(np.abs(m), magnitudes, long_magnitudes)
    # v - c m*m: v once and m twice, c, the square, the product and the difference; each T*T once.
    variance_bound = (sums + 8 * U32) * oracle.turn(v + c * m**2, squares, long_squares)
    square_bound = c * ((2 * np.abs(exact_m) + m_bound) * m_bound + 4 * U32 * exact_m**2)
    return TurnedMoments(exact_m, exact_v, m_bound, variance_bound + square_bound + U32 * exact_v)


#: Share of a run's change of weights, in Frobenius norm, by which two float32 runs of equal mathematics may part when
#: both compute their own bases. A singular vector errs by about u sigma_1 / gap: 2e-6 at the smallest gap of the test's
#: gradients (sigma_i = 0.7^i, i < 7); the moments of small elements, whose directions depend on signs, multiply it.
EXACT_BASES = 2e-4


def int8_trajectory(moves: Array, scale: Array, new_scales: Array) -> Array:
    """Root of the variance that stochastic rounding adds to an int8 weight over its updates, at most.

    Rounding x = w / s has the variance f (1 - f) s^2, f being the fraction of x. Before a move d, x is a whole number
    as long as its scale is kept, so f or 1 - f is at most |d| / s: s |d| for each move. Under a new scale f is
    arbitrary: at most s^2 / 4. The roundings are independent, so that their variances add; decay only shrinks them.

    Args:
        moves: sum of |d| of the weights' updates. scale: the largest of its scales. new_scales: how often it was new.
    """
    return np.sqrt(scale * moves + new_scales * scale**2 / 4)
