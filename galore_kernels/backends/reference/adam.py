"""Adam's scalar mathematics in plain PyTorch: the oracle's own statement of what ``csrc/core/adam.h`` defines.

Every operation is a torch operation of its own, so each is rounded to float32 separately; ``add(alpha=...)`` would
contract into a fused multiply-add on some devices and not on others.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from galore_kernels.backends.reference.quantize_blockwise import dequantize_blockwise, quantize_blockwise
from galore_kernels.ops.adam import LARGEST_GRADIENT, AdamOptions, AdamState, StepOptions


def scaled_gradient(grad: Tensor, options: StepOptions) -> Tensor:
    """Float32 gradient, unscaled and with the sign that is descended along."""
    g = grad.float()
    if options.grad_scale is not None:
        g = g * (1.0 / options.grad_scale.double()).float()
    return -g if options.maximize else g


def representable(g: Tensor) -> bool:
    """Whether every element has a finite square; False for NaN and Inf."""
    return bool((g.abs() <= LARGEST_GRADIENT).all())


def step_size(options: AdamOptions, step: int) -> float:
    """lr sqrt(1 - beta2^t) / (1 - beta1^t), in double."""
    return float(options.lr) * math.sqrt(1.0 - options.beta2**step) / (1.0 - options.beta1**step)


def decay_factor(options: AdamOptions) -> float:
    """1 - lr * weight_decay, in double."""
    return 1.0 - float(options.lr) * options.weight_decay


def load_moments(state: AdamState) -> tuple[Tensor, Tensor]:
    """Both moments in float32."""
    if state.exp_avg_absmax is None or state.exp_avg_sq_absmax is None:
        return state.exp_avg, state.exp_avg_sq
    return (
        dequantize_blockwise(state.exp_avg, state.exp_avg_absmax, True),
        dequantize_blockwise(state.exp_avg_sq, state.exp_avg_sq_absmax, False),
    )


def moment_writes(state: AdamState, m: Tensor, v: Tensor) -> list[tuple[Tensor, Tensor]]:
    """(tensor of the state, what it becomes) of both moments, 8-bit ones quantized."""
    if state.exp_avg_absmax is None or state.exp_avg_sq_absmax is None:
        return [(state.exp_avg, m), (state.exp_avg_sq, v)]
    m_codes, m_absmax = quantize_blockwise(m, True)
    v_codes, v_absmax = quantize_blockwise(v, False)
    return [
        (state.exp_avg, m_codes),
        (state.exp_avg_absmax, m_absmax),
        (state.exp_avg_sq, v_codes),
        (state.exp_avg_sq_absmax, v_absmax),
    ]


def _f32(value: float) -> float:
    return float(torch.tensor(value, dtype=torch.float32))


def adam_moments(g: Tensor, state: AdamState, options: AdamOptions) -> tuple[Tensor, Tensor]:
    """The new moments in float32, shape of ``g``. Writes nothing."""
    beta1, beta2 = _f32(options.beta1), _f32(options.beta2)
    rest1, rest2 = _f32(1.0 - options.beta1), _f32(1.0 - options.beta2)
    m, v = (moment.view(g.shape) for moment in load_moments(state))
    return m * beta1 + g * rest1, v * beta2 + (g * g) * rest2


def adam_direction(m: Tensor, v: Tensor, options: AdamOptions) -> Tensor:
    """m / (sqrt(v) + eps), and 0 where the denominator is 0 (no gradient yet and eps = 0)."""
    # Through double, whose root rounds to the nearest float32: torch's own float32 root (MKL's on x86) is off by one
    # unit in the last place for 16 % of all numbers.
    denominator = v.double().sqrt().float() + _f32(options.eps)
    return torch.where(denominator > 0, m / denominator, torch.zeros_like(m))


def commit(weight: list[tuple[Tensor, Tensor]], m: Tensor, v: Tensor, state: AdamState) -> None:
    """Writes the new weight and moments (8-bit: requantized) and counts the step.

    ``weight``: (tensor, what it becomes) of all that a weight consists of, already rounded.

    Everything that allocates comes before the first write, so that running out of memory changes nothing.
    """
    for target, value in [*weight, *moment_writes(state, m, v), (state.step, state.step + 1)]:
        target.copy_(value.view(target.shape))


def updated_weight(param: Tensor, change: Tensor, coefficient: float, options: AdamOptions) -> Tensor:
    """(param - coefficient * change) * (1 - lr * weight_decay) in float32."""
    return (param.float() - change * _f32(coefficient)) * _f32(decay_factor(options))


def skips(g: Tensor, state: AdamState, options: AdamOptions) -> bool:
    """Whether this update must not happen; counts it if the gradient is the reason."""
    if options.found_inf is not None and bool(options.found_inf != 0):
        return True
    if representable(g):
        return False
    state.skipped.add_(1)
    return True
