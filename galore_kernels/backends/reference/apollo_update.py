"""The APOLLO step in plain PyTorch. Contract: ``galore_kernels.ops.apollo_update``."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from galore_kernels.backends.reference import adam
from galore_kernels.backends.reference.galore_update import project, written_weight
from galore_kernels.backends.reference.random_basis import random_basis
from galore_kernels.ops.adam import AdamOptions, AdamState
from galore_kernels.ops.apollo_update import NORM_EPS, ApolloOptions
from galore_kernels.ops.random_basis import RandomBasis
from galore_kernels.quantizers import dequantize_weight


def gradient_factors(direction: Tensor, lowrank: Tensor, scaling: str) -> Tensor:
    """What each long index of the gradient is multiplied by, (L, 1); all the same with "tensor" scaling."""
    rows, of = direction.double().square().sum(1), lowrank.double().square().sum(1)
    if scaling == "tensor":
        rows, of = rows.sum().expand_as(rows), of.sum().expand_as(of)
    return (rows.sqrt().float() / (of.sqrt().float() + NORM_EPS)).unsqueeze(1)


def growth_limiter(norm: float, previous: float, limit: float | None) -> float:
    """What the scaled gradient is divided by, so that its norm grows by no more than ``limit``."""
    if limit is None or previous <= NORM_EPS:
        return 1.0
    return max(norm / (previous + NORM_EPS), limit) / limit


def apollo_update(
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
    oriented = grad if side == "right" else grad.T
    if isinstance(basis, RandomBasis):
        drawn = random_basis(oriented.shape[1], basis, grad.device)
        lowrank = project(grad, drawn, None, None, side) * (1.0 / math.sqrt(basis.rank))
    else:
        lowrank = project(grad, basis, None, None, side)
    full = adam.scaled_gradient(oriented, options)
    lowrank = adam.scaled_gradient(lowrank, options)
    squares = oriented.float().square().sum(1)
    # A finite number less itself is 0.
    if adam.skips(torch.cat([lowrank.flatten(), squares - squares]), state, options):
        return
    step = int(state.step) + 1
    m, v = adam.adam_moments(lowrank, state, options)
    factors = gradient_factors(adam.adam_direction(m, v, options), lowrank, apollo.scaling)
    root = math.sqrt(apollo.scale)
    norm = float((factors.double() * full.double()).norm()) * (root if apollo.scale_front else 1.0)
    limiter = growth_limiter(norm, float(scaled_norm), apollo.norm_growth_limit)
    old = param if weight_scale is None else dequantize_weight(param, weight_scale, torch.float32)
    coefficient = adam.step_size(options, step) * root / limiter
    change = full * (factors * torch.tensor(coefficient, dtype=torch.float32, device=grad.device))
    weight = adam.updated_weight(old, change if side == "right" else change.T, 1.0, options)
    writes = written_weight(param, weight_scale, weight, options.rounding_seed, step)
    adam.commit([*writes, (scaled_norm, torch.tensor(norm / limiter))], m, v, state)
