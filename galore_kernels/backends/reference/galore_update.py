"""The GaLore step in plain PyTorch. Contracts: ``galore_kernels.ops.galore_update`` and ``.lowrank_update``."""

from __future__ import annotations

import torch
from torch import Tensor

from galore_kernels.backends.reference import adam
from galore_kernels.backends.reference.rounding import random_bits16, rounded
from galore_kernels.ops.adam import AdamOptions, AdamState
from galore_kernels.quantizers import basis_codes, dequantize_weight, requantize_weight


def project(grad: Tensor, basis: Tensor, long_basis: Tensor | None, basis_scale: Tensor | None, side: str) -> Tensor:
    """The projected gradient R, (L, r) float32, or (r_long, r) with ``long_basis``."""
    oriented = grad if side == "right" else grad.T
    if basis_scale is not None:
        return (oriented.float() @ basis_codes(basis, len(basis_scale))) * basis_scale
    lowrank = oriented.float() @ basis.float()
    return lowrank if long_basis is None else long_basis.float().T @ lowrank


def back_project(
    direction: Tensor,
    basis: Tensor,
    long_basis: Tensor | None,
    basis_scale: Tensor | None,
    side: str,
    weight_dtype: torch.dtype,
) -> Tensor:
    """The (m, n) float32 change of the weight that the low-rank ``direction`` stands for."""
    if basis_scale is None:
        lowrank = direction if long_basis is None else long_basis.float() @ direction
        factor, dtype = basis.float(), basis.dtype
    else:
        lowrank = direction * basis_scale
        factor = basis_codes(basis, len(basis_scale))
        dtype = torch.bfloat16 if weight_dtype == torch.int8 else weight_dtype
    full = lowrank.to(dtype).float() @ factor.T
    return full if side == "right" else full.T


def lowrank_update(
    param: Tensor,
    lowrank_grad: Tensor,
    basis: Tensor,
    long_basis: Tensor | None,
    basis_scale: Tensor | None,
    state: AdamState,
    options: AdamOptions,
    side: str,
    scale: float,
    weight_scale: Tensor | None = None,
) -> None:
    g = adam.scaled_gradient(lowrank_grad, options)
    if adam.skips(g, state, options):
        return
    step = int(state.step) + 1
    m, v = adam.adam_moments(g, state, options)
    change = back_project(adam.adam_direction(m, v, options), basis, long_basis, basis_scale, side, param.dtype)
    old = param if weight_scale is None else dequantize_weight(param, weight_scale, torch.float32)
    weight = adam.updated_weight(old, change, adam.step_size(options, step) * scale, options)
    adam.commit(written_weight(param, weight_scale, weight, options.rounding_seed, step), m, v, state)


def written_weight(
    param: Tensor, weight_scale: Tensor | None, weight: Tensor, rounding_seed: int | None, step: int | Tensor
) -> list[tuple[Tensor, Tensor]]:
    """(tensor, what it becomes) of the weight, or of its codes and scales."""
    if weight_scale is None or rounding_seed is None:
        return [(param, rounded(weight, param.dtype, rounding_seed, step))]
    random16 = random_bits16(rounding_seed, step, weight.numel(), weight.device).view_as(weight)
    codes, new_scale = requantize_weight(weight, weight_scale, random16)
    return [(param, codes), (weight_scale, new_scale)]


def galore_update(
    param: Tensor,
    grad: Tensor,
    basis: Tensor,
    long_basis: Tensor | None,
    basis_scale: Tensor | None,
    state: AdamState,
    options: AdamOptions,
    side: str,
    scale: float,
    weight_scale: Tensor | None = None,
) -> None:
    lowrank = project(grad, basis, long_basis, basis_scale, side)
    lowrank_update(param, lowrank, basis, long_basis, basis_scale, state, options, side, scale, weight_scale)
