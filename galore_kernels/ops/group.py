"""Tensors of one shape and layout that are updated together: what lets one launch take a whole model's layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

if TYPE_CHECKING:  # which import the registry, and that this
    from galore_kernels.ops.apollo_update import ApolloOptions
    from galore_kernels.ops.random_basis import RandomBasis


#: Operations on many tensors at once: what every backend with groups takes, and what only some do.
ADAM_OPERATIONS = frozenset({"galore_update", "lowrank_update", "apollo_update", "adam8bit_update"})
ADAFACTOR_OPERATIONS = frozenset({"galore_adafactor_update", "lowrank_adafactor_update", "adafactor_update"})


@dataclass(frozen=True)
class UpdateGroup:
    """What the updates of N tensors share, and the tensors themselves. Checked by whoever makes it.

    Attributes:
        operation: one of ``ADAM_OPERATIONS``, or of ``ADAFACTOR_OPERATIONS``.
        params: N weights, contiguous, of one shape, dtype and device.
        states: ``AdamState`` of each, all with 8-bit or all with float32 moments, or ``AdafactorState``.
        bases: the basis of each, contiguous, of one shape and dtype, or of "apollo_update" what is drawn, of one rank
            and family; empty at full rank.
        side: "left" or "right"; of no meaning at full rank. scale: GaLore's alpha; 1 for the other operations.
        rounding_seeds: of each for stochastic rounding, or None for rounding to nearest.
        basis_scales: of each if the bases are quantized, else empty.
        weight_scales: of each if the weights are int8, else empty.
        scaled_norms: of each, 0-d float32, and apollo: of all; of "apollo_update" alone.
    """

    operation: str
    params: tuple[Tensor, ...]
    states: tuple[Any, ...]
    bases: tuple[Tensor | RandomBasis, ...] = ()
    side: str = "right"
    scale: float = 1.0
    rounding_seeds: tuple[int, ...] | None = None
    basis_scales: tuple[Tensor, ...] = ()
    weight_scales: tuple[Tensor, ...] = ()
    scaled_norms: tuple[Tensor, ...] = ()
    apollo: ApolloOptions | None = None


class GroupUpdate(Protocol):
    """One step of all tensors of a group. Made once, called at every step; reads nothing back from the device.

    It may know the group's tensors by their addresses: nobody moves them (``.data =``) while it is used. One that has
    been called while a CUDA graph was captured is for that graph alone.
    """

    def __call__(self, grads: Sequence[Tensor], options: Any) -> None:
        """Updates every tensor of the group.

        Raises only before the first of them has been changed, but for a kernel that can't be launched (the first step
        of its kind shows it) and for interrupts.

        Args:
            grads: the gradient of each parameter, in their order: its shape (projected: (L, r)), contiguous, all of
                one dtype. Their addresses may differ from step to step.
            options: the operation's scalars; ``rounding_seed`` is ignored, the group has one for each tensor.
        """
