"""Gradients that their processes have projected before they averaged them: see ``galore_kernels.distributed``.

The projection lies in the first elements of ``param.grad``, behind it zeros.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from galore_kernels.optim.refresh import Found


@dataclass(frozen=True)
class _Packed:
    param: Tensor
    shape: tuple[int, ...]
    found: Found | None


class PackedGradients:
    """The parameters of an optimizer whose gradients are packed, with the shapes of their projections."""

    def __init__(self) -> None:
        self._packed: dict[int, _Packed] = {}

    def __contains__(self, param: Tensor) -> bool:
        return id(param) in self._packed

    def gradients(self) -> list[Tensor]:
        """Those that are still there."""
        return [packed.param.grad for packed in self._packed.values() if packed.param.grad is not None]

    def add(self, param: Tensor, shape: tuple[int, ...], found: Found | None) -> None:
        """The gradient that ``param`` has, or is about to have, is packed.

        Args:
            found: in it, where a basis was due; the projection is to that one, or of an asynchronous refresh to the
                one before.
        """
        self._packed[id(param)] = _Packed(param, shape, found)

    def found(self, param: Tensor) -> Found | None:
        """What was found in the gradient of ``param``."""
        packed = self._packed.get(id(param))
        return None if packed is None else packed.found

    def take_over(self, param: Tensor) -> None:
        """What was found is in the state: another step with this gradient finds nothing new."""
        packed = self._packed.get(id(param))
        if packed is not None:
            self._packed[id(param)] = replace(packed, found=None)

    def clear(self) -> None:
        """The gradients are gone."""
        self._packed = {}

    def seen(self, params: Sequence[Tensor], grads: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        """``grads`` of ``params``, but the projections of packed ones."""
        if not self._packed:
            return grads
        return [
            grad if grad is None or param not in self else projection(grad, self._packed[id(param)].shape)
            for param, grad in zip(params, grads, strict=True)
        ]


def projection(grad: Tensor, shape: tuple[int, ...]) -> Tensor:
    """What a packed gradient holds."""
    return grad.view(-1)[: math.prod(shape)].view(shape)
