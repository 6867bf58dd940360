"""Every tolerance of the operations' tests, each derived from the dtype. u is the unit roundoff of float32.

A tolerance that passes with the term under test deleted is not a test: these are rounding-error bounds, three to six
orders of magnitude below the terms (lr * direction, lr * weight_decay * w, eps against sqrt(v)) that the tests vary.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
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


def rounding_of(x: Array, dtype: torch.dtype) -> Array:
    """Largest error of rounding x to ``dtype``, to nearest."""
    return ulp(x, dtype) / 2


def first_moment(largest_gradient: float, steps: int) -> float:
    """|m - exact|: m is a convex combination of gradients, and each step rounds three times: 3 u of the largest."""
    return 3 * steps * U32 * largest_gradient


def second_moment_relative(steps: int) -> float:
    """Relative error of v: a sum of positive terms; a step rounds the old term twice and the new one four times."""
    return 4 * steps * U32


def adam_weight(w: Array, lr: float, steps: int, dtype: torch.dtype) -> Array:
    """|w - exact| after full-rank steps from one state, apart from what the first step's rounding may have changed.

    Each step: the difference and the decay round w once each, and so do the constants of the decay: 3 u |w|. The
    direction, at most LARGEST_DIRECTION, carries the moments' errors (3 + 4 / 2 for each step so far) and five
    roundings of its own (sqrt, + eps, /, the step size, the product).
    """
    per_step = 3 * U32 * np.abs(w) + lr * LARGEST_DIRECTION * (5 * steps + 5) * U32
    return steps * (per_step + (rounding_of(w, dtype) if dtype != torch.float32 else 0.0))


class Galore:
    """Elementwise error bounds of one GaLore step from one state, propagated term by term (first order in u).

    Attributes:
        m, v, weight: bounds on the errors of the new float32 moments and the new weight.
    """

    def __init__(
        self,
        *,
        projected_magnitudes: Array,  # |G| @ |P|, oriented like R
        terms: int,  # length of the longest sum behind an element of R
        lowrank: Array,
        m: Array,
        v: Array,
        direction: Array,  # not bias-corrected: m / (sqrt(v) + eps)
        eps: float,
        back: Any,  # direction-shaped magnitudes -> their back-projection with |P|
        back_terms: int,
        coefficient: float,  # lr * scale * bias correction
        weight: Array,
        weight_dtype: torch.dtype,
        basis_dtype: torch.dtype,
    ) -> None:
        # A sum of n products in any order errs by at most n u times the sum of magnitudes (Higham, 3.1).
        r_error = (terms + 2) * U32 * projected_magnitudes
        self.m = 0.1 * r_error + 4 * U32 * (np.abs(m) + np.abs(lowrank))
        self.v = 0.001 * (2 * np.abs(lowrank) + r_error) * r_error + 5 * U32 * v
        denominator = np.sqrt(v) + eps
        direction_error = self.m / denominator + np.abs(direction) * (self.v / np.maximum(v, 1e-300) / 2 + 4 * U32)
        # A direction that changes its sign with R's error moves by no more than twice its largest value.
        direction_error = np.minimum(direction_error, 2 * LARGEST_DIRECTION)
        if basis_dtype != torch.float32:
            # The direction is rounded to the basis' dtype: an error may move it across a boundary, one ulp further.
            direction_error = direction_error + ulp(direction, basis_dtype)
        change_error = back(direction_error) + (back_terms + 2) * U32 * back(np.abs(direction))
        self.weight = coefficient * change_error + 3 * U32 * np.abs(weight)
        if weight_dtype != torch.float32:
            self.weight = self.weight + rounding_of(weight, weight_dtype)
