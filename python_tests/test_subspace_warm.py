"""A search that starts from the previous basis: what it finds, when it gives up, and what it says it captured."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from spectra import DECAYING, energy_share, gradient
from test_subspace_quality import assert_orthonormal
from torch import Tensor

from galore_kernels.subspace import find_subspace, krylov, search
from galore_kernels.subspace.krylov import sparse_sign_sketches
from galore_kernels.subspace.orthonormal import orthonormalized
from galore_kernels.subspace.products import Matrices

SHAPE, RANK = (384, 192), 24


def drifted(grad: Tensor, seed: int, by: float) -> Tensor:
    """The gradient of some steps later: as long, ``by`` of it in other directions."""
    noise = torch.randn(grad.shape, generator=torch.Generator().manual_seed(seed), dtype=grad.dtype)
    return (1 - by**2) ** 0.5 * grad + by * noise * (grad.norm() / noise.norm())


@pytest.mark.parametrize("name", DECAYING)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_warm_start_captures_what_a_cold_one_does_where_the_spectrum_decays(name: str, dtype: torch.dtype) -> None:
    grad = gradient(name, *SHAPE, RANK, seed=1)
    before = find_subspace(drifted(grad, 0, 0.3).to(dtype), RANK)
    warm = find_subspace(grad.to(dtype), RANK, previous=before.basis, captured=0.0)
    assert before.cold
    assert warm.found
    assert not warm.cold
    assert energy_share(grad.to(dtype), warm.basis) >= 0.99
    assert_orthonormal(warm.basis)


def test_a_warm_start_takes_two_products(monkeypatch: pytest.MonkeyPatch) -> None:
    grad = torch.randn(SHAPE)
    before = find_subspace(grad, RANK)
    counts: list[int] = []

    def spied(matrices: Matrices, right: Tensor, blocks: int, *args: Any) -> tuple[Tensor, Tensor]:
        counts.append(blocks)
        return krylov.leading_right_vectors(matrices, right, blocks, *args)

    monkeypatch.setattr(search, "leading_right_vectors", spied)
    assert not find_subspace(grad, RANK, previous=before.basis, captured=before.captured).cold
    assert counts == [1]  # of left vectors, of two products each


def test_it_improves_from_refresh_to_refresh() -> None:
    # On noise one block from a sketch is poor; the same block from the last basis goes on where that one stopped.
    grad = torch.randn(SHAPE)
    found = find_subspace(grad, RANK)
    shares = [energy_share(grad, found.basis)]
    for seed in range(4):
        found = find_subspace(grad, RANK, previous=found.basis, captured=found.captured, seed=seed)
        assert not found.cold
        shares.append(energy_share(grad, found.basis))
    assert shares == sorted(shares)
    assert shares[-1] > 0.99 > shares[0]


def test_it_starts_anew_where_the_previous_basis_captures_too_little() -> None:
    before = find_subspace(gradient("1/i", *SHAPE, RANK, seed=1), RANK)
    noise = torch.randn(SHAPE)
    kept = find_subspace(noise, RANK, previous=before.basis, captured=0.0)
    anew = find_subspace(noise, RANK, previous=before.basis, captured=before.captured)
    assert not kept.cold
    assert anew.cold
    assert energy_share(noise, anew.basis) > energy_share(noise, kept.basis) + 0.05
    # At the threshold: nine tenths of what it captured.
    for share, cold in ((kept.captured / 0.89, True), (kept.captured / 0.91, False)):
        assert find_subspace(noise, RANK, previous=before.basis, captured=share).cold == cold


def test_a_zero_basis_is_no_hindrance() -> None:
    grad = gradient("1/i", *SHAPE, RANK, seed=1).float()
    warm = find_subspace(grad, RANK, previous=torch.zeros(SHAPE[1], RANK), captured=0.0)
    assert_orthonormal(warm.basis)
    assert torch.count_nonzero(warm.basis.any(dim=0)) == 8  # the sketched columns are all there is to start from


@pytest.mark.parametrize("method", ["randomized", "svd"])
def test_what_it_says_it_captured_is_no_more_than_it_did(method: str) -> None:
    for name in DECAYING:
        grad = gradient(name, *SHAPE, RANK, seed=1).float()
        found = find_subspace(grad, RANK, method=method)
        share = ((grad.double() @ found.basis.double()).square().sum() / grad.double().square().sum()).item()
        assert share * 0.99 <= float(found.captured) <= share * (1 + 1e-5), name


def test_captured_needs_the_basis_it_belongs_to() -> None:
    with pytest.raises(ValueError, match=r"captured=0\.5: expected None without previous"):
        find_subspace(torch.randn(SHAPE), RANK, captured=0.5)


def test_nothing_found_captures_nothing() -> None:
    found = find_subspace(torch.zeros(SHAPE), RANK)
    assert not found.found
    assert float(found.captured) == 0.0


# ---------------------------------------------------------------------- the parts


def sketch_of(matrix: Tensor, count: int, seed: int) -> Tensor:
    (sketch,) = sparse_sign_sketches(Matrices([matrix], [1.0]), count, [torch.Generator().manual_seed(seed)])
    return sketch


@pytest.mark.parametrize("together", [False, True], ids=["sparse", "dense"])  # as on a CPU, as elsewhere
@pytest.mark.parametrize("count", [1, 7, 64, 100])
def test_every_row_is_in_one_sum_of_the_sketch(count: int, together: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    noise = torch.randn(100, 30)
    alone = sketch_of(noise, count, seed=1)
    monkeypatch.setattr(krylov, "in_batches", lambda _: together)
    torch.testing.assert_close(sketch_of(noise, count, seed=1), alone)  # the same sums of the same rows
    rows = torch.eye(100)
    sketch = sketch_of(rows, count, seed=1)
    assert sketch.shape == (count, 100)
    assert torch.equal(sketch.abs().sum(dim=0), torch.ones(100))
    in_each = sketch.abs().sum(dim=1)
    assert in_each.max() - in_each.min() <= 1
    assert count == 100 or 20 < (sketch < 0).sum() < 80
    other = sketch_of(rows, count, seed=2)
    assert not torch.equal(sketch, other)


def test_columns_of_any_length_and_condition_become_orthonormal() -> None:
    generator = torch.Generator().manual_seed(0)
    columns = torch.linalg.qr(torch.randn(300, 40, generator=generator, dtype=torch.float64)).Q
    left, right = (torch.linalg.qr(torch.randn(40, 40, generator=generator, dtype=torch.float64)).Q for _ in range(2))
    mixed = columns @ (left * torch.logspace(0, -2.5, 40)) @ right
    for scale in (torch.ones(40), torch.logspace(-15, 15, 40)):
        (found,) = orthonormalized((mixed * scale).float()[None]).double()
        assert (found.T @ found - torch.eye(40)).abs().max() <= 1e-5
        for count in (1, 5, 40):  # each in the span of itself and those before it
            before = torch.linalg.qr(mixed[:, :count]).Q
            outside = found[:, :count] - before @ (before.T @ found[:, :count])
            assert outside.norm(dim=0).max() <= 1e-3


def test_dependent_columns_leave_the_others_alone() -> None:
    columns = torch.randn(200, 6)
    columns[:, 3] = columns[:, 1] + columns[:, 2]
    columns[:, 4] = 0.0
    for passes in (1, 2):
        (found,) = orthonormalized(columns[None], passes=passes)
        assert bool(found.isfinite().all())
        assert torch.equal(found[:, 4], torch.zeros(200))
        independent = found[:, [0, 1, 2, 5]]
        assert (independent.T @ independent - torch.eye(4)).abs().max() <= 1e-2


def test_a_gram_matrix_that_rounding_made_indefinite_is_factored() -> None:
    # A thousand equal columns: every Gram entry is 1, give or take rounding.
    columns = torch.rand(64, 1) * torch.ones(1, 1000)
    (found,) = orthonormalized((columns + 1e-6 * torch.rand(64, 1000))[None], passes=2)
    assert bool(found.isfinite().all())
    assert abs(float(found[:, 0].norm()) - 1) < 1e-2
