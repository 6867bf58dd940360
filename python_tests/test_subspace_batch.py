"""Many gradients at once: against each alone, with what is wrong with some of them kept from the others.

A GPU works on a batch together and reads nothing back within; here the CPU is made to do as it does, with the products
of 16-bit gradients emulated: operands rounded, sums in fp32. Nothing here ran on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from spectra import DECAYING, NOISE_LIKE, energy_share, gradient
from test_subspace_quality import active_columns, assert_orthonormal
from torch import Tensor

from galore_kernels.subspace import Subspace, find_subspace, find_subspaces, krylov, orthonormal, products, search
from galore_kernels.subspace.orthonormal import orthonormalized

SHAPE, RANK = (384, 192), 24
# Captured energies of the two ways: another order of summation moves fp32 singular vectors by some 1e-6 of a gap, and
# what a subspace captures by the square of it.
SAME_ENERGY = 1e-5
# Operands of products rounded to bf16: measured, at most 8e-4 less energy, where the spectrum is nearly flat.
NARROW_ENERGY = 2e-3
# Of a nearly flat spectrum, from two sketches; measured 7e-4.
OTHER_SKETCH = 5e-3


@pytest.fixture
def together(monkeypatch: pytest.MonkeyPatch) -> None:
    """All gradients in a batch, as on a device other than the CPU."""
    for module in (krylov, search):
        monkeypatch.setattr(module, "in_batches", lambda _: True)
    monkeypatch.setattr(products, "_stays_narrow", lambda grad: grad.dtype in products.NARROW_DTYPES)
    monkeypatch.setattr(
        products, "_multiply_narrow", lambda left, right, out: torch.mm(left.float(), right.float(), out=out)
    )


def gradients(dtype: torch.dtype = torch.float32, names: tuple[str, ...] = ("1/i", "0.99^i", "rank r")) -> list[Tensor]:
    return [gradient(name, *SHAPE, RANK, seed).to(dtype) for seed, name in enumerate(names)]


def assert_same(one: Subspace, other: Subspace) -> None:
    assert torch.equal(one.basis, other.basis)
    assert torch.equal(one.captured, other.captured)
    assert (one.found, one.cold) == (other.found, other.cold)


# On the CPU each gradient is alone ---------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["randomized", "svd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_a_batch_on_the_cpu_has_the_bits_of_each_alone(dtype: torch.dtype, method: str) -> None:
    grads = gradients(dtype)
    cold = find_subspaces(grads, RANK, seeds=[3, 4, 5], method=method)
    for grad, seed, found in zip(grads, (3, 4, 5), cold, strict=True):
        assert_same(found, find_subspace(grad, RANK, seed=seed, method=method))
    bases, captured = [found.basis for found in cold], [cold[0].captured, None, 2.0]  # warm, cold, too little
    warm = find_subspaces(grads, RANK, previous=bases, captured=captured, method=method)
    for grad, basis, share, found in zip(grads, bases, captured, warm, strict=True):
        assert_same(found, find_subspace(grad, RANK, previous=basis, captured=share, method=method))
    if method == "randomized":
        assert [found.cold for found in warm] == [False, True, True]


# Together ----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("together")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", [*DECAYING, *NOISE_LIKE])
def test_a_batch_captures_what_each_alone_does(name: str, dtype: torch.dtype) -> None:
    grads = gradients(dtype, (name,) * 3)
    cold = find_subspaces(grads, RANK)
    warm = find_subspaces(grads, RANK, previous=[found.basis for found in cold], captured=[0.0] * 3)
    least = NARROW_ENERGY if dtype in products.NARROW_DTYPES else SAME_ENERGY
    for grad, first, second in zip(grads, cold, warm, strict=True):
        alone = alone_on_the_cpu(grad)
        assert energy_share(grad, first.basis) >= energy_share(grad, alone.basis) - least
        assert (first.cold, second.cold) == (True, False)
        for found in (first, second):
            assert_orthonormal(found.basis)
            assert found.basis.is_contiguous()
            assert found.basis.untyped_storage().nbytes() == 4 * found.basis.numel()
            total = grad.double().square().sum()
            share = ((grad.double() @ found.basis.double()).square().sum() / total).item()
            assert share * 0.97 <= float(found.captured) <= share * (1 + 1e-3)


def alone_on_the_cpu(grad: Tensor, **arguments: Any) -> Subspace:
    """What ``find_subspace`` finds where nothing is emulated."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (krylov, search):
            patch.setattr(module, "in_batches", lambda _: False)
        patch.setattr(products, "_stays_narrow", lambda _: False)
        return find_subspace(grad, RANK, **arguments)


@pytest.mark.usefixtures("together")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_equal_arguments_give_equal_bits(dtype: torch.dtype) -> None:
    grads = gradients(dtype)
    first, second, other = (find_subspaces(grads, RANK, seeds=seeds) for seeds in ([1, 2, 3], [1, 2, 3], [1, 2, 4]))
    for one, same in zip(first, second, strict=True):
        assert_same(one, same)
    assert not torch.equal(first[2].basis, other[2].basis)


@pytest.mark.usefixtures("together")
def test_equal_seeds_are_drawn_once(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []
    draw = krylov._drawn

    def spied(rows: int, source: torch.Generator) -> tuple[Tensor, Tensor]:
        drawn.append(source.initial_seed())
        return draw(rows, source)

    monkeypatch.setattr(krylov, "_drawn", spied)
    first, _, third = find_subspaces(gradients(names=("1/i",)) * 3, RANK, seeds=[7, 8, 7])
    assert drawn == [7, 8]
    assert_same(first, third)


VIEWS: list[Callable[[Tensor], Tensor]] = [
    lambda grad: grad,
    lambda grad: grad.T.contiguous().T,
    lambda grad: torch.cat([grad, grad], dim=1)[:, : grad.shape[1]],
    lambda grad: grad.repeat_interleave(2, dim=1)[:, ::2],
]


@pytest.mark.usefixtures("together")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_each_may_have_strides_of_its_own(dtype: torch.dtype) -> None:
    (grad,) = gradients(dtype, ("1/i",))
    views = [view(grad) for view in VIEWS]
    assert len({view.stride() for view in views}) == len(VIEWS)
    plain, *others = find_subspaces(views, RANK)
    for other in others:
        assert abs(energy_share(grad, plain.basis) - energy_share(grad, other.basis)) <= SAME_ENERGY


@pytest.mark.usefixtures("together")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_wrong_with_some_stays_with_them(dtype: torch.dtype) -> None:
    good = gradient("1/i", *SHAPE, RANK, seed=1)
    good = good / good.abs().max()
    noise = torch.randn(SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    low_rank = gradient("rank r/3", *SHAPE, RANK, seed=2)
    whole = {
        "cold": good,
        "zero": torch.zeros(SHAPE),
        "NaN": good.clone().index_put((torch.tensor(3), torch.tensor(5)), torch.tensor(float("nan")).double()),
        "huge": good * 2.0**100,
        "tiny": good * 2.0**-100,
        "low rank": low_rank,
        "warm": good,
        "too little": noise,
    }
    grads = [grad.to(dtype) for grad in whole.values()]
    before = find_subspace(grads[0], RANK)
    captured = [before.captured if name in ("warm", "too little") else None for name in whole]
    found = find_subspaces(grads, RANK, previous=[before.basis] * len(grads), captured=captured)
    by_name = dict(zip(whole, found, strict=True))
    for name in ("zero", "NaN"):
        assert by_name[name].basis is before.basis
        assert not by_name[name].found
    assert {name for name, subspace in by_name.items() if not subspace.cold} == {"warm"}
    assert active_columns(by_name["low rank"].basis).shape[1] == RANK // 3
    for name, grad in whole.items():
        if name not in ("zero", "NaN"):
            assert_orthonormal(by_name[name].basis)
            exact = alone_on_the_cpu(grad.to(dtype))
            scaled = grad / grad.abs().max()
            assert energy_share(scaled, by_name[name].basis) >= energy_share(scaled, exact.basis) - NARROW_ENERGY
    for name in ("huge", "tiny"):  # the same but for a power of two, and in the same batch
        assert torch.equal(by_name[name].basis, by_name["cold"].basis)


@pytest.mark.usefixtures("together")
def test_a_batch_is_split_where_its_thin_tensors_are_large(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    vectors = krylov.leading_right_vectors

    def spied(matrices: products.Matrices, *args: Any) -> tuple[Tensor, Tensor]:
        sizes.append(len(matrices.items))
        return vectors(matrices, *args)

    monkeypatch.setattr(search, "leading_right_vectors", spied)
    grads = gradients() * 2
    expected = find_subspaces(grads, RANK)
    monkeypatch.setattr(search, "BATCH_BYTES", 5 * 32 * 32 * sum(SHAPE))  # columns: 24 + 8
    for whole, split in zip(expected, find_subspaces(grads, RANK), strict=True):
        torch.testing.assert_close(split.captured, whole.captured)
    assert sizes == [6, 3, 3]


# What the host reads -----------------------------------------------------------------------------------------------


@pytest.fixture
def readings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every place where a program waits for the device to tell it a value."""
    seen: list[str] = []
    for name in ("item", "tolist", "__bool__", "__int__", "__float__", "__index__", "nonzero", "cpu", "numpy"):
        original = getattr(Tensor, name)

        def spied(self: Tensor, *args: Any, name: str = name, original: Any = original, **kwargs: Any) -> Any:
            seen.append(name)
            return original(self, *args, **kwargs)

        monkeypatch.setattr(Tensor, name, spied)
    return seen


@pytest.mark.usefixtures("together")
def test_a_batch_reads_three_small_tensors_at_most(readings: list[str]) -> None:
    grads = [*gradients(), torch.zeros(SHAPE), torch.randn(SHAPE)]
    cold = find_subspaces(grads, RANK)
    assert readings == ["tolist"] * 2  # magnitudes, failures
    readings.clear()
    captured = [found.captured for found in cold]
    bases = [found.basis for found in cold]
    find_subspaces(grads, RANK, previous=bases, captured=captured)
    assert readings == ["tolist"] * 2  # magnitudes, shares
    readings.clear()
    found = find_subspaces(grads, RANK, previous=bases, captured=[2.0, *captured[1:]])
    assert readings == ["tolist"] * 3
    assert [subspace.cold for subspace in found] == [True, False, False, True, False]


# Failures ----------------------------------------------------------------------------------------------------------


def _no_factor_of(layer: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Lets every factorization of that member of a batch fail; returns what Householder QR was asked of."""
    cholesky, householder = torch.linalg.cholesky_ex, orthonormal._householder
    repaired: list[int] = []

    def failing(matrices: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        factors, info = cholesky(matrices, **kwargs)
        if matrices.ndim == 4:  # (shifts, N, k, k)
            index = layer if matrices.shape[1] > 1 else 0  # alone: asked again
            info[:, index] = 1
            factors[:, index] = torch.nan
        else:
            info[:] = 1
        return factors, info

    def counted(columns: Tensor) -> Tensor:
        repaired.append(len(columns))
        return householder(columns)

    monkeypatch.setattr(torch.linalg, "cholesky_ex", failing)
    monkeypatch.setattr(orthonormal, "_householder", counted)
    return repaired


@pytest.mark.usefixtures("together")
@pytest.mark.parametrize("start", ["cold", "warm"])
def test_a_failed_factorization_is_repaired_singly(start: str, monkeypatch: pytest.MonkeyPatch) -> None:
    grads = gradients()
    good = find_subspaces(grads, RANK)
    repaired = _no_factor_of(1, monkeypatch)
    if start == "cold":
        found = find_subspaces(grads, RANK)
        for index in (0, 2):
            assert_same(found[index], good[index])
    else:
        captured = [subspace.captured for subspace in good]
        found = find_subspaces(grads, RANK, previous=[subspace.basis for subspace in good], captured=captured)
        assert [subspace.cold for subspace in found] == [False, True, False]
    assert set(repaired) == {1}
    assert_orthonormal(found[1].basis)
    assert bool(found[1].captured.isfinite())
    assert abs(energy_share(grads[1], found[1].basis) - energy_share(grads[1], good[1].basis)) <= OTHER_SKETCH


def test_a_failed_factorization_is_repaired_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    (grad,) = gradients(names=("1/i",))
    good = find_subspace(grad, RANK)
    repaired = _no_factor_of(0, monkeypatch)
    found = find_subspace(grad, RANK)
    assert repaired
    assert_orthonormal(found.basis)
    assert abs(energy_share(grad, found.basis) - energy_share(grad, good.basis)) <= SAME_ENERGY


def test_householder_keeps_directions_and_zero_columns() -> None:
    columns = torch.randn(2, 90, 7, generator=torch.Generator().manual_seed(0))
    columns[:, :, 3] = 0.0
    found = orthonormal._householder(columns)
    torch.testing.assert_close(found, orthonormalized(columns), rtol=0, atol=1e-5)
    assert not found[:, :, 3].any()


@pytest.mark.usefixtures("together")
def test_a_decomposition_that_fails_spoils_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    grads = gradients()
    eigh = torch.linalg.eigh
    alone = [find_subspaces([grad], RANK)[0] for grad in grads]
    calls: list[int] = []

    def failing(grams: Tensor) -> Any:
        calls.append(len(grams))
        if len(grams) > 1 or len(calls) == 3:  # the batch, and the second of those that are asked singly
            raise torch.linalg.LinAlgError("did not converge")  # type: ignore[attr-defined]
        return eigh(grams)

    monkeypatch.setattr(torch.linalg, "eigh", failing)
    previous = [torch.ones(SHAPE[1], RANK) for _ in grads]
    found = find_subspaces(grads, RANK, previous=previous)
    assert calls == [3, 1, 1, 1]
    assert [subspace.found for subspace in found] == [True, False, True]
    assert found[1].basis is previous[1]
    for index in (0, 2):
        close = energy_share(grads[index], found[index].basis) - energy_share(grads[index], alone[index].basis)
        assert abs(close) <= SAME_ENERGY


# Arguments ---------------------------------------------------------------------------------------------------------

GRAD = torch.ones(6, 5)
REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"grads": [GRAD, [[1.0]]]}, TypeError, r"grads\[1\]: expected a torch.Tensor"),
    ({"grads": [GRAD, GRAD.T]}, ValueError, r"grads\[1\]: expected shape \(6, 5\), that of grads\[0\], got \(5, 6\)"),
    ({"grads": [GRAD, GRAD.double()]}, ValueError, r"expected dtype torch.float32, .* got torch.float64"),
    ({"grads": [GRAD, GRAD.to("meta")]}, ValueError, r"grads\[1\]: expected device cpu, .* got meta"),
    ({"seeds": [1]}, ValueError, "seeds: expected 2, one for each of grads, got 1"),
    ({"seeds": [1, -1]}, ValueError, "seed=-1: expected 0 <= seed"),
    ({"previous": [torch.ones(5, 2)]}, ValueError, "previous: expected 2"),
    ({"previous": [torch.ones(5, 2), torch.ones(5, 3)]}, ValueError, r"previous\[1\]: expected shape .*= \(5, 2\)"),
    ({"captured": [None, 0.5]}, ValueError, "captured: expected None without previous"),
    ({"captured": [0.5]}, ValueError, "captured: expected 2"),
    ({"rank": 0}, ValueError, "rank=0"),
    ({"method": "SVD"}, ValueError, 'did you mean "svd"'),
]


@pytest.mark.parametrize(("arguments", "error", "message"), REFUSED)
def test_refused(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        find_subspaces(**{"grads": [GRAD, GRAD], "rank": 2, **arguments})


def test_no_gradients_no_subspaces() -> None:
    assert find_subspaces([], 4) == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_cuda_agrees_with_cpu(dtype: torch.dtype) -> None:
    grads = gradients(dtype)
    for _ in range(2):  # and with itself
        found = find_subspaces([grad.cuda() for grad in grads], RANK)
        for grad, subspace in zip(grads, found, strict=True):
            assert subspace.basis.is_cuda
            assert_orthonormal(subspace.basis.cpu())
            expected = energy_share(grad, find_subspace(grad, RANK).basis)
            assert energy_share(grad, subspace.basis.cpu()) >= expected - NARROW_ENERGY
