"""Leading right singular vectors from a randomized block Krylov space: few products with the matrix, and small ones.

The matrix G is (L, S). A sketch of G, or a basis found earlier, gives the first block of b right vectors; each block
of left vectors Q = orth(G @ Z) gives the next block of right ones, Z = orth(G.T @ Q). What was found on the way is
kept: the singular vectors are taken from all of Q.T @ G, not from its last block as power iterations do. Two blocks
of b columns, four products, capture more than a sketch of b columns after two power iterations, six products.

Everything is done for N matrices of one shape together.

Sources: Musco and Musco, "Randomized block Krylov methods for stronger and faster approximate singular value
decomposition" (2015), algorithm 2; the sparse sign sketch is that of Martinsson and Tropp, "Randomized numerical
linear algebra" (2020), section 9.2.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from galore_kernels.subspace.orthonormal import orthonormalized
from galore_kernels.subspace.products import Matrices, in_batches, product, stacked, subtract_product


def sparse_sign_sketches(matrices: Matrices, count: int, sources: Sequence[torch.Generator]) -> Tensor:
    """(N, k, S): sums of the rows of each matrix with random signs, each row in one sum drawn at random; k <= L.

    It costs one reading of the matrix, and a copy on the CPU if its rows aren't contiguous. The numbers are drawn where
    each matrix's source lives; in a batch those of one seed share them, which are then drawn once.
    """
    rows = matrices.shape[0]
    if in_batches(matrices.device) or not isinstance(matrices.items[0], Tensor):
        numbers: dict[int, tuple[Tensor, Tensor]] = {}
        for source in sources:
            if source.initial_seed() not in numbers:
                numbers[source.initial_seed()] = _drawn(rows, source)
        return _by_dense_product(matrices, count, [numbers[source.initial_seed()] for source in sources])
    return stacked(
        [
            _by_sparse_product(matrix, count, *_drawn(rows, source))
            for matrix, source in zip(matrices.items, sources, strict=True)
            if isinstance(matrix, Tensor)
        ]
    )


def _drawn(rows: int, source: torch.Generator) -> tuple[Tensor, Tensor]:
    """The rows in random order, and of each place in it whether its sign is positive."""
    order = torch.randperm(rows, generator=source, device=source.device)
    return order, torch.randint(0, 2, (rows,), generator=source, device=source.device)


def _by_sparse_product(matrix: Tensor, count: int, order: Tensor, signs: Tensor) -> Tensor:
    rows = len(order)
    places = torch.stack([torch.arange(rows, device=order.device) % count, order])
    sums = torch.sparse_coo_tensor(
        places, (signs * 2 - 1).float(), (count, rows), device=order.device, check_invariants=False
    ).to(matrix.device)
    # Of columns that lie one behind the other a copy takes less time than a sparse product with them would.
    return sums @ matrix.contiguous()


def _by_dense_product(matrices: Matrices, count: int, drawn: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    # Adding rows up by index would need atomics, whose order varies, and a sorted copy of the matrix twice its traffic.
    rows = matrices.shape[0]
    coded = torch.stack([order for order, _ in drawn]).mul_(2).add_(torch.stack([signs for _, signs in drawn]))
    if matrices.device.type == "cuda" and coded.device.type == "cpu":
        coded = coded.pin_memory()  # else the host would wait for the copy
    coded = coded.to(matrices.device, non_blocking=True)
    places = torch.arange(rows, device=matrices.device) % count * rows + (coded >> 1)
    sums = coded.new_zeros(len(drawn), count * rows, dtype=matrices.dtype)
    sums.scatter_(1, places, ((coded & 1) * 2 - 1).to(matrices.dtype))
    sketches = sums.new_empty(len(drawn), count, matrices.shape[1], dtype=torch.float32)
    matrices.multiplied_by(sums.view(len(drawn), count, rows), out=sketches)
    return sketches


def leading_right_vectors(
    matrices: Matrices, right: Tensor, blocks: int, rank: int, failures: list[Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Estimates of the leading right singular vectors and singular values.

    Args:
        matrices: N, of (L, S).
        right: (N, S, b), what the spaces start from; rank <= blocks * b.
        blocks: of left vectors in a space; each costs two products with every matrix.
        rank: r, how many to return.
        failures: of ``orthonormalized``.

    Returns:
        Vectors (N, S, r) float32, of unit length, by falling singular value; orthonormal but for those whose singular
        value is near the rounding of the largest. Singular values (N, r) float64, none too large.

    Raises:
        LinAlgError: the eigenvalues of a (blocks * b, blocks * b) matrix did not converge.
    """
    count = right.shape[2]
    products = right.new_empty(len(right), blocks * count, matrices.shape[1])
    lefts: list[Tensor] = []
    for block in products.split(count, dim=1):
        columns = matrices.times(right)
        for left, found in zip(lefts, products.split(count, dim=1), strict=False):
            subtract_product(columns, left, product(found, right))
        columns = orthonormalized(columns, 1, failures)
        if lefts:  # what they have in common with those before is rounding, which making them long has made larger
            for left in lefts:
                subtract_product(columns, left, product(left.mT, columns))
            columns = orthonormalized(columns, 1, failures)
        matrices.multiplied_by(columns.mT, out=block)
        lefts.append(columns)
        if len(lefts) < blocks:
            right = orthonormalized(block.mT, 1, failures)
    wide = products.double()  # squared singular values down to fp32's rounding
    # On CUDA this waits for the device: PyTorch looks whether the eigenvalues converged.
    squares, vectors = torch.linalg.eigh(product(wide, wide.mT))
    squares, vectors = squares.flip(1)[:, :rank].clamp_min(0.0), vectors.flip(2)[:, :, :rank]
    long = product(products.mT, vectors.float())
    lengths = torch.linalg.vector_norm(long, dim=1, keepdim=True)
    return long / lengths.clamp_min(torch.finfo(torch.float32).tiny), squares.sqrt()
