"""Searches in factors of a gradient: they find what they would find in the gradient, which is never formed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from test_subspace_quality import assert_orthonormal
from thread_groups import in_threads
from tolerances import U32
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from galore_kernels.subspace import Factors, Subspace, find_subspaces
from galore_kernels.subspace import factors as factors_module

L, S, RANK = 96, 64, 8

#: Tokens of a search.
TOKENS = [
    1,  # of a gradient of rank 1
    5,  # fewer than the rank
    40,  # fewer than min(L, S): the exact decomposition is that of a (T, T) matrix, the norm that of Gram matrices
    64,  # min(L, S), from which it is that of the gradient
    300,  # the norm is summed in panels of the gradient
]


class Formed(TorchDispatchMode):
    """Notes the shapes of all tensors that operations return."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(
        self, func: Any, types: Sequence[Any], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        self.shapes |= {
            tuple(x.shape) for x in (out if isinstance(out, (tuple, list)) else [out]) if hasattr(x, "shape")
        }
        return out


def pair(tokens: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """dY and X whose product has a spectrum that falls by 0.6 and more: its vectors are well separated."""
    rng = torch.Generator().manual_seed(seed)
    decay = 0.6 ** torch.arange(12.0)
    left = (torch.randn(tokens, 12, generator=rng) * decay) @ torch.randn(12, L, generator=rng)
    right = torch.randn(tokens, 12, generator=rng) @ torch.randn(12, S, generator=rng)
    return left.to(dtype), right.to(dtype)


def dense(pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    return sum((left.double().T @ right.double() for left, right in pairs), torch.zeros(L, S, dtype=torch.float64))


def find(gradient: Factors | Tensor, **options: Any) -> Subspace:
    return find_subspaces([gradient], RANK, **options)[0]


def energy(gradient: Tensor, basis: Tensor) -> float:
    return float((gradient @ basis.double()).square().sum() / gradient.square().sum())


#: What a basis captures is an extremum: a basis that errs by e captures less by e^2. Rounding of norm and sketch alone.
SAME_SHARE = 1e-5


@pytest.mark.parametrize("method", ["randomized", "svd"])
@pytest.mark.parametrize("tokens", TOKENS)
def test_the_subspace_is_that_of_the_gradient(tokens: int, method: str) -> None:
    pairs = [pair(tokens)]
    found, expected = find(Factors(pairs), method=method), find(dense(pairs).float(), method=method)
    active = min(tokens, RANK)
    assert found.found
    assert int((found.basis != 0).any(dim=0).sum()) == active
    assert_orthonormal(found.basis[:, :active])
    overlap = (found.basis.T @ expected.basis).square().sum() / active
    assert float(overlap) == pytest.approx(1.0, abs=1e-4)
    assert float(found.captured) == pytest.approx(energy(dense(pairs), found.basis), abs=SAME_SHARE)
    assert float(found.captured) == pytest.approx(float(expected.captured), abs=SAME_SHARE)


@pytest.mark.parametrize("side", ["right", "left"])
def test_several_micro_batches_are_one_gradient_and_the_transposed_is_the_other_side(side: str) -> None:
    pairs = [pair(20, seed) for seed in range(3)]
    factors, gradient = Factors(pairs), dense(pairs).float()
    if side == "left":
        factors, gradient = factors.T, gradient.T
    assert factors.shape == gradient.shape
    found, expected = find(factors, method="svd"), find(gradient, method="svd")
    # Singular vectors and their signs: these gaps are wide.
    assert float((found.basis - expected.basis).abs().max()) < 1e-4
    one = find(Factors(pairs[:1]) if side == "right" else Factors(pairs[:1]).T, method="svd")
    assert float((one.basis - expected.basis).abs().max()) > 1e-2


def test_a_warm_start_begins_with_the_basis_before() -> None:
    factors = Factors([pair(300)])
    cold = find(factors)
    warm = find(factors, previous=[cold.basis], captured=[cold.captured])
    assert cold.cold
    assert not warm.cold
    assert float(warm.captured) == pytest.approx(float(cold.captured), abs=SAME_SHARE)
    other = find(Factors([pair(300, seed=1)]), previous=[cold.basis], captured=[1.2])
    assert other.cold  # no basis captures 0.9 of that


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_factors_are_multiplied_in_float32(dtype: torch.dtype) -> None:
    pairs = [pair(40, dtype=dtype)]
    found = find(Factors(pairs))
    best = find(dense(pairs).float(), method="svd")
    assert found.basis.dtype == torch.float32
    active = (found.basis != 0).any(dim=0)
    # Columns whose singular values the dtype's rounding makes meaningless are left out.
    assert energy(dense(pairs), found.basis) > 0.99 * energy(dense(pairs), best.basis[:, active])
    assert float(found.captured) == pytest.approx(energy(dense(pairs), found.basis), abs=SAME_SHARE)


@pytest.mark.parametrize("tokens", TOKENS)
def test_the_norm_is_the_gradients(tokens: int) -> None:
    pairs = [pair(tokens)]
    norm = float(torch.linalg.matrix_norm(dense(pairs)))
    factors = Factors(pairs)
    left, right = (float(x.abs().max()) for x in pairs[0])
    scale = 2.0 ** -(math.frexp(left)[1] + math.frexp(right)[1])
    # Sums of up to T + S products, of which each may err by u; both factors have numbers of either sign.
    assert factors.magnitude == pytest.approx(norm * scale, rel=(tokens + S) * U32 * 10)


@pytest.mark.parametrize(
    "scales",
    [
        (1e-30, 1e-25),  # whose product is zero in float32
        (1e30, 1e25),  # infinite
        (1e-43, 1.0),  # subnormal: the power of two that would bring it to 1 is infinite
        (1e38, 1e-38),
    ],
    ids=str,
)
def test_the_scale_changes_nothing(scales: tuple[float, float]) -> None:
    left, right = pair(40)
    left, right = left / left.abs().max(), right / right.abs().max()
    found = find(Factors([(left * scales[0], right * scales[1])]))
    expected = find(Factors([(left, right)]))
    # Of a subnormal at 1e-43 some six bits are left.
    assert energy(dense([(left, right)]), found.basis) > 0.999 * energy(dense([(left, right)]), expected.basis)
    assert float(found.captured) == pytest.approx(float(expected.captured), abs=1e-2 if min(scales) < 1e-40 else 1e-5)


@pytest.mark.parametrize("bad", ["zero", "nan left", "inf right", "no tokens", "cancelling"])
def test_factors_without_directions_leave_the_basis(bad: str) -> None:
    left, right = pair(10)
    pairs = [(left, right)]
    if bad == "zero":
        pairs = [(torch.zeros_like(left), right)]
    elif bad == "nan left":
        left[3, 4] = math.nan
    elif bad == "inf right":
        right[3, 4] = math.inf
    elif bad == "no tokens":
        pairs = [(left[:0], right[:0])]
    else:
        pairs = [(left.round(), right.round()), (-left.round(), right.round())]  # exact in float32
    previous = torch.eye(S)[:, :RANK].contiguous()
    found = find(Factors(pairs), previous=[previous])
    assert not found.found
    assert found.basis is previous


def test_a_micro_batch_without_tokens_adds_nothing() -> None:
    left, right = pair(10)
    alone, beside = find(Factors([(left, right)])), find(Factors([(left[:0], right[:0]), (left, right)]))
    assert torch.equal(alone.basis, beside.basis)


@pytest.mark.parametrize(
    ("tokens", "method", "forms"),
    [
        (40, "randomized", False),
        (300, "randomized", False),
        (40, "svd", False),
        (300, "svd", True),  # one at a time: the option for exactness
    ],
)
def test_the_gradient_is_formed_by_the_exact_decomposition_of_many_tokens_alone(
    tokens: int, method: str, forms: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(factors_module, "PANEL_ROWS", 32)
    factors = Factors([pair(tokens)])
    with Formed() as formed:
        find(factors, method=method)
    assert ((L, S) in formed.shapes) == forms


# ---------------------------------------------------------------------- processes


def together(shares: Sequence[Sequence[tuple[Tensor, Tensor]]], **options: Any) -> list[Subspace]:
    return in_threads(lambda rank, all_reduce: find(Factors(shares[rank], all_reduce), **options), len(shares))


@pytest.mark.parametrize("method", ["randomized", "svd"])
@pytest.mark.parametrize("counts", [(40, 40), (3, 300), (40, 0)], ids=str)  # tokens; alike, other formulas, none
def test_processes_find_the_subspace_of_the_sum(counts: tuple[int, int], method: str) -> None:
    shares = [[pair(max(count, 1), seed)] for seed, count in enumerate(counts)]
    shares = [[(x[:count], 100 * y[:count]) for x, y in own] for own, count in zip(shares, counts, strict=True)]
    everything = [one for own in shares for one in own]
    first, second = together(shares, method=method)
    assert torch.equal(first.basis, second.basis)
    assert torch.equal(first.captured, second.captured)
    expected = find(Factors(everything), method=method)
    assert float((first.basis.T @ expected.basis).square().sum()) == pytest.approx(RANK, abs=1e-3)
    # The norm is estimated, unless the gradient itself is there.
    close = SAME_SHARE if method == "svd" else 1e-3
    assert float(first.captured) == pytest.approx(energy(dense(everything), first.basis), abs=close)


def test_a_nan_of_one_process_is_everyones() -> None:
    bad = pair(5)
    bad[0][0, 0] = math.nan
    assert not any(found.found for found in together([[pair(5)], [bad]]))
