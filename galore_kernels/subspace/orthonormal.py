"""Orthonormal columns by shifted Cholesky QR: products of matrices, and one small factorization."""

from __future__ import annotations

import torch
from torch import Tensor

# Added to the diagonal of a Gram matrix whose diagonal is 1. The first is some sixteen roundings of fp32, so that
# columns which depend on one another leave a factor; the last is more than their rounding can add up to.
_SHIFTS = (2.0**-20, 2.0**-13, 2.0**-6)


def orthonormalized(columns: Tensor, passes: int = 2) -> Tensor:
    """An orthonormal basis of the columns' span, each column in the span of itself and those before it.

    Two passes leave columns orthonormal to a few 1e-6 if their condition is below 1e3 once they are of one length, as
    they need not be; one pass leaves them well conditioned. Columns that depend on those before them come out shorter
    than 1 after one pass, of no particular direction after two. Zero columns stay zero.

    Source: Fukaya et al., "Shifted Cholesky QR for computing the QR factorization of ill-conditioned matrices" (2020),
    algorithms 3.1 and 4.1; here the Gram matrix is scaled to a unit diagonal first, and factored in float64.

    Args:
        columns: (n, k) float32, finite, with squares that neither overflow nor underflow.
        passes: 1 or 2.

    Returns:
        (n, k) float32.
    """
    for _ in range(passes):
        columns = columns @ _inverse_factor(columns.mT @ columns)
    return columns


def _inverse_factor(gram: Tensor) -> Tensor:
    """(k, k) upper triangular X, so that X.T @ gram @ X is the identity but for a shift."""
    gram = gram.double()
    lengths = gram.diagonal().sqrt()
    inverse = torch.where(lengths > 0, 1.0 / lengths, 1.0)
    scaled = inverse[:, None] * gram * inverse
    identity = torch.eye(len(gram), dtype=torch.float64, device=gram.device)
    for shift in _SHIFTS:
        factor, failed = torch.linalg.cholesky_ex(scaled + shift * identity)
        if not failed:
            break
    return (inverse[:, None] * torch.linalg.solve_triangular(factor, identity, upper=False).mT).float()
