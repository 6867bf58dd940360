"""What a rule has to tell the optimizer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from galore_kernels.ops.adafactor_update import AdafactorState
from galore_kernels.ops.adam import AdamState
from galore_kernels.optim.options import COMMON, check_lr

if TYPE_CHECKING:
    from galore_kernels.optim.state import Layout

#: Of a tensor of the state: its shape and dtype.
Spec = tuple[tuple[int, ...], torch.dtype]


class Rule(ABC):
    """How an optimizer turns gradients into updates. It holds no state of its own.

    Attributes:
        own_keys: of a parameter group, beside those all optimizers have.
        structural: those among them that decide what the state consists of.
        moment_names: the state's entries that ``moments_on_refresh="reset"`` sets back.
        takes_lowrank: whether the projected gradient is all it needs of one.
        takes_shards: whether it needs no more than some rows of a gradient to update these.
        served_by: the operation whose backend is the optimizer's.
        full_rank: the operation for everything else; "reference" has it if that backend hasn't.
    """

    own_keys: tuple[str, ...]
    structural: tuple[str, ...] = ()
    moment_names: tuple[str, ...]
    takes_lowrank = True
    takes_shards = False
    served_by = "galore_update"
    full_rank = "adam8bit_update"

    @property
    def keys(self) -> tuple[str, ...]:
        """All keys of a parameter group."""
        return (*COMMON, *self.own_keys)

    @abstractmethod
    def check(self, group: Mapping[str, Any], where: str) -> None:
        """Raises ValueError, naming key and group, unless the values of ``own_keys`` are possible."""

    def check_lr(self, group: Mapping[str, Any], where: str) -> None:
        """The part of ``check`` that sees the learning rate, which is new in every step."""
        check_lr(group, where)

    def draws(self, group: Mapping[str, Any]) -> bool:
        """Whether the group's bases are drawn from a seed instead of found in gradients."""
        return False

    def has_first_moment(self, group: Mapping[str, Any]) -> bool:
        """Whether the group's tensors keep one."""
        return True

    @abstractmethod
    def is_eight_bit(self, elements: int) -> bool:
        """Whether moments of so many elements are kept in 8 bits."""

    @abstractmethod
    def moments(self, layout: Layout) -> dict[str, Spec]:
        """The moments, by their names in the state."""

    @abstractmethod
    def new_tensors(self, layout: Layout, device: torch.device) -> dict[str, Any]:
        """The rule's part of the state before the first step."""

    @abstractmethod
    def scalars(self, group: Mapping[str, Any], lr: Tensor, unscaling: Mapping[str, Any]) -> Any:
        """The options of the operation that a group's tensors share; with a field ``rounding_seed``.

        Args:
            lr: the group's, 0 where it is None.
            unscaling: ``grad_scale`` and ``found_inf``.
        """

    @abstractmethod
    def update(
        self,
        weight: Tensor,
        grad: Tensor,
        state: Mapping[str, Any],
        options: Any,
        group: Mapping[str, Any],
        layout: Layout,
        *,
        is_lowrank: bool,
        weight_scale: Tensor | None,
        backend: str,
    ) -> None:
        """Updates a weight and its state, all or nothing; counts a step in ``state["step"]``, or in ``["skipped"]``.

        Args:
            weight, grad: of any shape at full rank, else a matrix each.
            is_lowrank: ``grad`` is the projected gradient.
            weight_scale: of an int8 weight.
        """

    @abstractmethod
    def operation(self, layout: Layout, *, is_lowrank: bool) -> str:
        """The operation that updates a weight, or many in one call where the backend has groups of it."""

    @abstractmethod
    def tensors(self, state: Mapping[str, Any]) -> AdamState | AdafactorState:
        """The state that the operations take."""

    def group_fields(
        self, group: Mapping[str, Any], layout: Layout, states: Sequence[Mapping[str, Any]]
    ) -> dict[str, Any]:
        """Fields of the ``UpdateGroup`` for that call which the states and options say, but for ``tensors``."""
        return {}


def projected_fields(group: Mapping[str, Any], layout: Layout, states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """``Rule.group_fields`` of updates through the bases of the states; none at full rank."""
    if layout.side is None:
        return {}
    return {
        "bases": tuple(state["basis"] for state in states),
        "side": layout.side,
        "scale": float(group["scale"]),
        "basis_scales": tuple(state["basis_scale"] for state in states if "basis_scale" in state),
    }
