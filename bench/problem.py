"""One row of the benchmark: operation, matrices, tensors, and what a right step does to them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from floor import Shape, dtype_name, orient

OPERATIONS = ("galore_update", "lowrank_update", "adam8bit_update")
FULL_RANK = ("adam8bit_update",)

LR = 1e-2  # GaLore's own setting; large enough that bf16 weights of 0.02 really move
BETAS = (0.9, 0.999)
SCALE = 0.25
NEVER = 10**9  # a refresh interval that no run reaches: refreshing is measured elsewhere

#: One decoder layer of the papers' Llamas: four attention matrices, gate and up, down.
LAYERS: dict[str, tuple[Shape, ...]] = {
    "llama-60m": ((512, 512),) * 4 + ((1376, 512),) * 2 + ((512, 1376),),
    "llama-7b": ((4096, 4096),) * 4 + ((11008, 4096),) * 2 + ((4096, 11008),),
}


@dataclass(frozen=True)
class Case:
    """``shapes`` that one step updates together; ``rank`` is None for a full-rank operation."""

    operation: str
    label: str
    shapes: tuple[Shape, ...]
    rank: int | None
    dtype: torch.dtype

    @property
    def title(self) -> str:
        """How tables and pictures name the row."""
        rank = "" if self.rank is None else f" r={self.rank}"
        return f"{self.operation} {self.label}{rank} {dtype_name(self.dtype)}"


class Problem:
    """A case's tensors on a device. Implementations share gradients and bases, not weights.

    Attributes:
        grads: (m, n) in the case's dtype, N(0, 1e-2): no element is near Adam's eps.
        bases: (S, r), orthonormal columns, in the case's dtype; empty for a full-rank operation.
        lowrank_grads: (L, r) float32, ``G @ P``: what `lowrank_update` starts from.
    """

    def __init__(self, case: Case, device: torch.device) -> None:
        self.case, self.device = case, device
        self.operation, self.rank = case.operation, case.rank
        generator = torch.Generator().manual_seed(2)
        self._initial = [torch.randn(s, generator=generator).mul_(0.02).to(device, case.dtype) for s in case.shapes]
        self.grads = [torch.randn(s, generator=generator).mul_(1e-2).to(device, case.dtype) for s in case.shapes]
        self.bases: list[torch.Tensor] = []
        self.lowrank_grads: list[torch.Tensor] = []
        if case.rank is None:
            return
        for shape, grad in zip(case.shapes, self.grads, strict=True):
            _, short, side = orient(shape)
            q = torch.linalg.qr(torch.randn(short, case.rank, generator=generator))[0]
            basis = q.contiguous().to(device, case.dtype)
            oriented = grad if side == "right" else grad.T
            self.bases.append(basis)
            self.lowrank_grads.append((oriented @ basis).float().contiguous())

    def low_rank(self) -> int:
        """The rank; ValueError in a full-rank row."""
        if self.rank is None:
            raise ValueError(f"{self.case.title}: a full-rank operation has no rank")
        return self.rank

    def weights(self) -> list[torch.Tensor]:
        """Fresh copies of the starting weights, one set for each implementation."""
        return [w.clone() for w in self._initial]

    def expected_change(self, shape: Shape, rank: int | None) -> tuple[float, float]:
        """(Frobenius norm of one step's change, cosine between the change and -G), from first principles.

        Under a constant gradient Adam's bias-corrected update is the gradient's sign at every step, so the
        change is lr in every element (full rank) or ``lr * scale * sign(R) @ P.T`` (low rank), and for normal
        numbers the cosine between x and sign(x) is sqrt(2 / pi).
        """
        numel, aligned = shape[0] * shape[1], math.sqrt(2 / math.pi)
        if rank is None:
            return LR * math.sqrt(numel), aligned
        long, short, _ = orient(shape)
        return LR * SCALE * math.sqrt(long * rank), aligned * math.sqrt(rank / short)


def check_movement(
    problem: Problem,
    rank: int | None,
    before: Sequence[torch.Tensor],
    after: Sequence[torch.Tensor],
    steps: int,
) -> str | None:
    """Why the weights' movement over ``steps`` steps is implausible for that rank, or None.

    The bounds are wide (half to twice the expected length, half the expected cosine): implementations differ
    in eps and in how they round their state, and an optimizer that finds its own basis captures more than a
    random one does. What must not pass: doing nothing, moving some tensors only, climbing, other step sizes.
    """
    for index, (old, new) in enumerate(zip(before, after, strict=True)):
        shape = problem.case.shapes[index]
        change = new.detach().float() - old.float()
        length = float(change.norm())
        norm, aligned = problem.expected_change(shape, rank)
        where = f"matrix {index} ({shape[0]} x {shape[1]})"
        if length == 0.0:
            return f"does nothing: {where} did not change in {steps} steps"
        if not 0.5 <= length / (steps * norm) <= 2.0:
            return f"{where} moved {length / (steps * norm):.3g} times as far as Adam does in {steps} steps"
        grad = problem.grads[index].float()
        cosine = -float((change * grad).sum()) / (length * float(grad.norm()))
        if cosine < 0.5 * aligned:
            return f"{where} moved the wrong way: cosine to -gradient {cosine:.3g}, expected {aligned:.3g}"
    return None
