"""The search for the subspaces of several gradients: warm or cold, together or alone, and who has to search again.

Notation: G is (L, S), the basis P is (S, r); N gradients of one shape are worked on together.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from galore_kernels.subspace.krylov import leading_right_vectors, sparse_sign_sketches
from galore_kernels.subspace.orthonormal import orthonormalized
from galore_kernels.subspace.precision import full_precision
from galore_kernels.subspace.products import Gradient, Matrices, in_batches, largest_magnitudes, stacked

# Two blocks of r + 8 columns capture more than torch.svd_lowrank(q=r+8, niter=2) does, in four products where that
# takes six. Fewer than r would lose directions of equal singular values: among those a block finds no more than it has
# columns. Products are fastest where their columns are a multiple of 8.
OVERSAMPLING = 8
COLUMNS_MULTIPLE = 8

# From the previous basis and this many sketched columns one block is enough, two products, unless it captures less than
# this part of the share that the previous basis captured of its own gradient.
WARM_COLUMNS = 8
WARM_SHARE = 0.9

# Blocks of this part of the smaller dimension cost as much as the exact decomposition, which is better as well
# (measured on one CPU thread at 512 x 512, 1024 x 1024 and 2048 x 512: they meet at ranks of half the dimension).
EXACT_FROM_FRACTION = 0.5

# Of the thin tensors that a batch has at a time, about. A constant, not a share of what is free: how gradients are
# grouped decides how products round.
BATCH_BYTES = 2**30

# How much larger than under evenly spread magnitudes rounding noise may be; see noise_level.
ROUNDING_MARGIN = 2.5

FP32_EPS = torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class Subspace:
    """What ``find_subspace`` found.

    Attributes:
        basis: P, (S, r) float32, contiguous, on the gradient's device; ``previous`` itself where nothing was found.
        shares: estimate of the part of |G|_F^2 that each column captures, (r,) float64 on that device.
        captured: their sum, the estimate of |G @ P|_F^2 / |G|_F^2, from below, but that rounded operands (see
            ``Matrices``) may add 1e-3 of it; 0-d float64 on that device.
        found: whether the gradient held any directions. cold: whether the search began with a sketch.
    """

    basis: Tensor
    shares: Tensor
    captured: Tensor
    found: bool
    cold: bool


def search(
    grads: Sequence[Gradient],
    rank: int,
    previous: Sequence[Tensor] | None,
    captured: Sequence[float | Tensor | None],
    sources: Sequence[torch.Generator],
    method: str,
) -> list[Subspace]:
    """The subspaces of N gradients of one shape, dtype and device; r is at most min(L, S). See ``find_subspaces``."""
    largest = largest_magnitudes(grads)
    usable = [index for index, size in enumerate(largest) if 0.0 < size < math.inf]  # false for NaN as well
    columns = block_columns(grads[0].shape, rank, method)
    layers = _Layers(grads, largest, previous, sources, rank, columns)
    found: dict[int, Subspace] = {}
    with full_precision(), torch.autocast(grads[0].device.type, enabled=False):
        if columns is not None:
            found = layers.warm({index: share for index in usable if (share := captured[index]) is not None})
        found |= layers.cold([index for index in usable if index not in found])
    return [found[index] if index in found else layers.nothing(index) for index in range(len(grads))]


def block_columns(shape: tuple[int, ...], rank: int, method: str) -> int | None:
    """Columns of a cold start's blocks, or None where the decomposition is exact."""
    columns = -(-(rank + OVERSAMPLING) // COLUMNS_MULTIPLE) * COLUMNS_MULTIPLE
    return None if method == "svd" or columns >= EXACT_FROM_FRACTION * min(shape) else columns


def batch_size(count: int, shape: tuple[int, ...], columns: int | None) -> int:
    """How many of ``count`` gradients are searched together where they can be: as even batches as they come."""
    if columns is None:
        return 1
    bytes_each = 32 * columns * sum(shape)
    return -(-count // max(1, -(-count * bytes_each // BATCH_BYTES)))


@dataclass(frozen=True)
class _Layers:
    """The gradients of one search, by their index, and what is known of them."""

    grads: Sequence[Gradient]
    largest: Sequence[float]
    previous: Sequence[Tensor] | None
    sources: Sequence[torch.Generator]
    rank: int
    columns: int | None

    def warm(self, captured: dict[int, float | Tensor]) -> dict[int, Subspace]:
        """From the previous bases: those that captured enough of what ``captured`` says."""
        found, _ = self._batches(list(captured), cold=False)
        device = self.grads[0].device
        there = {i: x for i, x in captured.items() if isinstance(x, Tensor) and x.device == device}
        values = _read_back([*(subspace.captured for subspace in found.values()), *there.values()])
        shares = values[: len(found)]
        least = {i: float(x) for i, x in captured.items() if i not in there}
        least |= zip(there, values[len(found) :], strict=True)
        # Of one that no shift factored the share is NaN, and it isn't enough.
        enough = [i for i, share in zip(found, shares, strict=True) if share >= WARM_SHARE * least[i]]
        return {index: found[index] for index in enough}

    def cold(self, indices: Sequence[int]) -> dict[int, Subspace]:
        """From sketches, or by exact decompositions; without those of which no decomposition converged."""
        found, again = self._batches(indices, cold=True)
        if not in_batches(self.grads[0].device):
            return found  # each was alone already
        shares = _read_back([subspace.captured for subspace in found.values()])
        again += [index for index, share in zip(found, shares, strict=True) if math.isnan(share)]
        for index in again:
            found.pop(index, None)
            alone = self._found([index], cold=True, failures=None)
            if alone is not None:
                found[index] = alone[0]
        return found

    def nothing(self, index: int) -> Subspace:
        """What is returned of a gradient that holds no directions."""
        grad = self.grads[index]
        if self.previous is None:
            basis = torch.zeros((grad.shape[1], self.rank), dtype=torch.float32, device=grad.device)
        else:
            basis = self.previous[index]
        shares = torch.zeros(self.rank, dtype=torch.float64, device=grad.device)
        return Subspace(basis, shares, shares.sum(), found=False, cold=True)

    def _batches(self, indices: Sequence[int], *, cold: bool) -> tuple[dict[int, Subspace], list[int]]:
        """What is found batch by batch, and who was in a batch of which a decomposition failed."""
        found: dict[int, Subspace] = {}
        failed: list[int] = []
        together = in_batches(self.grads[0].device)
        for batch in self._split(indices, together):
            subspaces = self._found(batch, cold=cold, failures=[] if together else None)
            if subspaces is None:
                failed += batch
            else:
                found.update(zip(batch, subspaces, strict=True))
        return found, failed

    def _split(self, indices: Sequence[int], together: bool) -> Iterator[list[int]]:
        size = batch_size(len(indices), self.grads[0].shape, self.columns) if together else 1
        return (list(indices[start : start + size]) for start in range(0, len(indices), max(1, size)))

    def _found(self, batch: list[int], *, cold: bool, failures: list[Tensor] | None) -> list[Subspace] | None:
        """One batch's subspaces, or None if a decomposition of it failed."""
        matrices = Matrices([self.grads[i] for i in batch], [self.largest[i] for i in batch])
        try:
            vectors, sigma = self._vectors(matrices, batch, cold, failures)
        except LinAlgError:
            return None
        return _settled(matrices, vectors, sigma, cold=cold, failures=failures)

    def _vectors(
        self, matrices: Matrices, batch: list[int], cold: bool, failures: list[Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        if self.columns is None:
            return matrices.exact_right_vectors(self.rank)
        count = self.columns if cold else WARM_COLUMNS
        start = sparse_sign_sketches(matrices, count, [self.sources[i] for i in batch]).mT
        if not cold and self.previous is not None:
            known = [self.previous[i].to(matrices.device, torch.float32) for i in batch]
            start = torch.cat([stacked(known), start], dim=2)
        start = orthonormalized(start, 1, failures)
        return leading_right_vectors(matrices, start, 2 if cold else 1, self.rank, failures)


def _settled(
    matrices: Matrices, vectors: Tensor, sigma: Tensor, *, cold: bool, failures: list[Tensor] | None
) -> list[Subspace]:
    """The subspaces of these vectors: signs chosen, noise left out, orthonormal; captured is NaN after a failure."""
    pivot = vectors.gather(1, vectors.abs().argmax(dim=1, keepdim=True))
    vectors = torch.where(pivot < 0, -vectors, vectors)
    norm = matrices.norms(vectors, sigma)
    noise = noise_level(matrices.shape, norm, sigma[:, 0], matrices.grad_dtype)
    active = sigma > noise.unsqueeze(-1)  # false for NaN as well
    bases = orthonormalized(vectors.masked_fill_(~active[:, None], 0.0), 2, failures).contiguous()
    energies = sigma.double().masked_fill(~active, 0.0).square()
    total = norm.double().square()
    shares, captured = energies / total[:, None], energies.sum(dim=1) / total
    if failures:
        captured = captured.masked_fill(torch.stack(failures).any(dim=0), math.nan)
    if len(bases) > 1:  # each of its own memory, so that one that is kept doesn't keep them all
        bases, captured = map(Tensor.clone, bases), map(Tensor.clone, captured)  # type: ignore[assignment]
    each = zip(bases, shares, captured, strict=True)
    return [Subspace(basis, own, sum_, found=True, cold=cold) for basis, own, sum_ in each]


def _read_back(values: Sequence[Tensor]) -> list[float]:
    """Numbers that the host needs, in one reading."""
    return list(torch.stack([value.double() for value in values]).tolist()) if values else []


def noise_level(shape: torch.Size, norm: Tensor, sigma_1: Tensor, grad_dtype: torch.dtype) -> Tensor:
    """Singular values up to this are rounding: this function's own, or the gradient's. See ``find_subspace``.

    Measured on gradients of rank 1, 5 and 40 whose factors were Gaussian, heavy-tailed, sparse, positive,
    ramps or constant, and on products computed in the gradient's dtype, from 16 x 16 to 4096 x 1024 and
    32000 x 256: the largest spurious singular value was 0.25 of the arithmetic's bound; of the 16-bit bound
    without its constant it was 0.38 to 0.96 where the gradient is spread evenly, up to 2.0 where it is
    sparse and 2.3 where its tails are heavy. A bound that follows the largest row and column would be
    tighter on those, and was rejected: under one outlier row it would silence real directions of all the
    others.
    """
    long, short = shape
    arithmetic = math.sqrt(max(long, short)) * FP32_EPS * sigma_1
    spread = torch.finfo(grad_dtype).eps * (1.0 / math.sqrt(long) + 1.0 / math.sqrt(short))
    return torch.maximum(arithmetic, ROUNDING_MARGIN * spread * norm)
