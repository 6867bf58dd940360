"""Leading right singular vectors from a randomized block Krylov space: few products with the matrix, and small ones.

The matrix G is (L, S). A sketch of G, or a basis found earlier, gives the first block of b right vectors; each block
of left vectors Q = orth(G @ Z) gives the next block of right ones, Z = orth(G.T @ Q). What was found on the way is
kept: the singular vectors are taken from all of Q.T @ G, not from its last block as power iterations do. Two blocks
of b columns, four products, capture more than a sketch of b columns after two power iterations, six products.

Sources: Musco and Musco, "Randomized block Krylov methods for stronger and faster approximate singular value
decomposition" (2015), algorithm 2; the sparse sign sketch is that of Martinsson and Tropp, "Randomized numerical
linear algebra" (2020), section 9.2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from galore_kernels.subspace.orthonormal import orthonormalized


def sparse_sign_sketch(matrix: Tensor, count: int, source: torch.Generator) -> Tensor:
    """(k, S): sums of the rows of ``matrix`` with random signs, each row in one sum drawn at random; k <= L.

    It costs one reading of the matrix, and a copy if its rows aren't contiguous. The numbers are drawn where ``source``
    lives.
    """
    rows = matrix.shape[0]
    order = torch.randperm(rows, generator=source, device=source.device)
    signs = torch.randint(0, 2, (rows,), generator=source, device=source.device) * 2.0 - 1.0
    places = torch.stack([torch.arange(rows, device=source.device) % count, order])
    sums = torch.sparse_coo_tensor(
        places, signs.float(), (count, rows), device=source.device, check_invariants=False
    ).to(matrix.device)
    # Of columns that lie one behind the other a copy takes less time than a sparse product with them would.
    return sums @ matrix.contiguous()


def leading_right_vectors(matrix: Tensor, right: Tensor, blocks: int, rank: int) -> tuple[Tensor, Tensor]:
    """Estimates of the leading right singular vectors and singular values.

    Args:
        matrix: (L, S) float32.
        right: (S, b), what the space starts from; rank <= blocks * b.
        blocks: of left vectors in the space; each costs two products with the matrix.
        rank: r, how many to return.

    Returns:
        Vectors (S, r) float32, of unit length, by falling singular value; orthonormal but for those whose singular
        value is near the rounding of the largest. Singular values (r,) float64, none too large.

    Raises:
        LinAlgError: the eigenvalues of a (blocks * b, blocks * b) matrix did not converge.
    """
    count = right.shape[1]
    products = torch.empty(blocks * count, matrix.shape[1], dtype=torch.float32, device=matrix.device)
    lefts: list[Tensor] = []
    for block in products.split(count):
        columns = matrix @ right
        for left, product in zip(lefts, products.split(count), strict=False):
            columns.addmm_(left, product @ right, alpha=-1.0)
        columns = orthonormalized(columns, passes=1)
        if lefts:  # what they have in common with those before is rounding, which making them long has made larger
            for left in lefts:
                columns.addmm_(left, left.mT @ columns, alpha=-1.0)
            columns = orthonormalized(columns, passes=1)
        torch.mm(columns.mT, matrix, out=block)
        lefts.append(columns)
        if len(lefts) < blocks:
            right = orthonormalized(block.mT, passes=1)
    wide = products.double()  # squared singular values down to fp32's rounding
    squares, vectors = torch.linalg.eigh(wide @ wide.mT)
    squares, vectors = squares.flip(0)[:rank].clamp_min(0.0), vectors.flip(1)[:, :rank]
    found = products.mT @ vectors.float()
    return found / torch.linalg.vector_norm(found, dim=0).clamp_min(torch.finfo(torch.float32).tiny), squares.sqrt()
