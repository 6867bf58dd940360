"""``random_basis``: APOLLO's basis, a function of a seed. No backend keeps it: each draws it where it is multiplied."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

from galore_kernels.ops import registry
from galore_kernels.ops.adam import fail
from galore_kernels.ops.library import define

#: Magnitudes an entry may have; eleven bits choose one, a twelfth the sign.
MAGNITUDES = 2048

FAMILIES = ("gaussian", "rademacher")


@dataclass(frozen=True)
class RandomBasis:
    """A basis of shape (S, rank) with entries of variance 1 / rank, drawn from a seed.

    Entry (s, k) is z / sqrt(rank), and z depends on the seed, s, k and ceil(rank / 8) alone: it is drawn from sixteen
    bits of ``csrc/core/philox.h`` for stream 0 and block ``s * ceil(rank / 8) + k // 8``, element ``k % 8`` there. The
    top bit is z's sign, the eleven below choose among ``magnitudes(family)``. All these are bfloat16 numbers, so z is
    the same on every backend, and exact in every dtype that is multiplied.

    Attributes:
        rank: its columns. seed: in [0, 2^63).
        family: "gaussian" (as APOLLO's, Zhu et al., arXiv 2412.05270) or "rademacher", +1 and -1.
    """

    rank: int
    seed: int
    family: str = "gaussian"


@functools.cache
def magnitudes(family: str) -> Tensor:
    """|z| by its eleven bits: float32 (2048,), each a bfloat16 number, of mean square 1.

    Gaussian: the medians of 2048 equally probable intervals of |z|, stretched by 0.04 % to have mean square 1.
    """
    if family == "rademacher":
        return torch.ones(MAGNITUDES)
    medians = [NormalDist().inv_cdf(0.5 + (i + 0.5) / (2 * MAGNITUDES)) for i in range(MAGNITUDES)]
    exact = torch.tensor(medians, dtype=torch.float64)
    return (exact / exact.square().mean().sqrt()).to(torch.bfloat16).float()


def check_random_basis(op: str, basis: RandomBasis) -> None:
    """Raises ValueError unless there is such a basis."""
    if basis.rank < 1:
        fail(op, "rank", ">= 1", basis.rank, "pass the rank of the moments")
    if not 0 <= basis.seed < 2**63:
        fail(op, "basis_seed", "in [0, 2^63)", basis.seed, "take it modulo 2^63")
    if basis.family not in FAMILIES:
        fail(op, "basis_family", f"one of {', '.join(FAMILIES)}", repr(basis.family), "choose one of them")


def random_basis(
    short: int, basis: RandomBasis, *, device: torch.device | str = "cpu", backend: str = "auto"
) -> Tensor:
    """The entries z of a random basis, times sqrt(rank): what the update multiplies, to look at and to test with.

    Args:
        short: S, the rows. basis: what to draw. device: where.
        backend: "auto" or a name from ``backend_info()``.

    Returns:
        (short, basis.rank) bfloat16. The basis is this divided by sqrt(rank).

    Raises:
        ValueError: no such basis. RuntimeError: the backend can't serve the device.
    """
    like = torch.empty(0, dtype=torch.bfloat16, device=device)
    return torch.ops.galore_kernels.random_basis(
        like, short, basis.rank, seed=basis.seed, family=basis.family, backend=backend
    )


def _check(short: int, basis: RandomBasis) -> None:
    check_random_basis("random_basis", basis)
    if short < 0:
        fail("random_basis", "short", ">= 0", short, "pass the number of rows")


def _run(like: Tensor, short: int, rank: int, *, seed: int, family: str, backend: str = "auto") -> Tensor:
    basis = RandomBasis(rank, seed, family)
    _check(short, basis)
    drawn: Tensor = registry.kernel("random_basis", backend, like.device)(short, basis, like.device)
    return drawn


def _fake(like: Tensor, short: int, rank: int, *, seed: int, family: str, backend: str = "auto") -> Tensor:
    _check(short, RandomBasis(rank, seed, family))
    return like.new_empty((short, rank))


define(
    "random_basis",
    '(Tensor like, int short, int rank, *, int seed, str family, str backend="auto") -> Tensor',
    _run,
    _fake,
)
