"""Orthonormal columns by shifted Cholesky QR: products of matrices, and one small factorization."""

from __future__ import annotations

import torch
from torch import Tensor

from galore_kernels.subspace.products import product

# Added to the diagonal of a Gram matrix whose diagonal is 1. The first is some sixteen roundings of fp32, so that
# columns which depend on one another leave a factor; the last is more than their rounding can add up to.
_SHIFTS = (2.0**-20, 2.0**-13, 2.0**-6)


def orthonormalized(columns: Tensor, passes: int = 2, failures: list[Tensor] | None = None) -> Tensor:
    """An orthonormal basis of the columns' span, each column in the span of itself and those before it.

    Two passes leave columns orthonormal to a few 1e-6 if their condition is below 1e3 once they are of one length, as
    they need not be; one pass leaves them well conditioned. Columns that depend on those before them come out shorter
    than 1 after one pass, of no particular direction after two. Zero columns stay zero.

    Source: Fukaya et al., "Shifted Cholesky QR for computing the QR factorization of ill-conditioned matrices" (2020),
    algorithms 3.1 and 4.1; here the Gram matrix is scaled to a unit diagonal first, and factored in float64.

    Args:
        columns: (N, n, k) float32, finite, with squares that neither overflow nor underflow; n >= k for the repair.
        passes: 1 or 2.
        failures: None: each shift is tried where the one before it failed, which reads a number back from the device,
            and Householder QR repairs what none of them factored. A list: nothing is read back; an (N,) bool is
            appended for each pass, true for a matrix that no shift factored, whose columns are only made of length 1:
            for that one the caller has to ask again, without a list.

    Returns:
        (N, n, k) float32.
    """
    for _ in range(passes):
        inverse = _inverse_factors(product(columns.mT, columns), failures)
        columns = _householder(columns) if inverse is None else product(columns, inverse)
    return columns


def _inverse_factors(grams: Tensor, failures: list[Tensor] | None) -> Tensor | None:
    """(N, k, k) upper triangular X, so that X.T @ gram @ X is the identity but for a shift; None if there is none."""
    grams = grams.double()
    lengths = grams.diagonal(dim1=1, dim2=2).sqrt()
    inverse = torch.where(lengths > 0, 1.0 / lengths, 1.0)
    scaled = inverse[:, :, None] * grams * inverse[:, None, :]
    identity = torch.eye(grams.shape[1], dtype=torch.float64, device=grams.device)
    factors = _first_factors(scaled, identity) if failures is None else _all_factors(scaled, identity, failures)
    if factors is None:
        return None
    return (inverse[:, :, None] * torch.linalg.solve_triangular(factors, identity, upper=False).mT).float()


def _first_factors(scaled: Tensor, identity: Tensor) -> Tensor | None:
    """With the first shift that gives factors, for which the device is asked."""
    for shift in _SHIFTS:
        factors, failed = torch.linalg.cholesky_ex(scaled + shift * identity)
        if not failed.any():
            return factors
    return None


def _all_factors(scaled: Tensor, identity: Tensor, failures: list[Tensor]) -> Tensor:
    """With every shift in one call, and for each matrix the factor of the first that gave one."""
    tried, failed = torch.linalg.cholesky_ex(torch.stack([scaled + shift * identity for shift in _SHIFTS]))
    factors = identity.expand_as(scaled)
    for factor, wrong in zip(tried.flip(0), failed.flip(0) != 0, strict=True):
        factors = torch.where(wrong[:, None, None], factors, factor)
    failures.append((failed != 0).all(dim=0))
    return factors


def _householder(columns: Tensor) -> Tensor:
    """The same by Householder QR, which never fails: with a factor of positive diagonal, and zero columns zero."""
    # Last, for it gives zero columns directions too, which it would take from those behind them.
    order = (columns == 0).all(dim=1, keepdim=True).sort(dim=2, stable=True).indices.expand_as(columns)
    q, r = torch.linalg.qr(columns.gather(2, order))
    return torch.empty_like(columns).scatter_(2, order, q * r.diagonal(dim1=1, dim2=2).sign()[:, None, :])
