"""Leading right singular vectors by dense decompositions, of one matrix at a time."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]


def exact_right_vectors(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(S, r) leading right singular vectors and (r,) singular values of an (L, S) matrix, all float32.

    Raises:
        LinAlgError: neither the decomposition nor that of a Gram matrix converged.
    """
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
