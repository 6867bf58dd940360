"""The GaLore step in plain PyTorch. Contracts: ``galore_kernels.ops.galore_update`` and ``.lowrank_update``."""

from __future__ import annotations

import torch
from torch import Tensor

from galore_kernels.backends.reference import adam
from galore_kernels.backends.reference.rounding import rounded
from galore_kernels.ops.adam import AdamOptions, AdamState


def project(grad: Tensor, basis: Tensor, long_basis: Tensor | None, side: str) -> Tensor:
    """The projected gradient R, (L, r) float32, or (r_long, r) with ``long_basis``."""
    oriented = grad if side == "right" else grad.T
    lowrank = oriented.float() @ basis.float()
    return lowrank if long_basis is None else long_basis.float().T @ lowrank


def back_project(direction: Tensor, basis: Tensor, long_basis: Tensor | None, side: str) -> Tensor:
    """The (m, n) float32 change of the weight that the low-rank ``direction`` stands for."""
    lowrank = direction if long_basis is None else long_basis.float() @ direction
    if basis.dtype != torch.float32:
        lowrank = lowrank.to(basis.dtype).float()
    full = lowrank @ basis.float().T
    return full if side == "right" else full.T


def lowrank_update(
    param: Tensor,
    lowrank_grad: Tensor,
    basis: Tensor,
    long_basis: Tensor | None,
    state: AdamState,
    options: AdamOptions,
    side: str,
    scale: float,
) -> None:
    g = adam.scaled_gradient(lowrank_grad, options)
    if adam.skips(g, state, options):
        return
    step = int(state.step) + 1
    m, v = adam.adam_moments(g, state, options)
    change = back_project(adam.adam_direction(m, v, options), basis, long_basis, side)
    weight = adam.updated_weight(param, change, adam.step_size(options, step) * scale, options)
    adam.commit(param, rounded(weight, param.dtype, options.rounding_seed, step), m, v, state)


def galore_update(
    param: Tensor,
    grad: Tensor,
    basis: Tensor,
    long_basis: Tensor | None,
    state: AdamState,
    options: AdamOptions,
    side: str,
    scale: float,
) -> None:
    lowrank = project(grad, basis, long_basis, side)
    lowrank_update(param, lowrank, basis, long_basis, state, options, side, scale)
