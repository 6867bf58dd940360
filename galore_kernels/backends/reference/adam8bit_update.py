"""The full-rank Adam step in plain PyTorch. Contract: ``galore_kernels.ops.adam8bit_update``."""

from __future__ import annotations

from torch import Tensor

from galore_kernels.backends.reference import adam
from galore_kernels.backends.reference.rounding import rounded
from galore_kernels.ops.adam import AdamOptions, AdamState


def adam8bit_update(param: Tensor, grad: Tensor, state: AdamState, options: AdamOptions) -> None:
    g = adam.scaled_gradient(grad, options)
    if adam.skips(g, state, options):
        return
    step = int(state.step) + 1
    m, v = adam.adam_moments(g, state, options)
    direction = adam.adam_direction(m, v, options)
    weight = adam.updated_weight(param, direction, adam.step_size(options, step), options)
    adam.commit([(param, rounded(weight, param.dtype, options.rounding_seed, step))], m, v, state)
