"""``lowrank_update``: projected gradient in, weight out - for gradients that never had full rank."""

from __future__ import annotations

import torch
from torch import Tensor

from galore_kernels.ops.adam import AdamOptions, AdamState, flat_options, flat_state
from galore_kernels.ops.projection import define_projected_update


def lowrank_update(
    param: Tensor,
    lowrank_grad: Tensor,
    basis: Tensor,
    state: AdamState,
    options: AdamOptions,
    *,
    side: str,
    scale: float,
    long_basis: Tensor | None = None,
    basis_scale: Tensor | None = None,
    weight_scale: Tensor | None = None,
    backend: str = "auto",
) -> None:
    """``galore_update`` for a gradient that is projected already: everything after its first line.

    Args:
        lowrank_grad: R of shape (L, r), or (r_long, r) with ``long_basis``; float32, bfloat16 or float16.
        param, basis, state, options, side, scale: as in ``galore_update``.
        long_basis, basis_scale, weight_scale, backend: as there.

    Raises:
        ValueError: an argument doesn't fit; the message names it. Nothing has changed.
        RuntimeError: the backend can't serve the device.
    """
    torch.ops.galore_kernels.lowrank_update(
        param,
        lowrank_grad,
        basis,
        long_basis,
        basis_scale,
        *flat_state(state, options),
        side=side,
        scale=scale,
        weight_scale=weight_scale,
        **flat_options(options, backend),
    )


define_projected_update("lowrank_update", "lowrank_grad")
