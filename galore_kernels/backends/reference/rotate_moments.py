"""Moments carried to another basis in plain PyTorch. Contract: ``galore_kernels.ops.rotate_moments``."""

from __future__ import annotations

from torch import Tensor

from galore_kernels.backends.reference.adam import load_moments, moment_writes
from galore_kernels.ops.adam import AdamState


def rotate_moments(
    source: AdamState, target: AdamState, rotation: Tensor, long_rotation: Tensor | None, beta1: float, beta2: float
) -> None:
    """Writes the moments of ``source`` in the new basis to ``target``, whose memory is another."""
    m, v = load_moments(source)
    step = int(source.step)
    c = (1.0 - beta2**step) / (1.0 - beta1**step) ** 2 if step else 0.0
    variance = v - m.square() * c
    turned, carried = m @ rotation, variance @ rotation.square()
    if long_rotation is not None:
        turned, carried = long_rotation.T @ turned, long_rotation.square().T @ carried
    for tensor, value in moment_writes(target, turned, (carried + turned.square() * c).abs()):
        tensor.copy_(value)
