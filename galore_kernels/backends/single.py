"""The operations on one tensor, as updates of groups of one: what every backend that takes groups does with them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import partialmethod
from typing import Any

from torch import Tensor

from galore_kernels.ops.adafactor_update import AdafactorState
from galore_kernels.ops.adam import AdamOptions, AdamState, StepOptions
from galore_kernels.ops.apollo_update import ApolloOptions
from galore_kernels.ops.group import UpdateGroup
from galore_kernels.ops.random_basis import RandomBasis


class SingleUpdates(ABC):
    """``galore_kernels.ops``' updates. Weights that are not contiguous are updated in a copy and written back."""

    @abstractmethod
    def update(self, group: UpdateGroup, grad: Tensor, options: Any, long_basis: Tensor | None = None) -> None:
        """Updates the one tensor of ``group``.

        Args:
            grad: contiguous.
            options: the operation's.
            long_basis: of a matrix both of whose sides are projected, which no larger group has.
        """

    def _run(
        self, group: UpdateGroup, param: Tensor, grad: Tensor, options: Any, long_basis: Tensor | None = None
    ) -> None:
        try:
            self.update(group, grad.contiguous(), options, long_basis)
        finally:  # an interrupt may come when the update is done
            write_back(param, group.params[0])

    def _at_full_rank(
        self, operation: str, param: Tensor, grad: Tensor, state: AdamState | AdafactorState, options: StepOptions
    ) -> None:
        """Contract: ``galore_kernels.ops``' of that name."""
        weight = param.contiguous()
        group = UpdateGroup(operation, (weight,), (state,), rounding_seeds=seeds(options))
        self._run(group, param, grad, options)

    def _through_subspace(
        self,
        operation: str,
        param: Tensor,
        grad: Tensor,
        basis: Tensor,
        long_basis: Tensor | None,
        basis_scale: Tensor | None,
        state: AdamState | AdafactorState,
        options: StepOptions,
        side: str,
        scale: float,
        weight_scale: Tensor | None = None,
    ) -> None:
        """Contract: ``galore_kernels.ops``' of that name."""
        weight = param.contiguous()
        group = UpdateGroup(
            operation,
            (weight,),
            (state,),
            (basis,),
            side,
            scale,
            rounding_seeds=seeds(options),
            basis_scales=scales(basis_scale),
            weight_scales=scales(weight_scale),
        )
        self._run(group, param, grad, options, long_basis)

    adam8bit_update = partialmethod(_at_full_rank, "adam8bit_update")
    galore_update = partialmethod(_through_subspace, "galore_update")
    lowrank_update = partialmethod(_through_subspace, "lowrank_update")

    def apollo_update(
        self,
        param: Tensor,
        grad: Tensor,
        basis: Tensor | RandomBasis,
        state: AdamState,
        scaled_norm: Tensor,
        options: AdamOptions,
        apollo: ApolloOptions,
        side: str,
        weight_scale: Tensor | None = None,
    ) -> None:
        """Contract: ``galore_kernels.ops.apollo_update``."""
        weight = param.contiguous()
        group = UpdateGroup(
            "apollo_update",
            (weight,),
            (state,),
            (basis,),
            side,
            rounding_seeds=seeds(options),
            weight_scales=scales(weight_scale),
            scaled_norms=(scaled_norm,),
            apollo=apollo,
        )
        self._run(group, param, grad, options)


def seeds(options: StepOptions) -> tuple[int, ...] | None:
    """``UpdateGroup.rounding_seeds`` of one tensor."""
    return None if options.rounding_seed is None else (options.rounding_seed,)


def scales(scale: Tensor | None) -> tuple[Tensor, ...]:
    """Those of one tensor, of which there may be none."""
    return () if scale is None else (scale,)


def write_back(param: Tensor, weight: Tensor) -> None:
    """Puts ``param.contiguous()``, which has been updated, back where it is a copy."""
    if weight.data_ptr() != param.data_ptr():
        param.copy_(weight)
