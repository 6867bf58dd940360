"""Subspaces of gradients that processes have rows, columns or summands of, against that of the gradient itself."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from test_subspace_quality import assert_orthonormal
from thread_groups import Threads, in_threads
from torch import Tensor

from galore_kernels.subspace import (
    ShardedGradient,
    Subspace,
    SummedGradient,
    block_columns,
    exchanged,
    find_subspace,
    find_subspaces,
)

L, S, RANK = 150, 96, 8
BORDERS = (0, 70, 70, 150)  # one process has nothing


def gradient(decay: float = 0.7) -> Tensor:
    """Of falling singular values."""
    rng = torch.Generator().manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(size, S, generator=rng)).Q for size in (L, S))
    return u @ torch.diag(decay ** torch.arange(S)) @ v.T


def part(whole: Tensor, kind: str, rank: int, all_reduce: Any) -> ShardedGradient:
    """That of process ``rank``; of summands all but the first have noise that they cancel among them."""
    rows = slice(BORDERS[rank], BORDERS[rank + 1])
    if kind == "rows":
        return ShardedGradient(whole[rows], rows.start, L, 0, all_reduce)
    if kind == "columns":
        return ShardedGradient(whole.T[:, rows], rows.start, L, 1, all_reduce).T
    noise = torch.randn(whole.shape, generator=torch.Generator().manual_seed(1)).to(whole.dtype)
    return SummedGradient((whole, noise, -noise)[rank], all_reduce)


def found_together(
    whole: Tensor, kind: str, threads: Threads | None = None, *, transposed: bool = False, **options: Any
) -> list[Subspace]:
    def work(rank: int, all_reduce: Any) -> Subspace:
        own = part(whole, kind, rank, all_reduce)
        return find_subspaces([own.T if transposed else own], RANK, **options)[0]

    return in_threads(work, 3, threads)


KINDS = ["rows", "columns", "summands"]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("method", ["randomized", "svd"])
@pytest.mark.parametrize("kind", KINDS)
def test_all_find_the_subspace_of_the_whole(kind: str, method: str, transposed: bool) -> None:
    whole = gradient()
    subspaces = found_together(whole, kind, transposed=transposed, method=method)
    expected = find_subspace(whole.T if transposed else whole, RANK, method=method)
    for own in subspaces:
        assert own.found
        assert_orthonormal(own.basis)
        assert torch.equal(own.basis, subspaces[0].basis)
        assert torch.equal(own.captured, subspaces[0].captured)
        assert float((own.basis.T @ expected.basis).square().sum()) == pytest.approx(RANK, abs=1e-3)
        close = 1e-5 if kind != "summands" or method == "svd" else 5e-3
        assert float(own.captured) == pytest.approx(float(expected.captured), abs=close)


@pytest.mark.parametrize("decay", [0.999, 0.9, 0.3])
def test_the_norm_of_a_sum_is_estimated(decay: float) -> None:
    whole = gradient(decay)
    own, exact = found_together(whole, "summands")[0], find_subspace(whole, RANK)
    # Of 16 rows with random signs: sqrt(2 / 16) of what was not found.
    assert float(own.captured) == pytest.approx(float(exact.captured), rel=0.5 * (1 - float(exact.captured)) + 1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_warm_search_begins_with_the_basis_before(kind: str) -> None:
    whole = gradient()
    before = find_subspace(whole, RANK)
    warm = found_together(whole, kind, previous=[before.basis], captured=[float(before.captured)])[0]
    assert warm.found
    assert not warm.cold
    assert float((warm.basis.T @ before.basis).square().sum()) == pytest.approx(RANK, abs=1e-3)
    again = found_together(whole, kind, previous=[before.basis], captured=[1.2])[0]
    assert again.cold


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [1e-42, 1e-30, 1e25])
def test_scales_do_not_matter(kind: str, scale: float) -> None:
    whole = gradient() * scale if kind != "summands" else gradient()
    own = found_together(whole, kind)[0] if kind != "summands" else found_together_scaled(whole, scale)
    expected = find_subspace(gradient(), RANK)
    close = 0.05 if scale == 1e-42 else 1e-3  # subnormals have a few bits
    assert float((own.basis.T @ expected.basis).square().sum()) == pytest.approx(RANK, rel=close)


def found_together_scaled(whole: Tensor, scale: float) -> Subspace:
    """Of summands of which none is larger than the sum."""
    return in_threads(
        lambda rank, all_reduce: find_subspaces([SummedGradient(whole * (scale / 2), all_reduce)], RANK)[0], 2
    )[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_in_one_part_holds_nothing_for_all(kind: str, bad: float) -> None:
    whole = gradient()
    whole[-1, -1] = bad
    assert not any(own.found for own in found_together(whole, kind))
    assert not any(own.found for own in found_together(torch.zeros(L, S), "rows"))


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_exchanged_is_thin(kind: str) -> None:
    columns = block_columns((L, S), RANK, "randomized")
    assert columns is not None
    threads = Threads(3)
    found_together(gradient(), kind, threads)
    norm = [] if kind == "summands" else [1]
    assert threads.numbers == [*exchanged(L, S, columns), *norm]
    assert sum(threads.numbers) < L * S
