"""What a row on the GPU compares of a refresh: every subspace of the set, and what others would take for them.

Ours goes through all matrices of the row. The others are timed on one matrix and multiplied by the number of matrices,
which their names say: all 224 of Llama-7B's would take minutes. ``torch.linalg.svd`` is timed on the smallest, so
that what is said of it is too little for the set.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from floor import ZERO, orient
from gpu_plan import Plan
from harness import Call, Clock, Entry, Implementation, Result
from problem import Problem
from torch import Tensor

from galore_kernels.subspace import Subspace, find_subspaces

COLD, WARM = "ours: refresh, cold", "ours: refresh, warm"
#: Random numbers drawn once for all: what drawing them on the host takes is the difference.
ONE_SEED = "ours: refresh, cold, one seed"
SVD = "torch.linalg.svd, the smallest times all"
LOWRANK = "torch.svd_lowrank niter=2, one times all"
#: The part of a basis' orthonormality that the optimizer relies on.
ORTHONORMALITY = 1e-5


def oriented(problem: Problem) -> list[list[Tensor]]:
    """The gradients as (L, S), those of one shape together."""
    groups: dict[tuple[int, int], list[Tensor]] = {}
    for shape, grad in zip(problem.case.shapes, problem.grads, strict=True):
        long, short, side = orient(shape)
        groups.setdefault((long, short), []).append(grad if side == "right" else grad.T)
    return list(groups.values())


def _cold(group: Sequence[Tensor], rank: int, seeds: Sequence[int] | None = None) -> list[Subspace]:
    return find_subspaces(group, rank, seeds=range(len(group)) if seeds is None else seeds)


def _checked(found: Sequence[Subspace]) -> None:
    bases = torch.stack([subspace.basis for subspace in found])
    products = bases.mT.double() @ bases.double()
    worst = float((products - torch.eye(bases.shape[2], dtype=torch.float64, device=bases.device)).abs().max())
    if not worst <= ORTHONORMALITY:
        raise RuntimeError(f"its bases are orthonormal to {worst:.1e} only")


def searches() -> list[Entry]:
    """Our refresh of the whole row, from sketches and from the bases found before."""

    def cold(problem: Problem) -> Implementation:
        groups, rank = oriented(problem), problem.low_rank()
        for group in groups:
            _checked(_cold(group, rank))
        notes = f"{len(problem.grads)} matrices, {len(groups)} calls, bases orthonormal to {ORTHONORMALITY:g}"
        return Implementation(lambda: [_cold(group, rank) for group in groups], ZERO, None, notes=notes)

    def one_seed(problem: Problem) -> Implementation:
        groups, rank = oriented(problem), problem.low_rank()
        return Implementation(lambda: [_cold(group, rank, [0] * len(group)) for group in groups], ZERO, None)

    def warm(problem: Problem) -> Implementation:
        groups, rank = oriented(problem), problem.low_rank()
        before = [_cold(group, rank) for group in groups]

        def call() -> list[list[Subspace]]:
            return [
                find_subspaces(
                    group,
                    rank,
                    previous=[subspace.basis for subspace in known],
                    captured=[subspace.captured for subspace in known],
                    seeds=range(len(group)),
                )
                for group, known in zip(groups, before, strict=True)
            ]

        for found in call():
            _checked(found)
            if any(subspace.cold for subspace in found):
                raise RuntimeError("a warm start was followed by a cold one: it would be timed as what it is not")
        return Implementation(call, ZERO, None, notes="each from the basis found of the same gradient before")

    named = ((COLD, cold), (ONE_SEED, one_seed), (WARM, warm))
    return [Entry(name, "ours", ("galore_update",), build) for name, build in named]


@dataclass(frozen=True)
class Single:
    """Something timed by itself, a few times, and multiplied.

    Attributes:
        family: of ``harness.Entry``. build: makes one call for each sum, with the number it is multiplied by.
        rounds: samples; untimed calls before them are one if there is more than one sample, else none.
    """

    name: str
    family: str
    notes: str
    build: Callable[[Problem], list[tuple[Call, int]]]
    rounds: int

    def timed(self, problem: Problem, clock: Clock) -> Result:
        """Its samples, or why there are none."""
        result = Result(self.name, self.family, "ok", notes=self.notes)
        try:
            parts = self.build(problem)
            if self.rounds > 1:
                for call, _ in parts:
                    call()
            result.seconds = [sum(clock.seconds(call) * count for call, count in parts) for _ in range(self.rounds)]
        except Exception as error:  # out of memory, no convergence: the table says so and the others go on
            result.status, result.reason = "failed", f"{type(error).__name__}: {error}"
        return result


def singles(plan: Plan) -> list[Single]:
    """The decompositions that ours replaces, and the eigenvalues within ours."""

    def lowrank(problem: Problem) -> list[tuple[Call, int]]:
        rank, parts = problem.low_rank(), []
        for group in oriented(problem):
            call = _lowrank_of(group[0], rank)
            parts.append((call, len(group)))
        return parts

    def svd(problem: Problem) -> list[tuple[Call, int]]:
        smallest = min(problem.grads, key=Tensor.numel)
        torch.linalg.svd(torch.eye(8, device=problem.device))  # loads what a first call loads
        return [(lambda: torch.linalg.svd(smallest.float(), full_matrices=False), len(problem.grads))]

    found = [
        Single(LOWRANK, "rival", "one matrix of each shape times their number", lowrank, rounds=2),
        Single(SVD, "rival", "one call, on one matrix of the smallest shape, times the number of all", svd, rounds=1),
    ]
    for count, size in plan.eigenvalues:
        name = f"torch.linalg.eigh of {count} {size}x{size}, float64"
        notes = "one call; a refresh waits for as many as it has batches"
        found.append(Single(name, "yardstick", notes, _eigenvalues_of(count, size), rounds=plan.refresh_rounds))
    return found


def _lowrank_of(grad: Tensor, rank: int) -> Call:
    return lambda: torch.svd_lowrank(grad.float(), q=rank + 8, niter=2)


def _eigenvalues_of(count: int, size: int) -> Callable[[Problem], list[tuple[Call, int]]]:
    def build(problem: Problem) -> list[tuple[Call, int]]:
        rng = torch.Generator(problem.device).manual_seed(0)
        rows = torch.randn(count, size, 2 * size, generator=rng, dtype=torch.float64, device=problem.device)
        grams = rows @ rows.mT
        return [(lambda: torch.linalg.eigh(grams), 1)]

    return build
