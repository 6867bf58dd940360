"""One parameter's part of a step: what it updates, and the refresh of its subspace."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from galore_kernels.optim.options import matrix_shape
from galore_kernels.optim.state import Layout
from galore_kernels.subspace import refresh_basis


@dataclass(frozen=True)
class Update:
    """A parameter to be updated, checked before anything changes.

    Attributes:
        param, grad: the parameter and its gradient, of one shape.
        group: the parameter group's options.
        index: over all groups, the same after a resume: it goes into the seeds.
        name: for messages.
        layout: of the state.
    """

    param: Tensor
    grad: Tensor
    group: Mapping[str, Any]
    index: int
    name: str
    layout: Layout

    def rounding_seed(self) -> int | None:
        """Seed for stochastic rounding, or None for rounding to nearest."""
        if not self.group["stochastic_rounding"] or self.param.dtype != torch.bfloat16:
            return None
        return derived_seed(self.group["seed"], self.index, "rounding")


def derived_seed(*parts: object) -> int:
    """A 63-bit seed from the optimizer's seed and what it is for: the same in every process and after a resume."""
    text = ":".join(map(str, parts))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def refreshed(update: Update, state: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of ``state`` that a refresh of the subspace changes; empty if none is due. Changes nothing.

    Due at the steps 0, T, 2T, ..., counted before the increment, and until a first basis has been found: a gradient
    that is zero or not finite has none, and the previous basis is kept.
    """
    refreshes = state["refreshes"]
    if update.layout.rank is None or (int(state["step"]) % update.group["update_proj_gap"] and refreshes):
        return {}
    gradient = update.grad.reshape(matrix_shape(update.param.shape))
    oriented = gradient if update.layout.side == "right" else gradient.T
    matrices = {"basis": oriented, "long_basis": oriented.T}
    changed: dict[str, Any] = {}
    for name in update.layout.bases:
        basis = refresh_basis(
            matrices[name],
            update.layout.rank,
            previous=state[name],
            seed=derived_seed(update.group["seed"], update.index, name, refreshes),
            method=update.group["refresh_method"],
        )
        if basis is state[name]:
            return {}
        changed[name] = basis.to(update.param.dtype)
    return {**changed, "refreshes": refreshes + 1}
