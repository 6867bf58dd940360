"""Memory that the stages of an update on a device pass to one another."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from galore_kernels.backends.batch import Batch, new_control


@dataclass(frozen=True)
class Scratch:
    """What stages of one batch pass to one another. All of it is there before the first tensor changes."""

    control: Tensor
    lowrank: Tensor
    direction: Tensor

    @classmethod
    def of(cls, batch: Batch, count: int, direction_dtype: torch.dtype) -> Scratch:
        """For up to ``count`` tensors of the batch at a time."""
        lowrank = torch.empty((count, batch.moments), dtype=torch.float32, device=batch.device)
        return cls(new_control(batch)[:count], lowrank, torch.empty_like(lowrank, dtype=direction_dtype))

    def first(self, count: int) -> Scratch:
        """The part of ``count`` tensors."""
        return Scratch(self.control[:count], self.lowrank[:count], self.direction[:count])


@dataclass(frozen=True)
class ApolloScratch:
    """The same for ``apollo_update``."""

    control: Tensor
    lowrank: Tensor
    direction: Tensor
    squares: Tensor
    norms: Tensor
    factors: Tensor

    @classmethod
    def of(cls, batch: Batch, count: int) -> ApolloScratch:
        """For up to ``count`` tensors of the batch at a time."""
        lowrank = torch.empty((count, batch.moments), dtype=torch.float32, device=batch.device)
        squares = torch.empty((count, batch.long_short()[0]), dtype=torch.float32, device=batch.device)
        rows = torch.empty_like(squares), torch.empty_like(squares)
        return cls(new_control(batch)[:count], lowrank, torch.empty_like(lowrank), squares, *rows)

    def first(self, count: int) -> ApolloScratch:
        """The part of ``count`` tensors."""
        return ApolloScratch(*(getattr(self, field.name)[:count] for field in fields(self)))


class LongSide:
    """The other dimension's products, for one matrix both of whose sides are projected: L indices, k of which are left.

    They are small, and in double: float32 products would be rounded to tf32 where the user allows it. All memory is
    there before the matrix changes.
    """

    def __init__(self, batch: Batch, basis: Tensor) -> None:
        long, kept = basis.shape
        self._basis = basis.double()
        self._long, self._kept = self._basis.new_empty((long, batch.rank)), self._basis.new_empty((kept, batch.rank))
        self.projected = torch.empty((1, long * batch.rank), dtype=torch.float32, device=batch.device)
        self.direction = torch.empty_like(self.projected, dtype=batch.factor_dtype)

    def project(self, lowrank: Tensor) -> None:
        """lowrank (1, k * r) = basis.T @ ``self.projected``."""
        self._long.copy_(self.projected.view_as(self._long))
        torch.mm(self._basis.T, self._long, out=self._kept)
        lowrank.copy_(self._kept.view_as(lowrank))

    def back_project(self, direction: Tensor) -> None:
        """``self.direction`` = basis @ direction (1, k * r)."""
        self._kept.copy_(direction.view_as(self._kept))
        torch.mm(self._basis, self._kept, out=self._long)
        self.direction.copy_(self._long.view_as(self.direction))
