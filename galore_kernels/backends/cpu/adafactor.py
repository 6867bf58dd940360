"""What the native module is told of Adafactor's updates."""

from __future__ import annotations

import math

from galore_kernels import _native
from galore_kernels.backends.cpu.arguments import inverse_grad_scale
from galore_kernels.ops.adafactor_update import AdafactorOptions
from galore_kernels.ops.group import ADAFACTOR_OPERATIONS, UpdateGroup


def gradient_shape(group: UpdateGroup, elements: int, rank: int) -> tuple[int, int, int]:
    """(matrices, rows, columns) of a gradient, or its projection; a vector is one row. Of Adam's zeros.

    ``rank``: 0 at full rank.
    """
    if group.operation not in ADAFACTOR_OPERATIONS:
        return 0, 0, 0
    if rank > 0:
        return 1, elements // rank, rank
    shape = group.params[0].shape
    if len(shape) < 2:
        return 1, 1, elements
    return math.prod(shape[:-2]), shape[-2], shape[-1]


def adafactor_scalars(options: AdafactorOptions) -> _native.CpuAdafactorScalars:
    """Those that the tensors of a step share."""
    return _native.CpuAdafactorScalars(
        0.0 if options.lr is None else float(options.lr),
        options.eps1,
        options.eps2,
        options.clip_threshold,
        options.decay_rate,
        options.beta1 or 0.0,
        options.weight_decay,
        options.scale_parameter,
        options.relative_step,
        options.warmup_init,
        inverse_grad_scale(options),
        options.maximize,
    )
