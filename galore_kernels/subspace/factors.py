"""A gradient that is never formed: what the backward pass of a linear layer has of it, and what a search takes of that.

A linear layer's gradient is G = dY.T @ X. Every product with it is two thin ones, so that a search needs T (L + S)
numbers of T tokens instead of L S.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from galore_kernels.subspace.estimate import NormEstimate
from galore_kernels.subspace.exact import exact_right_vectors
from galore_kernels.subspace.precision import full_precision

# Rows of G that exist at a time where its norm is summed in panels.
PANEL_ROWS = 256


class AllReduce(Protocol):
    """Puts the sum of all processes' tensors, or the largest elements, in the place of each."""

    def __call__(self, tensor: Tensor, *, largest: bool = False) -> None:
        """In place."""


class Factors:
    """G = sum over k of left_k.T @ right_k, an (L, S) gradient.

    Args:
        pairs: of K micro-batches, (left (T_k, L), right (T_k, S)), on one device, of one dtype.
        all_reduce: given, G is the sum over processes, each of which has its own pairs, and what is computed of it is
            the same in all of them. They exchange the thin products; the norm is estimated (``NormEstimate``).
    """

    def __init__(self, pairs: Sequence[tuple[Tensor, Tensor]], all_reduce: AllReduce | None = None) -> None:
        self._pairs, self._all_reduce = list(pairs), all_reduce
        # Not functools.cached_property: before Python 3.12 all threads wait for one that computes.
        self._sizes: tuple[float, float] | None = None
        self._near_one: ThinProduct | None = None
        left, right = self._pairs[0]
        self.shape, self.dtype, self.device = torch.Size((left.shape[1], right.shape[1])), left.dtype, left.device

    @property
    def T(self) -> Factors:  # noqa: N802 - a tensor's is called so
        """The transposed gradient."""
        return Factors([(right, left) for left, right in self._pairs], self._all_reduce)

    @property
    def magnitude(self) -> float:
        """0 if the gradient is; NaN or infinite if a factor holds such a value; else a positive number.

        Of a sum over processes, positive as well where factors that aren't zero cancel.
        """
        left, right = self._largest()
        product = left * right
        known = self._all_reduce is None and 0.0 < product < math.inf
        return float(self.near_one.own_norm()) if known else product

    @property
    def near_one(self) -> ThinProduct:
        """The gradient in float32, each side multiplied by a power of two that brings its largest magnitude near 1."""
        if self._near_one is None:
            # A subnormal's 2^149 is itself out of float32's range.
            scales = [2.0 ** min(-math.frexp(largest)[1], 126) for largest in self._largest()]
            sides = zip(zip(*self._pairs, strict=True), scales, strict=True)
            left, right = (_scaled(side, scale) for side, scale in sides)
            self._near_one = ThinProduct(left, right, self._all_reduce)
        return self._near_one

    def _largest(self) -> tuple[float, float]:
        if self._sizes is not None:
            return self._sizes
        sides = zip(*self._pairs, strict=True)
        largest = torch.stack([torch.stack([_largest(x) for x in side]).amax() for side in sides]).float()
        if self._all_reduce is not None:
            largest.nan_to_num_(nan=math.inf, posinf=math.inf)  # a maximum may pass a NaN over
            self._all_reduce(largest, largest=True)
        left, right = largest.tolist()
        self._sizes = left, right
        return self._sizes


def _largest(x: Tensor) -> Tensor:
    return x.abs().amax() if x.numel() else x.new_zeros(())


def _scaled(side: Sequence[Tensor], scale: float) -> Tensor:
    return torch.cat([x.to(torch.float32) for x in side]).mul_(scale)


class ThinProduct:
    """G = left.T @ right, (L, S), of (T, L) and (T, S) in float32. What the search's ``Matrices`` call.

    ``all_reduce``: as of ``Factors``.
    """

    def __init__(self, left: Tensor, right: Tensor, all_reduce: AllReduce | None = None) -> None:
        self._left, self._right, self._all_reduce = left, right, all_reduce
        self._norm: Tensor | None = None
        self._estimate = NormEstimate()

    def _sum(self, product: Tensor) -> Tensor:
        if self._all_reduce is not None:
            self._all_reduce(product)
        return product

    def times(self, right: Tensor, out: Tensor) -> None:
        """``out`` (L, b) = G @ ``right`` (S, b)."""
        self._sum(torch.mm(self._left.T, self._right @ right, out=out))

    def multiplied_by(self, left: Tensor, out: Tensor) -> None:
        """``out`` (b, S) = ``left`` (b, L) @ G."""
        self._sum(torch.mm(left @ self._left.T, self._right, out=out))
        if self._all_reduce is not None:
            self._estimate.see_product(out)

    def norm(self, vectors: Tensor, sigma: Tensor) -> Tensor:
        """Its Frobenius norm, 0-d float32; of a sum over processes by ``vectors`` (S, r) and ``sigma`` (r,)."""
        if self._all_reduce is not None:
            return self._estimate.norm(vectors, sigma, self._left.shape[1])
        return self.own_norm()

    def own_norm(self) -> Tensor:
        """That of this process: from Gram matrices of the tokens, or row by row where that is less work."""
        if self._norm is not None:
            return self._norm
        tokens, (long, short) = len(self._left), (self._left.shape[1], self._right.shape[1])
        with full_precision(), torch.autocast(self._left.device.type, enabled=False):
            if tokens * (long + short) < long * short:
                panels = ((x @ self._left.T) * (y @ self._right.T) for x, y in self._panels(self._left, self._right))
            else:
                panels = ((x.T @ self._right).square() for x in self._left.split(PANEL_ROWS, dim=1))
            square = torch.stack([panel.sum(dtype=torch.float64) for panel in panels]).sum()
        self._norm = square.clamp_min(0.0).sqrt().float()
        return self._norm

    @staticmethod
    def _panels(left: Tensor, right: Tensor) -> zip[tuple[Tensor, Tensor]]:
        return zip(left.split(PANEL_ROWS), right.split(PANEL_ROWS), strict=True)

    def exact_right_vectors(self, rank: int) -> tuple[Tensor, Tensor]:
        """As the function of this name, from the smaller of G and of the triangular factors of both sides."""
        tokens, (long, short) = len(self._left), (self._left.shape[1], self._right.shape[1])
        if self._all_reduce is not None or tokens >= min(long, short):
            whole = self._sum(self._left.T @ self._right)
            self._estimate.see_whole(whole)
            return exact_right_vectors(whole, rank)
        left, (q, right) = torch.linalg.qr(self._left.T, mode="r").R, torch.linalg.qr(self._right.T)
        vectors, sigma = exact_right_vectors(left @ right.T, min(rank, tokens))
        missing = rank - len(sigma)
        return torch.nn.functional.pad(q @ vectors, (0, missing)), torch.nn.functional.pad(sigma, (0, missing))
