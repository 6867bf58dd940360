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
    # In double: on a device float32 products would be rounded to tf32 where the user allows it.
    turn = rotation.double()
    turned, carried = m.double() @ turn, variance.double() @ turn.square()
    if long_rotation is not None:
        turned, carried = long_rotation.double().T @ turned, long_rotation.double().square().T @ carried
    turned, carried = turned.float(), carried.float()
    for tensor, value in moment_writes(target, turned, (carried + turned.square() * c).abs()):
        tensor.copy_(value)
