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


def refresh_bytes(settings: Settings, matrix: Matrix, count: int) -> tuple[int, int]:
    """Bytes beside gradients and state while the bases of ``count`` matrices of one shape are found.

    Returns:
        What the search itself takes, and the bases that it has found, float32, until they go into the state.
    """
    (long, short), rank = settings.long_short(matrix), settings.rank_of(matrix)
    found = short * rank * _FLOAT
    columns = block_columns((long, short), rank, "randomized")
    if settings.gradients == "factored":  # one after another, all before the update
        return _from_factors(settings.tokens, long, short, rank, columns, settings.dtype), count * found
    copied = settings.dtype != torch.float32 and (settings.device == "cpu" or columns is None)
    copy = matrix.numel * _FLOAT if copied else 0
    thin = _exact(long, short, rank) if columns is None else _krylov(long, short, rank, columns)
    thin = max(thin, _settling(short, rank))
    if settings.device == "cpu":  # each followed by its update
        return copy + thin, 0
    return batch_size(count, (long, short), columns) * (copy + thin), count * found


def _from_factors(tokens: int, long: int, short: int, rank: int, columns: int | None, dtype: torch.dtype) -> int:
    """Where G is dY.T @ X: both in float32, (T, L) and (T, S), and products with one of them, (T, b)."""
    copies = tokens * (long + short) * _FLOAT
    # Of 16 bits each side has a float32 list before they are put together, dY first.
    copying = tokens * (long + max(long, 2 * short)) * _FLOAT if dtype != torch.float32 else copies
    if columns is not None:
        multiplying = _krylov_blocks(long, short, columns) + tokens * columns * _FLOAT
        return max(copying, copies + max(multiplying, _krylov(long, short, rank, columns)))
    if tokens >= min(long, short):  # G itself is made
        return max(copying, copies + long * short * _FLOAT + _exact(long, short, rank))
    triangles = (tokens * (long + short) + 4 * tokens**2) * _FLOAT  # of QR decompositions of both, and their product's
    return max(copying, copies + max(triangles, _settling(short, rank)))


def _krylov(long: int, short: int, rank: int, columns: int) -> int:
    """Bytes of a randomized search at the fullest of three moments."""
    space = 2 * columns
    # The second block's left vectors are made orthonormal: their successor, and the factors of their Gram matrix.
    factoring = _FLOAT * long * columns + _factoring(columns)
    # The singular vectors are taken from all products in double, by the eigenvectors of their Gram matrix: these come
    # and are put in falling order; in float they give vectors, which are made of unit length.
    double = _DOUBLE * (space * short + space**2)
    ordering = double + _DOUBLE * space**2
    vectors = double + _FLOAT * rank * (short + max(space, short))
    return _krylov_blocks(long, short, columns) + max(factoring, ordering, vectors)


def _krylov_blocks(long: int, short: int, columns: int) -> int:
    """Of two blocks: the products Q.T @ G, the right vectors they started from, the left vectors Q."""
    return 2 * columns * (short + short + long) * _FLOAT


def _factoring(columns: int) -> int:
    """Of making columns orthonormal: their Gram matrix, and in double that, scaled, shifted, factored and inverted."""
    return (6 * _DOUBLE + _FLOAT) * columns**2


def _settling(short: int, rank: int) -> int:
    """Of any search in the end: the singular vectors, with their signs chosen, and made orthonormal."""
    return 3 * _FLOAT * short * rank + _factoring(rank)


def _exact(long: int, short: int, rank: int) -> int:
    """Bytes of an exact decomposition: of R of a QR decomposition where G isn't square, U and V of its singular."""
    square = (3 if long != short else 2) * short**2
    projected = 2 * long * rank + rank**2  # then of the gradient's projection on the leading vectors
    return _FLOAT * max(square, projected + short**2)
