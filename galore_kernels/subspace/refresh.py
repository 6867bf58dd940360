"""The basis of a gradient: its leading right singular vectors, exactly or from a randomized block Krylov space.

Notation: G is (L, S), the basis P is (S, r).

Sources: projecting a gradient is GaLore, Zhao et al., arXiv 2403.03507; of the randomized method see ``krylov``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from galore_kernels.subspace.arguments import (
    check_alike,
    check_count,
    check_grad,
    check_previous,
    check_rank,
    random_source,
)
from galore_kernels.subspace.products import Gradient
from galore_kernels.subspace.search import Subspace, search
from galore_kernels.subspace.side import unknown_choice

REFRESH_METHODS: tuple[str, ...] = ("randomized", "svd")
"""The values of ``method``."""


def refresh_basis(
    grad: Tensor,
    rank: int,
    *,
    previous: Tensor | None = None,
    seed: int | None = None,
    generator: torch.Generator | None = None,
    method: str = "randomized",
) -> Tensor:
    """The basis that ``find_subspace`` finds from a cold start."""
    return find_subspace(grad, rank, previous=previous, seed=seed, generator=generator, method=method).basis


@torch.no_grad()
def find_subspace(
    grad: Tensor,
    rank: int,
    *,
    previous: Tensor | None = None,
    captured: float | Tensor | None = None,
    seed: int | None = None,
    generator: torch.Generator | None = None,
    method: str = "randomized",
) -> Subspace:
    """The leading right singular vectors of a gradient.

    - Active columns are orthonormal to 1e-5 and ordered by falling singular value.
    - In each column the entry of largest magnitude is positive. A singular vector's sign is arbitrary, but
      moments kept across a refresh belong to one sign of it: without a convention the trajectory would depend
      on the library that computed the vectors, and CPU and GPU would part ways.
    - A column whose singular value is rounding noise is exactly zero, so that it can't move a weight: Adam
      divides by the size of what it sees and would turn noise into full-size steps. Noise is what doesn't
      exceed ``sqrt(max(L, S)) * eps(fp32) * sigma_1``, from this function's arithmetic, or
      ``2.5 * eps(grad.dtype) * |G|_F * (1/sqrt(L) + 1/sqrt(S))``, the largest singular value that a matrix of
      the gradient's own rounding errors has: what a 16-bit gradient of low rank carries.
    - A gradient that is zero, or has a NaN or an infinity, holds no directions: the basis is ``previous``
      itself, or without one an all-zero basis, under which a weight doesn't move; the optimizer then tries
      again at its next step. So it is too if every decomposition failed to converge.
    - Equal arguments give bitwise equal results on one device, number of threads and build of PyTorch. The
      global random state is neither read nor changed.

    Arithmetic is fp32, whatever autocast or the precision settings of matrix products say; but on CUDA a 16-bit
    gradient is multiplied with operands rounded to its dtype, and summed in fp32. A gradient is copied if it is
    neither fp32 nor 16-bit on CUDA, if its strides suit no matrix product, or if its scale is extreme; otherwise
    never. One number is read back from the device, two with a warm start; not on a CPU one more after a cold one.

    Args:
        grad: (L, S), float32, bfloat16, float16 or float64, on any device, with any strides; pass ``grad.T``
            for side "left".
        rank: number of columns wanted; the basis has r = min(rank, L, S).
        previous: (S, r), the basis to keep when the gradient holds none, and to start from with ``captured``.
        captured: what an earlier search returned as such with ``previous``. The search then starts from
            ``previous`` and eight sketched columns, and is half as long; if it captures less than 0.9 of this
            share it is followed by a cold one. Of no effect where the decomposition is exact.
        seed: of the sketch's random numbers, 0 <= seed < 2**64; 0 if neither seed nor generator is given.
            They are drawn on the CPU, so that the sketch is the same on every device.
        generator: the sketch's random numbers, instead of ``seed``; may live on another device than ``grad``.
        method: "randomized": a block Krylov space from a sparse sign sketch, four products with rank + 8
            columns; captures at least 0.99 of the exact energy |G @ P|_F^2 on a spectrum that decays, 0.9 and
            more on Gaussian noise; above ranks of about half the smaller dimension the exact decomposition, which
            costs no more there. "svd": always the exact decomposition; draws no numbers.

    Raises:
        TypeError: ``grad``, ``previous`` or ``generator`` of the wrong type; ``rank`` or ``seed`` no integer.
        ValueError: ``grad`` not a dense, non-empty matrix of one of those dtypes; ``rank`` < 1; ``previous``
            of another shape; both ``seed`` and ``generator``; ``seed`` out of range; unknown ``method``;
            ``captured`` without ``previous``.
    """
    rank = _checked(grad, rank, method)
    if previous is not None:
        check_previous("previous", previous, (grad.shape[1], rank))
    elif captured is not None:
        raise ValueError(f"captured={captured}: expected None without previous; pass the basis it belongs to")
    source = random_source(seed, generator)
    bases = None if previous is None else [previous]
    return search([grad], rank, bases, [captured], [source], method)[0]


@torch.no_grad()
def find_subspaces(
    grads: Sequence[Gradient],
    rank: int,
    *,
    previous: Sequence[Tensor] | None = None,
    captured: Sequence[float | Tensor | None] | None = None,
    seeds: Sequence[int] | None = None,
    method: str = "randomized",
) -> list[Subspace]:
    """What ``find_subspace`` finds of each of several gradients of one shape, dtype and device.

    On the CPU they are taken one after another, each with the bits that it has alone. Elsewhere they go together: each
    product with a gradient is a launch, and every other operation is one for as many gradients as have thin tensors of
    about 1 GiB together, whose products round as those of a batch do. What is decided for each gradient (it holds no
    directions, its scale is extreme, its warm start captured too little, its decomposition failed) is decided for all
    at a time: at most three small tensors are read back. ``torch.linalg.eigh`` waits for the device besides.

    Args:
        grads: any number of (L, S), each with strides of its own; or the factors of as many, which are never
            multiplied with one another unless the exact decomposition of more tokens than min(L, S) is asked for.
        previous, captured, seeds: one for each of them, or None; a None within ``captured`` is a cold start. Not on a
            CPU, equal seeds share their random numbers: drawing others takes the host 0.05 to 0.1 ms for each.

    Raises:
        TypeError, ValueError: as ``find_subspace``; gradients that differ in shape, dtype or device; other arguments
            that are not as many.
    """
    if not grads:
        return []
    rank = _checked(grads[0], rank, method, name="grads[0]")
    check_alike(grads)
    for name, values in (("previous", previous), ("captured", captured), ("seeds", seeds)):
        check_count(name, values, len(grads))
    shares = [None] * len(grads) if captured is None else list(captured)
    if previous is None and any(share is not None for share in shares):
        raise ValueError("captured: expected None without previous; pass the bases it belongs to")
    for index, basis in enumerate(previous or ()):
        check_previous(f"previous[{index}]", basis, (grads[0].shape[1], rank))
    sources = [random_source(seed, None) for seed in seeds or [0] * len(grads)]
    return search(grads, rank, previous, shares, sources, method)


def _checked(grad: Gradient, rank: int, method: str, name: str = "grad") -> int:
    """The rank that the basis will have."""
    check_grad(name, grad)
    check_rank(rank)
    if method not in REFRESH_METHODS:
        raise unknown_choice("method", method, REFRESH_METHODS)
    return min(rank, *grad.shape)
