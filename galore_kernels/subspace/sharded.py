"""Gradients that are sums over processes, and what a search takes of them: thin products, which are summed instead."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from galore_kernels.subspace.estimate import NormEstimate
from galore_kernels.subspace.exact import exact_right_vectors
from galore_kernels.subspace.factors import AllReduce


class ShardedGradient:
    """G, (L, S), divided among processes; what is computed of it is the same in all of them.

    They exchange ``exchanged``, and for its norm a number; only the exact decomposition exchanges G itself.

    Args:
        part: what this process has, (l, S) or (L, s), float32 or 16-bit.
        start: its first row's, or column's, place in G. size: of that dimension of G.
        dim: that is divided, 0 or 1.
        all_reduce: over the processes among which G is divided.
    """

    def __init__(self, part: Tensor, start: int, size: int, dim: int, all_reduce: AllReduce) -> None:
        self._part, self._start, self._size, self._dim, self._all_reduce = part, start, size, dim, all_reduce
        self._largest: float | None = None
        other = part.shape[1 - dim]
        self.shape = torch.Size((size, other) if dim == 0 else (other, size))
        self.dtype, self.device = part.dtype, part.device

    @property
    def T(self) -> ShardedGradient:  # noqa: N802 - a tensor's is called so
        """The transposed gradient."""
        return ShardedGradient(self._part.T, self._start, self._size, 1 - self._dim, self._all_reduce)

    @property
    def magnitude(self) -> float:
        """The largest magnitude; infinite if there is a NaN."""
        if self._largest is None:
            ends = self._part.aminmax() if self._part.numel() else (self._part.new_zeros(()),) * 2
            largest = torch.maximum(-ends[0], ends[1]).float().nan_to_num_(nan=math.inf, posinf=math.inf)
            self._all_reduce(largest, largest=True)
            self._largest = float(largest)
        return self._largest

    @property
    def near_one(self) -> ShardedProduct:
        """The gradient in float32, multiplied by a power of two that brings its largest magnitude near 1."""
        exponent = -math.frexp(self.magnitude)[1]
        half = exponent // 2  # a subnormal's 2^149 is itself out of float32's range
        return self._product(self._part.float() * 2.0**half * 2.0 ** (exponent - half))

    def _product(self, part: Tensor) -> ShardedProduct:
        return ShardedProduct(part, slice(self._start, self._start + part.shape[self._dim]), self)

    def sum(self, tensor: Tensor) -> Tensor:
        """All processes' tensors, in the place of each."""
        self._all_reduce(tensor)
        return tensor

    @property
    def is_by_rows(self) -> bool:
        """Whether a process has some rows of it, else some columns."""
        return self._dim == 0


class ShardedProduct:
    """Products with G, of which this process has ``part``. What the search's ``Matrices`` call."""

    def __init__(self, part: Tensor, own: slice, gradient: ShardedGradient) -> None:
        self._part, self._own, self._gradient = part, own, gradient

    def times(self, right: Tensor, out: Tensor) -> None:
        """``out`` (L, b) = G @ ``right`` (S, b)."""
        if self._gradient.is_by_rows:
            torch.mm(self._part, right, out=out.zero_()[self._own])
        else:
            torch.mm(self._part, right[self._own], out=out)
        self._gradient.sum(out)

    def multiplied_by(self, left: Tensor, out: Tensor) -> None:
        """``out`` (b, S) = ``left`` (b, L) @ G."""
        if self._gradient.is_by_rows:
            product = left[:, self._own] @ self._part
        else:
            product = torch.zeros_like(out, memory_format=torch.contiguous_format)
            product[:, self._own] = left @ self._part
        out.copy_(self._gradient.sum(product))

    def norm(self, vectors: Tensor, sigma: Tensor) -> Tensor:
        """Its Frobenius norm, 0-d float32."""
        return self._gradient.sum(torch.linalg.vector_norm(self._part, dtype=torch.float64).square()).sqrt().float()

    def exact_right_vectors(self, rank: int) -> tuple[Tensor, Tensor]:
        """As the function of this name, of the whole gradient."""
        return exact_right_vectors(self._whole(), rank)

    def _whole(self) -> Tensor:
        whole = self._part.new_zeros(self._gradient.shape)
        (whole if self._gradient.is_by_rows else whole.mT)[self._own] = (
            self._part if self._gradient.is_by_rows else self._part.mT
        )
        return self._gradient.sum(whole)


class SummedGradient(ShardedGradient):
    """G, (L, S), the sum of what each process has, all of that shape. Its norm is estimated: see ``NormEstimate``.

    Args:
        part: what this process has, (L, S). all_reduce: over the processes.
    """

    def __init__(self, part: Tensor, all_reduce: AllReduce) -> None:
        super().__init__(part, 0, part.shape[0], 0, all_reduce)

    @property
    def T(self) -> SummedGradient:  # noqa: N802 - a tensor's is called so
        """The transposed gradient."""
        return SummedGradient(self._part.T, self._all_reduce)

    def _product(self, part: Tensor) -> ShardedProduct:
        return SummedProduct(part, slice(None), self)


class SummedProduct(ShardedProduct):
    """Products with G. Its norm is known after a search."""

    def __init__(self, part: Tensor, own: slice, gradient: ShardedGradient) -> None:
        super().__init__(part, own, gradient)
        self._estimate = NormEstimate()

    def multiplied_by(self, left: Tensor, out: Tensor) -> None:
        """As of ``ShardedProduct``."""
        super().multiplied_by(left, out)
        self._estimate.see_product(out)

    def norm(self, vectors: Tensor, sigma: Tensor) -> Tensor:
        """Its Frobenius norm, 0-d float32."""
        return self._estimate.norm(vectors, sigma, self._gradient.shape[0])

    def _whole(self) -> Tensor:
        whole = super()._whole()
        self._estimate.see_whole(whole)
        return whole


def exchanged(long: int, short: int, columns: int) -> tuple[int, ...]:
    """The float32 numbers in each all-reduce of a search that begins with a sketch: G (L, S), blocks of ``columns``.

    A warm search takes fewer.
    """
    block = long * columns, columns * short
    return (1, columns * short, *block, *block)


def is_thin(searches: Iterable[tuple[int, ...]], lowrank: int, gradient: int, itemsize: int) -> bool:
    """Whether searches of ``exchanged`` numbers and a projection are fewer bytes than the gradient.

    Args:
        lowrank, gradient: their elements. itemsize: of an element of either.
    """
    return torch.float32.itemsize * sum(map(sum, searches)) + itemsize * lowrank < itemsize * gradient
