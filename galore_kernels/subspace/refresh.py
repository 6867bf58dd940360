"""The basis of a gradient: its leading right singular vectors, exactly or from a randomized block Krylov space.

Notation: G is (L, S), the basis P is (S, r).

Sources: projecting a gradient is GaLore, Zhao et al., arXiv 2403.03507; of the randomized method see ``krylov``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from galore_kernels.subspace.krylov import leading_right_vectors, sparse_sign_sketch
from galore_kernels.subspace.orthonormal import orthonormalized
from galore_kernels.subspace.precision import full_precision
from galore_kernels.subspace.side import unknown_choice

REFRESH_METHODS: tuple[str, ...] = ("randomized", "svd")
"""The values of ``method``."""

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

# Gradients whose largest magnitude is in this range are used where they lie; others are multiplied by a power
# of two, so that neither squares nor 2^-24 of the largest value leave fp32's normal range.
LARGEST_UNSCALED = 2.0**32

# How much larger than under evenly spread magnitudes rounding noise may be; see _noise_level.
ROUNDING_MARGIN = 2.5

GRAD_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
FP32_EPS = torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class Subspace:
    """What ``find_subspace`` found.

    Attributes:
        basis: P, (S, r) float32, contiguous, on the gradient's device; ``previous`` itself where nothing was found.
        captured: estimate, from below, of the share |G @ P|_F^2 / |G|_F^2; 0-d float64 on that device.
        found: whether the gradient held any directions. cold: whether the search began with a sketch.
    """

    basis: Tensor
    captured: Tensor
    found: bool
    cold: bool


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

    Arithmetic is fp32, whatever autocast or the precision settings of matrix products say. A gradient is
    copied if it is not fp32, if its strides suit no matrix product, or if its scale is extreme; otherwise
    never. One number is read back from the device, two with a warm start.

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
    _check_grad_and_rank(grad, rank)
    if method not in REFRESH_METHODS:
        raise unknown_choice("method", method, REFRESH_METHODS)
    rank = min(rank, *grad.shape)
    if previous is not None:
        _check_previous(previous, (grad.shape[1], rank))
    elif captured is not None:
        raise ValueError(f"captured={captured}: expected None without previous; pass the basis it belongs to")
    source = _random_source(seed, generator)

    largest = _largest_magnitude(grad)
    if 0.0 < largest < math.inf:  # false for NaN as well
        try:
            with full_precision(), torch.autocast(grad.device.type, enabled=False):
                matrix = _as_fp32(grad, largest)
                columns = _block_columns(matrix.shape, rank, method)
                if columns is not None and captured is not None and previous is not None:
                    warm = _warm(matrix, previous, source, grad.dtype)
                    if bool(warm.captured >= WARM_SHARE * captured):
                        return warm
                return _cold(matrix, rank, source, grad.dtype, columns)
        except LinAlgError:
            pass  # documented above: no decomposition converged, which is not worth a training run
    if previous is None:
        previous = grad.new_zeros((grad.shape[1], rank), dtype=torch.float32)
    return Subspace(previous, torch.zeros((), dtype=torch.float64, device=grad.device), found=False, cold=True)


def _block_columns(shape: torch.Size, rank: int, method: str) -> int | None:
    """Columns of a cold start's blocks, or None where the decomposition is exact."""
    columns = -(-(rank + OVERSAMPLING) // COLUMNS_MULTIPLE) * COLUMNS_MULTIPLE
    return None if method == "svd" or columns >= EXACT_FROM_FRACTION * min(shape) else columns


def _cold(matrix: Tensor, rank: int, source: torch.Generator, grad_dtype: torch.dtype, columns: int | None) -> Subspace:
    if columns is None:
        return _settled(matrix, *_exact(matrix, rank), grad_dtype, cold=True)
    start = orthonormalized(sparse_sign_sketch(matrix, columns, source).mT, passes=1)
    return _settled(matrix, *leading_right_vectors(matrix, start, blocks=2, rank=rank), grad_dtype, cold=True)


def _warm(matrix: Tensor, previous: Tensor, source: torch.Generator, grad_dtype: torch.dtype) -> Subspace:
    sketch = sparse_sign_sketch(matrix, WARM_COLUMNS, source)
    start = orthonormalized(torch.cat([previous.to(matrix.device, torch.float32), sketch.mT], dim=1), passes=1)
    rank = previous.shape[1]
    return _settled(matrix, *leading_right_vectors(matrix, start, blocks=1, rank=rank), grad_dtype, cold=False)


def _settled(matrix: Tensor, vectors: Tensor, sigma: Tensor, grad_dtype: torch.dtype, *, cold: bool) -> Subspace:
    """The subspace of these vectors: signs chosen, noise left out, orthonormal."""
    pivot = vectors.gather(0, vectors.abs().argmax(dim=0, keepdim=True))
    vectors = torch.where(pivot < 0, -vectors, vectors)
    norm = torch.linalg.vector_norm(matrix)
    active = sigma > _noise_level(matrix.shape, norm, sigma[0], grad_dtype)  # false for NaN as well
    basis = orthonormalized(vectors.masked_fill_(~active, 0.0)).contiguous()
    captured = sigma.double().masked_fill(~active, 0.0).square().sum() / norm.double().square()
    return Subspace(basis, captured, found=True, cold=cold)


def _exact(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    # LAPACK's vectors could be returned as they are, but of coherent gradients (a constant matrix) its small singular
    # values are rounding of up to 100 eps sigma_1; projecting on them and decomposing again brings that to less than 1.
    left = torch.linalg.qr(matrix @ _right_singular(matrix, rank)[0]).Q
    return _right_singular(left.mT @ matrix, rank)


def _right_singular(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(S, r) leading right singular vectors and (r,) singular values of any (L, S) matrix.

    A QR first leaves a square decomposition of the smaller dimension: of 1024 x 4096 in a third of the time.
    """
    long, short = matrix.shape
    if long < short:
        q, r = torch.linalg.qr(matrix.mT)
        vectors, sigma = _left_singular_square(r)
        return q @ vectors[:, :rank], sigma[:rank]
    core = torch.linalg.qr(matrix, mode="r").R if long > short else matrix
    vectors, sigma = _left_singular_square(core.mT)
    return vectors[:, :rank], sigma[:rank]


def _left_singular_square(core: Tensor) -> tuple[Tensor, Tensor]:
    try:
        vectors, sigma, _ = torch.linalg.svd(core)
        return vectors, sigma
    except LinAlgError:
        # LAPACK's divide and conquer may fail to converge. A Gram matrix squares the condition, but in
        # float64 that leaves errors of 1e-8 sigma_1, below the noise level of every shape.
        core64 = core.double()
        squares, vectors = torch.linalg.eigh(core64 @ core64.mT)
        return vectors.flip(-1).float(), squares.flip(-1).sqrt().float()  # NaN of a square that rounded below zero


def _noise_level(shape: torch.Size, norm: Tensor, sigma_1: Tensor, grad_dtype: torch.dtype) -> Tensor:
    """Singular values up to this are rounding: this function's own, or the gradient's. See ``refresh_basis``.

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


def _largest_magnitude(grad: Tensor) -> float:
    # aminmax needs no temporary and is 20 times faster than the infinity norm, in memory's order above all.
    low, high = torch.aminmax(grad.mT if grad.stride(0) < grad.stride(1) else grad)
    return torch.maximum(-low, high).item()


def _as_fp32(grad: Tensor, largest: float) -> Tensor:
    """The gradient in fp32, at its own scale or one near 1, with strides that matrix products take as is."""
    matrix = grad if grad.dtype == torch.float64 else grad.to(torch.float32)
    if not 1.0 / LARGEST_UNSCALED <= largest <= LARGEST_UNSCALED:
        # In two halves: a subnormal's 2^149 is itself out of fp32's range.
        exponent = math.frexp(largest)[1]
        half = exponent // 2
        matrix = matrix * 2.0**-half * 2.0 ** (half - exponent)
    matrix = matrix.to(torch.float32)
    return matrix if min(matrix.stride()) == 1 else matrix.contiguous()


def _check_grad_and_rank(grad: Tensor, rank: int) -> None:
    if not isinstance(grad, Tensor):
        raise TypeError(f"grad: expected a torch.Tensor of shape (L, S), got {type(grad).__name__}")
    if grad.layout != torch.strided:
        raise ValueError(f"grad: expected a dense tensor, got layout {grad.layout}; pass grad.to_dense()")
    if grad.dtype not in GRAD_DTYPES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in GRAD_DTYPES)
        raise ValueError(f"grad: expected one of the dtypes {names}, got {grad.dtype}; convert it first")
    if grad.ndim != 2:
        raise ValueError(f"grad: expected a matrix (L, S), got shape {tuple(grad.shape)}; reshape it to two dimensions")
    if grad.numel() == 0:
        raise ValueError(f"grad: expected at least one element, got shape {tuple(grad.shape)}; leave it out")
    if isinstance(rank, bool) or not isinstance(rank, int):
        raise TypeError(f"rank: expected an integer, got {rank!r}")
    if rank < 1:
        raise ValueError(f"rank={rank}: expected an integer >= 1; a full-rank update needs no basis")


def _check_previous(previous: Tensor, shape: tuple[int, int]) -> None:
    if not isinstance(previous, Tensor):
        raise TypeError(f"previous: expected a torch.Tensor or None, got {type(previous).__name__}")
    if tuple(previous.shape) != shape:
        raise ValueError(
            f"previous: expected shape (S, r) = {shape}, got {tuple(previous.shape)}; "
            "pass None to start afresh after a change of rank or side"
        )


def _random_source(seed: int | None, generator: torch.Generator | None) -> torch.Generator:
    if generator is not None:
        if seed is not None:
            raise ValueError("seed and generator: expected at most one of them, got both; leave one out")
        if not isinstance(generator, torch.Generator):
            raise TypeError(f"generator: expected a torch.Generator, got {type(generator).__name__}")
        return generator
    seed = 0 if seed is None else seed
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed: expected an integer, got {seed!r}")
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed={seed}: expected 0 <= seed < 2**64")
    return torch.Generator(device="cpu").manual_seed(seed)
