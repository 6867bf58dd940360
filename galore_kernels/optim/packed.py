"""Gradients that their processes have projected before they averaged them: see ``galore_kernels.distributed``.

The projection lies in the first elements of ``param.grad``, behind it zeros.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor


class PackedGradients:
    """The parameters of an optimizer whose gradients are packed, with the shapes of their projections."""

    def __init__(self) -> None:
        self._packed: dict[int, tuple[Tensor, tuple[int, ...]]] = {}

    def __contains__(self, param: Tensor) -> bool:
        return id(param) in self._packed

    def gradients(self) -> list[Tensor]:
        """Those that are still there."""
        return [param.grad for param, _ in self._packed.values() if param.grad is not None]

    def add(self, param: Tensor, shape: tuple[int, ...]) -> None:
        """The gradient that ``param`` has, or is about to have, is packed."""
        self._packed[id(param)] = param, shape

    def clear(self) -> None:
        """The gradients are gone."""
        self._packed = {}

    def seen(self, params: Sequence[Tensor], grads: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        """``grads`` of ``params``, but the projections of packed ones."""
        if not self._packed:
            return grads
        return [
            grad if grad is None or param not in self else projection(grad, self._packed[id(param)][1])
            for param, grad in zip(params, grads, strict=True)
        ]


def projection(grad: Tensor, shape: tuple[int, ...]) -> Tensor:
    """What a packed gradient holds."""
    return grad.view(-1)[: math.prod(shape)].view(shape)
