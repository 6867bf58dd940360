"""``FactoredLinear``: a linear layer whose weight's gradient is another parameter's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from galore_kernels.nn.carried_gradient import CarriedGradient
from galore_kernels.nn.lowrank_gradient import LowRankGradient
from galore_kernels.nn.targets import stored_scale, stored_weight
from galore_kernels.quantizers import dequantize_weight, quantize_weight


class _Linear(torch.autograd.Function):
    """Y = X @ W.T + b, whose backward pass gives the carrier R, or all of G, instead of giving W a gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        inputs: Tensor,
        saved: Tensor,
        weight: Tensor,
        weight_scale: Tensor | None,
        bias: Tensor | None,
        carrier: Tensor,
        key: Tensor | None,
        is_projected: bool,
    ) -> Tensor:
        ctx.save_for_backward(saved, weight, weight_scale, key)
        ctx.carrier_shape, ctx.carrier_dtype, ctx.is_projected = carrier.shape, carrier.dtype, is_projected
        if weight_scale is not None:
            dtype = inputs.dtype if _is_autocast(inputs) else carrier.dtype
            weight = dequantize_weight(weight, weight_scale, dtype)
        return nn.functional.linear(inputs, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        saved, weight, weight_scale, key = ctx.saved_tensors
        needs_inputs, _, _, _, needs_bias, needs_carrier, _, _ = ctx.needs_input_grad
        grad_inputs = grad_bias = grad_carrier = None
        rows, saved = (tensor.reshape(-1, tensor.shape[-1]) for tensor in (grad_output, saved))
        if needs_bias:
            grad_bias = rows.sum(0)
        if needs_inputs:
            grad_inputs = grad_output @ _dense(weight, weight_scale, grad_output.dtype)
        if needs_carrier and key is None:
            grad_carrier = (rows.T @ saved).to(ctx.carrier_dtype)
        elif needs_carrier:
            grad_carrier = torch.ops.galore_kernels_nn.lowrank_gradient(
                rows,
                saved,
                key,
                list(ctx.carrier_shape),
                ctx.carrier_dtype,
                ctx.is_projected,
                torch.compiler.is_compiling(),
            )
        return grad_inputs, None, None, None, grad_bias, grad_carrier, None, None


def _is_autocast(inputs: Tensor) -> bool:
    device = inputs.device.type
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def _dense(weight: Tensor, weight_scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    return weight.to(dtype) if weight_scale is None else dequantize_weight(weight, weight_scale, dtype)


class FactoredLinear(nn.Linear):
    """A prepared ``nn.Linear``: its weight has no gradient, its parameter ``lowrank`` (L, r) has R as its gradient.

    Made by ``galore_kernels.prepare``, which turns a layer into one in place. ``state_dict`` has the keys and shapes of
    the plain layer's.

    Attributes:
        gradient: what knows the weight and the parameter that has its gradient; the basis, and what a refresh needs.
    """

    gradient: CarriedGradient
    lowrank: nn.Parameter

    @property
    def carrier(self) -> nn.Parameter:
        """The parameter that has the gradient."""
        carrier: nn.Parameter = getattr(self, self.gradient.name)
        return carrier

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - nn.Linear's name
        """As ``nn.Linear``'s."""
        weight, weight_scale = stored_weight(self), stored_scale(self)
        # Autograd would keep what an int8 weight is dequantized to.
        if not torch.is_grad_enabled() or (weight_scale is None and not self.carrier.requires_grad):
            return super().forward(input)
        rows, gradient = input, self.gradient
        if _is_autocast(input):
            rows = input.to(torch.get_autocast_dtype(input.device.type))
        # A compiled graph would be another for each set of layers that keep their inputs: it may not even ask.
        projects = not torch.compiler.is_compiling() and gradient.projects
        with torch.no_grad():
            saved = cast(LowRankGradient, gradient).projected(rows) if projects else rows.detach()
        return _Linear.apply(rows, saved, weight, weight_scale, self.bias, self.carrier, gradient.key, projects)

    def extra_repr(self) -> str:
        """Also what the gradient is."""
        return f"{super().extra_repr()}, {self.gradient}"

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if not self.gradient.is_bound:  # as a tied layer's is
            self.gradient.bind(self)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FactoredLinear:
        carrier = self.carrier
        super()._apply(fn, recurse)
        if self.carrier is not carrier:  # from the meta device parameters move as new ones
            self.gradient.bind(self)
        self.gradient.moved()
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        del destination[prefix + self.gradient.name]

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
        missing_keys[:] = [key for key in missing_keys if key != prefix + self.gradient.name]
        device = stored_weight(self).device
        if self.carrier.device != device:  # with assign=True
            setattr(self, self.gradient.name, nn.Parameter(torch.zeros_like(self.carrier, device=device)))
            self.gradient.bind(self)


class WeightCodes(nn.Parameter):
    """The codes of an int8 weight: a parameter that whoever is given all of a model's may be given."""


class Int8Linear(FactoredLinear):
    """A ``FactoredLinear`` whose weight is kept in int8, with a scale for each group of 256 elements of a row.

    Prepared with ``rank=None`` it has the parameter ``dense`` (m, n) instead of ``lowrank``: its gradient is that of a
    plain layer's weight, its value none, and it takes no memory but the gradient's.

    The weight is dequantized in the forward pass and again in the backward pass, and not kept in between. In
    ``state_dict`` it is ``weight_codes`` and ``weight_scale`` instead of ``weight``; a ``weight`` is quantized when it
    is loaded. ``plain_state_dict`` gives the weights as a plain model has them: for Transformers save them by
    ``model.save_pretrained(folder, state_dict=plain_state_dict(model))``, which else writes what no plain model loads.

    Attributes:
        weight_codes: int8 (m, n). weight_scale: float32 (m, ceil(n / 256)).
    """

    weight_codes: WeightCodes
    weight_scale: nn.Parameter
    dense: nn.Parameter

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The weight in the model's dtype: a copy, made anew each time."""
        return dequantize_weight(self.weight_codes, self.weight_scale, self.carrier.dtype)

    def quantize(self, weight: Tensor) -> None:
        """Makes ``weight`` (m, n) the layer's, rounded to nearest."""
        codes, scale = quantize_weight(weight)
        self.weight_codes = WeightCodes(codes, requires_grad=False)
        self.weight_scale = nn.Parameter(scale, requires_grad=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Int8Linear:
        # What casts a model means its weights, of which this scale is a part that stays float32.
        scale = self.weight_scale.detach()
        super()._apply(fn, recurse)
        if self.weight_scale.dtype != torch.float32:
            self.weight_scale.data = scale.to(self.weight_scale.device)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        weight = state_dict.pop(prefix + "weight", None)
        if weight is not None:
            codes, scale = quantize_weight(weight)
            state_dict[prefix + "weight_codes"], state_dict[prefix + "weight_scale"] = codes, scale
        super()._load_from_state_dict(state_dict, prefix, *args)
        if not isinstance(self.weight_codes, WeightCodes):  # with assign=True
            self.weight_codes = WeightCodes(self.weight_codes.detach(), requires_grad=False)
