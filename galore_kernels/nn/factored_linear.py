"""``FactoredLinear``: a linear layer whose weight's gradient is computed in a subspace, from its factors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from galore_kernels.nn.lowrank_gradient import LowRankGradient

#: The name of the carrier among the layer's parameters; see ``LowRankGradient``.
CARRIER = "lowrank"


class _Linear(torch.autograd.Function):
    """Y = X @ W.T + b, whose backward pass gives the carrier R instead of giving W a gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        inputs: Tensor,
        saved: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        carrier: Tensor,
        key: int,
        is_projected: bool,
    ) -> Tensor:
        ctx.save_for_backward(saved, weight)
        ctx.key, ctx.is_projected = key, is_projected
        bias = None if bias is None else bias.to(inputs.dtype)
        return nn.functional.linear(inputs, weight.to(inputs.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        saved, weight = ctx.saved_tensors
        needs_inputs, _, _, needs_bias, needs_carrier, _, _ = ctx.needs_input_grad
        grad_inputs = grad_bias = grad_carrier = None
        rows = grad_output.reshape(-1, grad_output.shape[-1])
        if needs_carrier:
            grad_carrier = torch.ops.galore_kernels_nn.lowrank_gradient(
                rows, saved.reshape(-1, saved.shape[-1]), ctx.key, ctx.is_projected
            )
        if needs_bias:
            grad_bias = rows.sum(0)
        if needs_inputs:
            grad_inputs = grad_output @ weight.to(grad_output.dtype)
        return grad_inputs, None, None, grad_bias, grad_carrier, None, None


class FactoredLinear(nn.Linear):
    """A prepared ``nn.Linear``: its weight has no gradient, its parameter ``lowrank`` (L, r) has R as its gradient.

    Made by ``galore_kernels.prepare``, which turns a layer into one in place. ``state_dict`` has the keys and shapes of
    the plain layer's.

    Attributes:
        gradient: the basis, and what a refresh needs.
    """

    gradient: LowRankGradient
    lowrank: nn.Parameter

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - nn.Linear's name
        """As ``nn.Linear``'s."""
        rows = input
        if torch.is_autocast_enabled(input.device.type):
            rows = input.to(torch.get_autocast_dtype(input.device.type))
        if not (torch.is_grad_enabled() and self.lowrank.requires_grad):
            bias = None if self.bias is None else self.bias.to(rows.dtype)
            return nn.functional.linear(rows, self.weight.to(rows.dtype), bias)
        gradient = self.gradient
        # A compiled graph would be another for each set of layers that keep their inputs.
        projects = (
            gradient.side == "right"
            and gradient.basis is not None
            and not gradient.keeps_factors
            and not torch.compiler.is_compiling()
        )
        with torch.no_grad():
            saved = gradient.projected(rows) if projects else rows.detach()
        return _Linear.apply(rows, saved, self.weight, self.bias, self.lowrank, gradient.key, projects)

    def extra_repr(self) -> str:
        """Also side and rank."""
        return f"{super().extra_repr()}, side={self.gradient.side}, rank={self.gradient.rank}"

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.gradient.bind(self)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        del destination[prefix + CARRIER]

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        missing_keys[:] = [key for key in missing_keys if key != prefix + CARRIER]
