"""Adafactor's updates: the reference's step in the subspace, between the native stages of the large matrices."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from galore_kernels import _native
from galore_kernels.backends.batch import SIDE_CODES
from galore_kernels.backends.cpu.arguments import address, found_inf, inverse_grad_scale, typed, workspace_bytes
from galore_kernels.backends.reference.adafactor import adafactor_step
from galore_kernels.backends.reference.adam import scaled_gradient
from galore_kernels.backends.single import write_back
from galore_kernels.ops.adafactor_update import AdafactorOptions, AdafactorState
from galore_kernels.ops.adam import StepOptions
from galore_kernels.ops.projection import long_short


def adafactor_update(param: Tensor, grad: Tensor, state: AdafactorState, options: AdafactorOptions) -> None:
    def write(weight: Tensor, direction: Tensor, scale: float, scalars: dict[str, Any]) -> None:
        rows = weight.shape[0] if weight.dim() > 1 else 1  # which threads share
        factor = torch.full((rows,), scale, dtype=torch.float32)
        _native.scaled_gradient_update(
            *typed(weight),
            0,
            *typed(direction),
            rows,
            weight.numel() // max(1, rows),
            SIDE_CODES["right"],
            address(factor),
            **scalars,
            rounding_seed=options.rounding_seed,
            threads=torch.get_num_threads(),
        )

    if not found_inf(options):
        _adafactor(param, None, scaled_gradient(grad.contiguous(), options), state, options, 1.0, write)


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
    if found_inf(options):
        return
    threads = torch.get_num_threads()
    workspace = _workspace(param, _rank(basis, basis_scale), side, threads)
    lowrank = _projected(param, grad, basis, long_basis, basis_scale, options, side, workspace, threads)
    if lowrank is None:
        state.skipped.add_(1)
        return
    g = scaled_gradient(lowrank, replace(options, grad_scale=None))  # the projection has divided by it
    _projected_adafactor(
        param, weight_scale, g, basis, long_basis, basis_scale, state, options, side, scale, workspace, threads
    )


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
    if found_inf(options):
        return
    threads = torch.get_num_threads()
    workspace = _workspace(param, _rank(basis, basis_scale), side, threads)
    g = scaled_gradient(lowrank_grad, options)
    _projected_adafactor(
        param, weight_scale, g, basis, long_basis, basis_scale, state, options, side, scale, workspace, threads
    )


def _projected_adafactor(
    param: Tensor,
    weight_scale: Tensor | None,
    g: Tensor,
    basis: Tensor,
    long_basis: Tensor | None,
    basis_scale: Tensor | None,
    state: AdafactorState,
    options: AdafactorOptions,
    side: str,
    scale: float,
    workspace: Tensor,
    threads: int,
) -> None:
    """Adafactor on the projected gradient, scaled and signed, then back-projection into the weight."""

    def write(weight: Tensor, direction: Tensor, scale: float, scalars: dict[str, Any]) -> None:
        wide = direction if long_basis is None else long_basis.float() @ direction
        _back_project(weight, weight_scale, wide, basis, basis_scale, side, scale, scalars, options, workspace, threads)

    _adafactor(param, weight_scale, g, state, options, scale, write)


def _adafactor(
    param: Tensor,
    weight_scale: Tensor | None,
    g: Tensor,
    state: AdafactorState,
    options: AdafactorOptions,
    scale: float,
    write: Callable[[Tensor, Tensor, float, dict[str, Any]], None],
) -> None:
    """The step of a gradient, scaled and signed, that ``write`` puts into the weight.

    ``write``: (weight, direction, step size, scalars): weight = (weight - step size * what the direction stands for)
    * (1 - scalars["weight_decay"]).
    """
    if param.numel() == 0:
        state.step.add_(1)
        return
    step = adafactor_step(g, param, weight_scale, state, options)
    if not bool(step.finite):
        state.skipped.add_(1)
        return
    weight = param.contiguous()
    size, decay = map(float, step.decayed_last(scale))
    scalars = {"lr": 1.0, "beta1": 0.0, "beta2": 0.0, "eps": 0.0, "weight_decay": 1.0 - decay, "step": int(state.step)}
    write(weight, step.direction.contiguous(), size, {**scalars, "inv_grad_scale": 1.0, "maximize": False})
    for moment, value in step.moments:
        moment.copy_(value)
    write_back(param, weight)
    state.step.add_(1)


def _projected(
    param: Tensor,
    grad: Tensor,
    basis: Tensor,
    long_basis: Tensor | None,
    basis_scale: Tensor | None,
    options: StepOptions,
    side: str,
    workspace: Tensor,
    threads: int,
) -> Tensor | None:
    """R / grad_scale in float32, or None if it is not representable."""
    rows, cols = param.shape
    rank, grad = _rank(basis, basis_scale), grad.contiguous()
    lowrank = torch.empty((long_short((rows, cols), side)[0], rank), dtype=torch.float32)
    representable = _native.project(
        *typed(grad),
        rows,
        cols,
        SIDE_CODES[side],
        *typed(basis),
        address(basis_scale),
        rank,
        address(lowrank),
        squares=0,
        inv_grad_scale=inverse_grad_scale(options),
        workspace=address(workspace),
        threads=threads,
    )
    if long_basis is not None:
        both = torch.empty((long_basis.shape[1], rank), dtype=torch.float32)
        lowrank = torch.mm(long_basis.float().T, lowrank, out=both)
        representable = _native.all_representable(*typed(lowrank), lowrank.numel(), 1.0, threads)
    return lowrank if representable else None


def _rank(basis: Tensor, basis_scale: Tensor | None) -> int:
    # Two 4-bit codes share a column of the tensor.
    return basis.shape[1] if basis_scale is None else basis_scale.shape[0]


def _workspace(param: Tensor, rank: int, side: str, threads: int) -> Tensor:
    rows, cols = param.shape
    return torch.empty(workspace_bytes(rows, cols, rank, side, param.dtype, threads), dtype=torch.uint8)


def _back_project(
    weight: Tensor,
    weight_scale: Tensor | None,
    direction: Tensor,
    basis: Tensor,
    basis_scale: Tensor | None,
    side: str,
    scale: float,
    scalars: dict[str, Any],
    options: StepOptions,
    workspace: Tensor,
    threads: int,
) -> None:
    """weight = (weight - step size * scale * X) * decay, X = direction @ basis.T or its transpose."""
    rows, cols = weight.shape
    _native.back_project_update(
        *typed(weight),
        address(weight_scale),
        rows,
        cols,
        SIDE_CODES[side],
        address(direction),
        *typed(basis),
        address(basis_scale),
        _rank(basis, basis_scale),
        scale=scale,
        **scalars,
        rounding_seed=options.rounding_seed,
        workspace=address(workspace),
        threads=threads,
    )
