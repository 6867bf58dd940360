"""``FactoredLinear``: a linear layer whose weight's gradient is computed in a subspace, from its factors."""

from __future__ import annotations

from collections.abc import Callable
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
        return nn.functional.linear(inputs, weight, bias)

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
        if not (torch.is_grad_enabled() and self.lowrank.requires_grad):
            return super().forward(input)
        rows, gradient = input, self.gradient
        if torch.is_autocast_enabled(input.device.type):
            rows = input.to(torch.get_autocast_dtype(input.device.type))
        # A compiled graph would be another for each set of layers that keep their inputs: it may not even ask.
        projects = not torch.compiler.is_compiling() and gradient.projects
        with torch.no_grad():
            saved = gradient.projected(rows) if projects else rows.detach()
        return _Linear.apply(rows, saved, self.weight, self.bias, self.lowrank, gradient.key, projects)

    def extra_repr(self) -> str:
        """Also side and rank."""
        return f"{super().extra_repr()}, side={self.gradient.side}, rank={self.gradient.rank}"

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if not self.gradient.is_bound:  # as a tied layer's is
            self.gradient.bind(self)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FactoredLinear:
        carrier = self.lowrank
        super()._apply(fn, recurse)
        if self.lowrank is not carrier:  # from the meta device parameters move as new ones
            self.gradient.bind(self)
        return self

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
        if self.lowrank.device != self.weight.device:  # with assign=True
            self.lowrank = nn.Parameter(torch.zeros_like(self.lowrank, device=self.weight.device))
            self.gradient.bind(self)
