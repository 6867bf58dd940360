"""Memory that finding bases takes: the tensors of ``galore_kernels.subspace`` where they are most.

Notation: the gradient G is (L, S), the basis (S, r); b columns in a block of the Krylov space, two blocks; N matrices
of one shape go together (one on a CPU). What LAPACK or cuSOLVER take for themselves is not counted.
"""

from __future__ import annotations

import torch

from galore_kernels.plan.settings import Settings
from galore_kernels.plan.shapes import Matrix
from galore_kernels.subspace.search import batch_size, block_columns

__all__ = ["refresh_bytes"]

_FLOAT, _DOUBLE = torch.float32.itemsize, torch.float64.itemsize


def refresh_bytes(settings: Settings, matrix: Matrix, count: int, *, from_gradient: bool = True) -> int:
    """Bytes beside gradients and state while the bases of ``count`` matrices of one shape are found.

    Args:
        from_gradient: whether G is there; else products with it are products with X and dY, (T, b) in between.
    """
    if count == 0:
        return 0
    (long, short), rank = settings.long_short(matrix), settings.rank_of(matrix)
    columns = block_columns((long, short), rank, "randomized")
    at_once = 1 if settings.device == "cpu" else batch_size(count, (long, short), columns)
    copies = _copies(settings, matrix, columns) if from_gradient else 0
    if columns is None:
        thin = _exact(long, short, rank)
    else:
        thin = _krylov(long, short, rank, columns) + (0 if from_gradient else settings.tokens * columns * _FLOAT)
    found = count * short * rank * _FLOAT if settings.device == "cuda" else 0  # all go into the state afterwards
    return found + at_once * (copies + thin)


def _copies(settings: Settings, matrix: Matrix, columns: int | None) -> int:
    """Of the gradient in float32: of a 16-bit one on a CPU, and of any for an exact decomposition."""
    narrow = settings.dtype != torch.float32
    copied = narrow and (settings.device == "cpu" or columns is None)
    return matrix.numel * _FLOAT if copied else 0


def _krylov(long: int, short: int, rank: int, columns: int) -> int:
    """Bytes of a randomized search at the fullest of three moments."""
    space = 2 * columns
    always = _FLOAT * (
        space * short  # the products Q.T @ G of both blocks
        + 2 * short * columns  # the right vectors that each block started from
        + 2 * long * columns  # the left vectors of both blocks
    )
    # The second block's left vectors are made orthonormal: their successor, and the factors of their Gram matrix.
    factoring = _FLOAT * long * columns + 6 * _DOUBLE * columns**2
    # The singular vectors are taken from all products in double, by the eigenvectors of their Gram matrix: these come
    # and are put in falling order; in float they give vectors, which are made of unit length.
    double = _DOUBLE * (space * short + space**2)
    ordering = double + _DOUBLE * space**2
    vectors = double + _FLOAT * rank * (short + max(space, short))
    return always + max(factoring, ordering, vectors)


def _exact(long: int, short: int, rank: int) -> int:
    """Bytes of an exact decomposition: of R of a QR decomposition where G isn't square, U and V of its singular."""
    square = (3 if long != short else 2) * short**2
    projected = 2 * long * rank + rank**2  # then of the gradient's projection on the leading vectors
    return _FLOAT * max(square, projected + short**2)
