"""One row of the benchmark: operation, matrices, tensors, and what a right step does to them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from floor import Shape, dtype_name, orient

OPERATIONS = (
    "galore_update",
    "lowrank_update",
    "adam8bit_update",
    "galore_adafactor_update",
    "apollo_update",
    "apollo_mini_update",
)
FULL_RANK = ("adam8bit_update",)
#: APOLLO's operations: scaling and scale, as published. Both are `galore_kernels.ops.apollo_update`.
APOLLO = {"apollo_update": ("channel", 1.0), "apollo_mini_update": ("tensor", 128.0)}
MINI = "apollo_mini_update"  # of rank 1 by definition
#: With a learning rate, as in GaLore's experiments: no size of the weight, no relative step. Everyone's in its row.
ADAFACTOR = "galore_adafactor_update"
ADAFACTOR_OPTIONS: dict[str, Any] = {"relative_step": False, "scale_parameter": False}

LR = 1e-2  # GaLore's own setting; large enough that bf16 weights of 0.02 really move
BETAS = (0.9, 0.999)
SCALE = 0.25
NORM_GROWTH_LIMIT = 1.01  # of everyone who takes APOLLO's step; apollo_torch has no other
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
        bases: (S, r), orthonormal columns, in the case's dtype; empty for a full-rank operation, and for APOLLO, whose
            implementations each draw their own.
        lowrank_grads: (L, r) float32, ``G @ P``: what `lowrank_update` starts from; empty where bases is.
    """

    def __init__(self, case: Case, device: torch.device) -> None:
        self.case, self.device = case, device
        self.operation, self.rank = case.operation, case.rank
        generator = torch.Generator().manual_seed(2)
        self._initial = [torch.randn(s, generator=generator).mul_(0.02).to(device, case.dtype) for s in case.shapes]
        self.grads = [torch.randn(s, generator=generator).mul_(1e-2).to(device, case.dtype) for s in case.shapes]
        self.bases: list[torch.Tensor] = []
        self.lowrank_grads: list[torch.Tensor] = []
        if case.rank is None or case.operation in APOLLO:
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

    def scaled(self, rank: int | None) -> tuple[str, float] | None:
        """APOLLO's scaling and scale where a step of that rank is APOLLO's; a full-rank one in its row is Adam's."""
        return None if rank is None else APOLLO.get(self.operation)

    def expected_change(self, shape: Shape, rank: int | None, steps: int) -> tuple[float, float]:
        """(length of the change in so many steps, cosine between the change and -G), from first principles.

        Under a constant gradient Adam's bias-corrected update is the gradient's sign at every step, so the
        change is lr in every element (full rank) or ``lr * scale * sign(R) @ P.T`` (low rank), and for normal
        numbers the cosine between x and sign(x) is sqrt(2 / pi).

        Adafactor's is R over the roots of its second moment's row and column means, of root mean square 1 too; that of
        normal numbers goes along R itself, but for a short row, of which the mean is mostly its own.

        APOLLO multiplies long index j of G by sqrt(r) / |R_j|, or all of it by sqrt(L r) / |R|, and R = G @ P has norms
        about as long as G's: a change of lr sqrt(scale r) along -G_j. That length, and not the matrix', is returned:
        |R_j|^2 is distributed as |G_j|^2 chi^2 / r with r degrees of freedom, so that at rank 1 the inverses of a few
        small ones would be all of the matrix' norm. The factor of r is the median of r / chi^2, to the power of 1/2.
        The limiter sees Adam's direction before bias correction, which grows faster than it allows.
        """
        long, short, _ = orient(shape)
        scaled = self.scaled(rank)
        if rank is not None and scaled is not None:
            scaling, scale = scaled
            median = (1 - 2 / (9 * rank)) ** -1.5 if scaling == "channel" else 1.0
            return _limited_steps(steps) * LR * median * math.sqrt(scale * rank), 1.0
        aligned = 1.0 if self.operation == ADAFACTOR else math.sqrt(2 / math.pi)
        if rank is None:
            return steps * LR * math.sqrt(long * short), aligned
        return steps * LR * SCALE * math.sqrt(long * rank), aligned * math.sqrt(rank / short)

    def movement(self, index: int, change: torch.Tensor, rank: int | None) -> tuple[float, float]:
        """Length of a change of a matrix and its cosine to -G; of an APOLLO step the medians over the long indices."""
        side = orient(self.case.shapes[index])[2]
        axis = None if self.scaled(rank) is None else 1 if side == "right" else 0
        grad = self.grads[index].float()
        lengths = torch.linalg.vector_norm(change, dim=axis)
        both = lengths * torch.linalg.vector_norm(grad, dim=axis)
        cosines = -(change * grad).sum(dim=axis) / both.clamp_min(torch.finfo(torch.float32).tiny)
        return float(lengths.median()), float(cosines.median())


def _limited_steps(steps: int) -> float:
    """As how many unlimited steps so many count under a constant gradient: 2.4 of 3.

    Before bias correction Adam's direction is (1 - beta1^t) / sqrt(1 - beta2^t) in every element: it grows by a third
    from the first step to the second, where the limit allows a hundredth.
    """
    limited, total = math.inf, 0.0
    for step in range(1, steps + 1):
        direction = (1 - BETAS[0] ** step) / math.sqrt(1 - BETAS[1] ** step)
        limited = min(direction, NORM_GROWTH_LIMIT * limited)
        total += limited / direction
    return total


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
        expected, aligned = problem.expected_change(shape, rank, steps)
        length, cosine = problem.movement(index, change, rank)
        where = f"matrix {index} ({shape[0]} x {shape[1]})"
        if not change.any():
            return f"does nothing: {where} did not change in {steps} steps"
        if not 0.5 <= length / expected <= 2.0:
            return f"{where} moved {length / expected:.3g} times as far as a right step does in {steps} steps"
        if cosine < 0.5 * aligned:
            return f"{where} moved the wrong way: cosine to -gradient {cosine:.3g}, expected {aligned:.3g}"
    return None
