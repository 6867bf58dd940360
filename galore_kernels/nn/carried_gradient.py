"""Gradients of weights that can't have one themselves: parameters of their own carry them."""

from __future__ import annotations

import weakref
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from galore_kernels.nn.targets import stored_scale, stored_weight


class CarriedGradient:
    """What a weight has that no gradient is given to. Layers that share the weight share it.

    The parameter ``carrier`` belongs to the layer, has the gradient as its ``.grad``, and no value of its own. So
    whatever is done to gradients (accumulation, clipping, unscaling, all-reducing) is done to this one.

    Attributes:
        name: of the carrier among the layer's parameters.
        key: of an operation that computes the gradient; None where dY.T @ X is it.
        projects: whether forward passes keep a projection of X instead of X.
    """

    name: ClassVar[str]
    key: Tensor | None = None
    projects = False

    def __init__(self, layer: nn.Linear) -> None:
        self.bind(layer)

    def __getstate__(self) -> dict[str, Any]:
        # The layer of a copy binds it.
        return {**self.__dict__, "_layer": None, "_written": None}

    def bind(self, layer: nn.Linear) -> None:
        """Takes ``layer``, which holds weight and carrier, for its own."""
        self._layer: weakref.ref[nn.Linear] | None = weakref.ref(layer)
        self._written: int | None = None
        _by_carrier[self.carrier] = weakref.ref(self)
        self.carrier.register_post_accumulate_grad_hook(self._after_backward)

    def unbind(self) -> None:
        """Forgets the layer, which has a gradient of its own again: an optimizer that goes on is told so."""
        self._layer = None

    @property
    def is_bound(self) -> bool:
        """Whether it has a layer."""
        return self._layer is not None

    @property
    def layer(self) -> Any:
        """The linear layer, or one of several with this weight."""
        layer = None if self._layer is None else self._layer()
        if layer is None:
            raise RuntimeError(
                "the layer of a prepared weight is gone, or is unprepared; keep the model while its optimizer steps, "
                "and make a new optimizer after unprepare"
            )
        return layer

    @property
    def carrier(self) -> nn.Parameter:
        """The parameter that has the gradient."""
        carrier: nn.Parameter = getattr(self.layer, self.name)
        return carrier

    @property
    def weight(self) -> Tensor:
        """The weight (m, n), or its int8 codes."""
        return stored_weight(self.layer)

    @property
    def weight_scale(self) -> Tensor | None:
        """The scales of int8 codes (m, ceil(n / 256)), or None."""
        return stored_scale(self.layer)

    @property
    def stored(self) -> tuple[Tensor, ...]:
        """The weight, or its codes and their scales."""
        scale = self.weight_scale
        return (self.weight,) if scale is None else (self.weight, scale)

    def moved(self) -> None:
        """Called when the carrier may be given other memory, as models are that move or are cast."""

    def _after_backward(self, carrier: Tensor) -> None:
        if self._written is not None and carrier._version != self._written:
            raise RuntimeError(
                f"a gradient of shape {tuple(carrier.shape)}: something has written to the parameter that carries it, "
                "which has no value: give the prepared model to a galore_kernels optimizer and to no other"
            )
        self._written = carrier._version


class DenseGradient(CarriedGradient):
    """The whole gradient (m, n) of an int8 weight. The carrier takes no memory but that of its ``.grad``."""

    name = "dense"

    def __str__(self) -> str:
        return "dense gradient"

    def bind(self, layer: nn.Linear) -> None:
        """Also gives up the carrier's memory."""
        super().bind(layer)
        self.moved()

    def moved(self) -> None:
        """Gives up the carrier's memory."""
        self.carrier.data = hollow(self.carrier.data, self.carrier.shape)


def hollow(like: Tensor, shape: torch.Size) -> Tensor:
    """A tensor of this shape, a matrix', whose rows and columns overlap: it takes the memory of one of each.

    Its strides are not 0, as ``expand`` makes them: to such tensors nobody may write, as DDP does when it begins.
    """
    return like.new_zeros(sum(shape) - 1).as_strided(shape, (1, 1))


_by_carrier: Any = WeakTensorKeyDictionary()


def carried_gradient_of(param: Tensor) -> CarriedGradient | None:
    """What ``param`` carries the gradient of, if it is such a carrier."""
    if not _by_carrier.data:  # nothing is prepared
        return None
    reference = _by_carrier.get(param)
    return None if reference is None else reference()
