"""One parameter's part of a step: what it updates, and the refresh of its subspace."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from galore_kernels.optim.options import matrix_shape
from galore_kernels.optim.state import Layout
from galore_kernels.subspace import refresh_basis


@dataclass(frozen=True)
class Update:
    """A parameter to be updated, checked before anything changes.

    Attributes:
        param: the parameter, which has a gradient of its shape.
        group: the parameter group's options.
        index: over all groups, the same after a resume: it goes into the seeds.
        name: for messages.
        layout: of the state.
    """

    param: Tensor
    group: Mapping[str, Any]
    index: int
    name: str
    layout: Layout

    @property
    def grad(self) -> Tensor:
        """The gradient. It is not held: a plan lives longer than the gradients of the step it was made for."""
        return cast(Tensor, self.param.grad)

    def check(self, state: Mapping[str, Any] | None) -> None:
        """Raises ValueError naming the parameter unless gradient and state fit it."""
        param, grad, name = self.param, self.grad, self.name
        if grad.layout != torch.strided or grad.is_complex():
            raise ValueError(f"{name}: expected a dense real gradient, got {grad.layout}, {grad.dtype}; densify it")
        if not grad.is_floating_point() or grad.dtype == torch.float64:
            raise ValueError(f"{name}: expected a float32, bfloat16 or float16 gradient, got {grad.dtype}")
        if grad.is_inference():
            raise ValueError(f"{name}: its gradient was made in inference mode; run the backward pass outside of it")
        if grad.device != param.device or (state and state["exp_avg"].device != param.device):
            raise ValueError(
                f"{name}: the weight is on {param.device}, its gradient or its state is not; move the model before "
                "the first step, or load the optimizer's state_dict again after moving it"
            )
        if grad.shape != param.shape or (state and not self.layout.fits(state)):
            raise ValueError(
                f"{name}: the weight has shape {tuple(param.shape)}, its gradient {tuple(grad.shape)}, and its "
                "state was made for another shape or rank, or was cast; it was changed since the last step: make a new "
                "optimizer, or restore it"
            )

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


def take_over(state: dict[str, Any], changed: Mapping[str, Any]) -> None:
    """Puts the changed entries into ``state``: into the memory of the old ones, which a CUDA graph may read."""
    for name, value in changed.items():
        old = state[name]
        fits = isinstance(value, Tensor) and value.dtype == old.dtype and value.device == old.device
        state[name] = old.copy_(value) if fits else value
