"""Adafactor's steps in plain PyTorch. Contracts: ``galore_kernels.ops.adafactor_update`` and its projected forms."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from galore_kernels.backends.reference.adafactor import adafactor_step, allowed, commit
from galore_kernels.backends.reference.adam import scaled_gradient
from galore_kernels.backends.reference.galore_update import back_project, project, written_weight
from galore_kernels.ops.adafactor_update import AdafactorOptions, AdafactorState
from galore_kernels.quantizers import dequantize_weight


def adafactor_update(param: Tensor, grad: Tensor, state: AdafactorState, options: AdafactorOptions) -> None:
    _update(param, None, grad, state, options, 1.0, lambda direction: direction)


def lowrank_adafactor_update(
    param: Tensor,
    lowrank_grad: Tensor,
    basis: Tensor,
    long_basis: Tensor | None,
    basis_scale: Tensor | None,
    state: AdafactorState,
    options: AdafactorOptions,
    side: str,
    scale: float,
    weight_scale: Tensor | None = None,
) -> None:
    def widened(direction: Tensor) -> Tensor:
        return back_project(direction, basis, long_basis, basis_scale, side, param.dtype)

    _update(param, weight_scale, lowrank_grad, state, options, scale, widened)


def galore_adafactor_update(
    param: Tensor,
    grad: Tensor,
    basis: Tensor,
    long_basis: Tensor | None,
    basis_scale: Tensor | None,
    state: AdafactorState,
    options: AdafactorOptions,
    side: str,
    scale: float,
    weight_scale: Tensor | None = None,
) -> None:
    lowrank = project(grad, basis, long_basis, basis_scale, side)
    lowrank_adafactor_update(param, lowrank, basis, long_basis, basis_scale, state, options, side, scale, weight_scale)


def _update(
    param: Tensor,
    weight_scale: Tensor | None,
    grad: Tensor,
    state: AdafactorState,
    options: AdafactorOptions,
    scale: float,
    widened: Callable[[Tensor], Tensor],
) -> None:
    """``widened``: what turns the gradient's direction into the weight's. Nothing is read back from a device."""
    may = allowed(options, param.device)
    if param.numel() == 0:
        state.step.add_(may)
        return
    step = adafactor_step(scaled_gradient(grad, options), param, weight_scale, state, options)
    old = param.float() if weight_scale is None else dequantize_weight(param, weight_scale, torch.float32)
    change = widened(step.direction) * (step.coefficient * scale).float()
    weight = old * step.decay.float() - change
    written = written_weight(param, weight_scale, weight, options.rounding_seed, state.step.long() + 1)
    commit([*written, *step.moments], state, may & step.finite, may & ~step.finite)
