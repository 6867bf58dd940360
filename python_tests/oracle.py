"""Float64 NumPy (and Python integers) restatement of the mathematics, written from the papers; shares no code.

- GaLore: Zhao et al., arXiv 2403.03507, algorithm 2, in its orientation: P is (m, r), R = P.T G is (r, n).
- Adam: Kingma and Ba, arXiv 1412.6980, algorithm 1, with bias-corrected moments; decoupled decay: arXiv 1711.05101.
  galore_torch's two choices are kept: eps is added to the uncorrected sqrt(v), and the decay follows the update.
- APOLLO: Zhu et al., arXiv 2412.05270, section 4.1, with the norm-growth limiter of Fira, arXiv 2410.01623, equation 7.
- Adafactor: Shazeer and Stern, arXiv 1804.04235, algorithms 4 and 5, with sums where the library keeps means.
- 8-bit code: Dettmers et al., arXiv 2110.02861.
- Moments in another basis: Robert et al., "LDAdam", arXiv 2410.16103, section 3, for bias-corrected moments.
- Random bits: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011 (Philox4x32-10).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

BLOCK = 256


@dataclass(frozen=True)
class Adam:
    """One update's scalars; ``step`` is its number, from 1."""

    step: int
    lr: float
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    maximize: bool = False
    grad_scale: float = 1.0


def adam_moments(g: Array, m: Array, v: Array, a: Adam) -> tuple[Array, Array]:
    """The new first and second moment."""
    g = g / a.grad_scale * (-1.0 if a.maximize else 1.0)
    return a.beta1 * m + (1.0 - a.beta1) * g, a.beta2 * v + (1.0 - a.beta2) * g**2


def adam_direction(m: Array, v: Array, a: Adam) -> Array:
    """m_hat / (sqrt(v_hat) + eps_hat): eps_hat = eps / sqrt(1 - beta2^t) is eps at the uncorrected sqrt(v)."""
    m_hat = m / (1.0 - a.beta1**a.step)
    v_hat = v / (1.0 - a.beta2**a.step)
    denominator = np.sqrt(v_hat) + a.eps / np.sqrt(1.0 - a.beta2**a.step)
    return np.divide(m_hat, denominator, out=np.zeros_like(m_hat), where=denominator > 0)


def descend(w: Array, direction: Array, a: Adam) -> Array:
    """The update, then the decay of what it gave."""
    moved = w - a.lr * direction
    return moved - a.lr * a.weight_decay * moved


def adam(w: Array, g: Array, m: Array, v: Array, a: Adam) -> tuple[Array, Array, Array]:
    """One step at full rank: the new weight and moments."""
    m, v = adam_moments(g, m, v, a)
    return descend(w, adam_direction(m, v, a), a), m, v


def project(g: Array, basis: Array, long_basis: Array | None, side: str) -> Array:
    """The low-rank gradient as the library lays it out: (L, r), the transpose of the paper's on the left side."""
    if side == "left":
        paper = basis.T @ g  # (r, n)
        if long_basis is not None:
            paper = paper @ long_basis
        return paper.T
    paper = g @ basis  # the paper's right-hand projector Q
    return paper if long_basis is None else long_basis.T @ paper


def back_project(direction: Array, basis: Array, long_basis: Array | None, side: str) -> Array:
    """The (m, n) matrix that the low-rank ``direction`` stands for."""
    if side == "left":
        paper = direction.T
        if long_basis is not None:
            paper = paper @ long_basis.T
        return basis @ paper
    wide = direction if long_basis is None else long_basis @ direction
    return wide @ basis.T


@dataclass(frozen=True)
class Apollo:
    """APOLLO's options; ``limit`` 0 is none."""

    scale: float = 1.0
    per_tensor: bool = False
    scale_front: bool = False
    limit: float = 1.01


def long_norms(x: Array, per_tensor: bool) -> Array:
    """(L, 1) norms of the rows of x, or of all of it."""
    return np.sqrt((x**2).sum(axis=None if per_tensor else 1, keepdims=True))


def apollo(
    w: Array, g: Array, basis: Array, m: Array, v: Array, norm: float, a: Adam, o: Apollo, side: str
) -> tuple[Array, Array, Array, float]:
    """One step of APOLLO: the new weight and moments, and the norm that limits the next step's."""
    lowrank = project(g, basis, None, side) / a.grad_scale
    m, v = adam_moments(lowrank, m, v, replace(a, grad_scale=1.0))
    # The limiter sees the gradient before Adam's bias correction.
    correction = np.sqrt(1.0 - a.beta2**a.step) / (1.0 - a.beta1**a.step)
    uncorrected = adam_direction(m, v, a) / correction
    factors = long_norms(uncorrected, o.per_tensor) / (long_norms(lowrank, o.per_tensor) + 1e-8)
    oriented = (g if side == "right" else g.T) / a.grad_scale * (-1.0 if a.maximize else 1.0)
    scaled = factors * oriented * (np.sqrt(o.scale) if o.scale_front else 1.0)
    size = float(np.sqrt((scaled**2).sum()))
    if o.limit and norm > 1e-8:
        allowed = max(size / (norm + 1e-8), o.limit) / o.limit
        scaled, size = scaled / allowed, size / allowed
    scaled = scaled * correction * (1.0 if o.scale_front else np.sqrt(o.scale))
    return descend(w, scaled if side == "right" else scaled.T, a), m, v, size


@dataclass(frozen=True)
class Adafactor:
    """One update's scalars; ``step`` is its number, from 1, and ``lr`` None for the paper's relative step."""

    step: int
    lr: float | None = None
    eps1: float = 1e-30
    eps2: float = 1e-3
    clip: float = 1.0
    decay_rate: float = -0.8
    beta1: float | None = None
    weight_decay: float = 0.0
    scale_parameter: bool = True
    warmup_init: bool = False
    maximize: bool = False
    grad_scale: float = 1.0

    def beta2(self) -> float:
        """The second moment's decay (section 7.2)."""
        return float(1.0 - self.step**self.decay_rate)

    def alpha(self, w: Array) -> float:
        """The step size of a weight (section 8)."""
        first = 1e-6 * self.step if self.warmup_init else 1e-2
        rho = min(first, 1.0 / np.sqrt(self.step)) if self.lr is None else self.lr
        return float(rho * max(self.eps2, np.sqrt((w**2).mean())) if self.scale_parameter else rho)


@dataclass(frozen=True)
class AdafactorMoments:
    """The first moment, and the second as the library keeps it: whole, or its means over rows and columns.

    Of what there isn't, an empty array.
    """

    m: Array
    v: Array
    row: Array
    col: Array


def adafactor_second_moment(g: Array, s: AdafactorMoments, a: Adafactor) -> tuple[AdafactorMoments, Array]:
    """The new second moment (the first as it was), and the whole V that stands for it (algorithm 4, line 5)."""
    keep, squares = a.beta2(), (g / a.grad_scale) ** 2 + a.eps1
    if g.ndim < 2:
        v = keep * s.v + (1.0 - keep) * squares
        return replace(s, v=v), v
    rows, cols = g.shape[-2:]
    r = keep * cols * s.row[..., None] + (1.0 - keep) * squares.sum(axis=-1, keepdims=True)
    c = keep * rows * s.col[..., None, :] + (1.0 - keep) * squares.sum(axis=-2, keepdims=True)
    total = r.sum(axis=-2, keepdims=True)
    v = np.divide(r * c, total, out=np.zeros_like(g), where=total > 0)
    return replace(s, row=r[..., 0] / cols, col=c[..., 0, :] / rows), v


def adafactor_unclipped(g: Array, v: Array, a: Adafactor) -> Array:
    """U before its clipping."""
    g = g / a.grad_scale * (-1.0 if a.maximize else 1.0)
    return np.divide(g, np.sqrt(v), out=np.zeros_like(g), where=v > 0)


def adafactor_change(w: Array, u: Array, s: AdafactorMoments, a: Adafactor) -> tuple[Array, AdafactorMoments]:
    """What is subtracted of a weight (or projected back first), and the new first moment."""
    clipped = u / max(1.0, float(np.sqrt((u**2).mean())) / a.clip)
    change = a.alpha(w) * clipped
    if a.beta1 is None:
        return change, s
    m = a.beta1 * s.m + (1.0 - a.beta1) * change
    return m, replace(s, m=m)


def random_basis(rows: int, rank: int, seed: int, magnitudes: Array) -> Array:
    """Entries times sqrt(rank): sixteen random bits each, a row's first at the beginning of a block of eight."""
    padded = -(-rank // 8) * 8
    bits = random_bits16(seed, 0, rows * padded).reshape(rows, padded)[:, :rank].astype(np.int64)
    return np.where(bits >> 15, -1.0, 1.0) * magnitudes[(bits >> 4) & 0x7FF]


def basis_codes(codes: Array, rank: int) -> Array:
    """Whole numbers (S, r) of a quantized basis: int8, or uint8 with two to a byte, the low half first."""
    if codes.dtype == np.int8:
        return codes.astype(np.float64)
    halves = np.empty((codes.shape[0], 2 * codes.shape[1]))
    halves[:, 0::2], halves[:, 1::2] = codes % 16, codes // 16
    return np.where(halves >= 8, halves - 16, halves)[:, :rank]


def requantize_weight(weight: Array, scale: Array, bits16: Array) -> tuple[Array, Array]:
    """Codes and scales of an int8 weight (m, n) whose scales (m, groups) were ``scale``; ``bits16`` (m, n) round it."""
    codes, new = np.empty_like(weight), np.empty_like(scale)
    for group in range(scale.shape[1]):
        part = slice(group * BLOCK, (group + 1) * BLOCK)
        largest, old = np.abs(weight[:, part]).max(axis=1), scale[:, group]
        new[:, group] = np.where((64 * old <= largest) & (largest <= 127 * old), old, largest / 112)
        spread = new[:, group, None]
        x = np.divide(weight[:, part], spread, out=np.zeros_like(weight[:, part]), where=spread > 0)
        up = bits16[:, part] < np.rint((x - np.floor(x)) * 65536)
        codes[:, part] = np.clip(np.floor(x) + up, -127, 127)
    return codes, new


def turn(x: Array, matrix: Array, long_matrix: Array | None) -> Array:
    """x (L, r) with each row, and with ``long_matrix`` each column too, in the coordinates that the matrices give."""
    turned = np.einsum("li,ij->lj", x, matrix)
    return turned if long_matrix is None else np.einsum("ik,ij->kj", long_matrix, turned)


def rotate_moments(
    m: Array, v: Array, rotation: Array, long_rotation: Array | None, beta1: float, beta2: float, step: int
) -> tuple[Array, Array]:
    """The moments in another basis. The gradient's mean turns as a vector does. Its elements' variances turn as those
    of independent ones, with squared coefficients, and E g^2 = Var g + (E g)^2, all of bias-corrected estimates.
    """
    if step == 0:
        shape = turn(m, rotation, long_rotation).shape
        return np.zeros(shape), np.zeros(shape)
    correction1, correction2 = 1 - beta1**step, 1 - beta2**step
    mean, second = m / correction1, v / correction2
    new_mean = turn(mean, rotation, long_rotation)
    variance = turn(second - mean**2, rotation**2, None if long_rotation is None else long_rotation**2)
    return new_mean * correction1, np.abs(variance + new_mean**2) * correction2


def nearest_midpoint_codes(z: Array, values: Array) -> Array:
    """The code of each z: the interval between midpoints that holds it, and on a midpoint the even neighbour."""
    midpoints = (values[:-1] + values[1:]) * np.float32(0.5)
    assert midpoints.dtype == np.float32
    below = np.searchsorted(midpoints, z, side="left")
    up_to = np.searchsorted(midpoints, z, side="right")
    return np.where(below % 2 == 0, below, up_to)


def quantize(x: Array, values: Array, *, positive_stays_positive: bool = True) -> tuple[Array, Array]:
    """Codes and absmax of float32 ``x``. ``values`` is the 256-entry map; it is the signed one if it has negatives.

    ``positive_stays_positive=False`` is the rule of others: a small second moment may become zero.
    """
    signed = bool(values[0] < 0)
    zero = 127 if signed else 0
    flat = x.astype(np.float32).ravel()
    codes = np.full(flat.shape, zero, dtype=np.uint8)
    absmax = np.zeros(-(-flat.size // BLOCK), dtype=np.float32)
    for block in range(absmax.size):
        part = slice(block * BLOCK, min((block + 1) * BLOCK, flat.size))
        largest = np.abs(flat[part]).max()
        absmax[block] = largest
        if largest == 0:
            continue
        found = nearest_midpoint_codes(flat[part] / largest, values)
        if signed:
            found[(found == zero) & (flat[part] < 0)] = zero - 1
        elif positive_stays_positive:
            found[(found == zero) & (flat[part] > 0)] = 1
        codes[part] = found
    return codes.reshape(x.shape), absmax


def dequantize(codes: Array, absmax: Array, values: Array) -> Array:
    """Float64 values of codes: exact products of float32 numbers."""
    scale = np.repeat(absmax.astype(np.float64), BLOCK)[: codes.size]
    return (values.astype(np.float64)[codes.ravel()] * scale).reshape(codes.shape)


def dynamic_map(signed: bool) -> Array:
    """The map in float64: decade by decade the centres of equal cells of [0.1, 1], mirrored if signed, with 0 and 1."""
    magnitudes: list[float] = []
    for decade in range(7):
        cells = 2**decade if signed else 2 ** (decade + 1)
        width = 0.9 / cells
        magnitudes += [(0.1 + (cell + 0.5) * width) * 10.0 ** (decade - 6) for cell in range(cells)]
    negatives = [-x for x in magnitudes] if signed else []
    return np.array(sorted([*negatives, 0.0, *magnitudes, 1.0]))


def philox4x32(counter: tuple[int, ...], key: tuple[int, int]) -> tuple[int, ...]:
    """Philox4x32 with ten rounds, on Python integers."""
    low = 0xFFFFFFFF
    x0, x1, x2, x3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = 0xD2511F53 * x0, 0xCD9E8D57 * x2
        x0, x1, x2, x3 = (p1 >> 32) ^ x1 ^ k0, p1 & low, (p0 >> 32) ^ x3 ^ k1, p0 & low
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    return x0, x1, x2, x3


def random_bits16(seed: int, step: int, count: int) -> Array:
    """The 16 bits that each of the elements 0 .. count - 1 takes in update ``step``."""
    low = 0xFFFFFFFF
    bits: list[int] = []
    for block in range(-(-count // 8)):
        words = philox4x32((block & low, block >> 32, step & low, step >> 32), (seed & low, seed >> 32))
        for word in words:
            bits += [word & 0xFFFF, word >> 16]
    return np.array(bits[:count], dtype=np.uint32)


def stochastic_bfloat16_bits(x: Array, bits16: Array) -> Array:
    """The upper half of each float32 after adding 16 random bits to it: the bfloat16 it is rounded to, as uint16."""
    raw = x.astype(np.float32).ravel().view(np.uint32)
    return ((raw + bits16) >> np.uint32(16)).astype(np.uint16).reshape(x.shape)
