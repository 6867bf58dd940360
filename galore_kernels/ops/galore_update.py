"""``galore_update``: gradient in, weight out - the whole GaLore step of one matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from galore_kernels.ops.adam import AdamOptions, AdamState, flat_options, flat_state
from galore_kernels.ops.projection import define_projected_update


def galore_update(
    param: Tensor,
    grad: Tensor,
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
    """Updates ``param`` and ``state`` in place by one step of GaLore (Zhao et al., arXiv 2403.03507, algorithm 2).

        R = grad @ basis (right)  or  grad.T @ basis (left)          projected gradient, (L, r), float32 sums
        u = Adam's direction of R / grad_scale, from moments of shape (L, r)      see ``adam8bit_update``
        param = (param - lr sqrt(1 - beta2^t) / (1 - beta1^t) scale (u @ basis.T)[.T]) (1 - lr weight_decay)

    L is the dimension that is kept: m on side "right", n on side "left"; S is the other. With ``long_basis`` the kept
    dimension is projected too (galore_torch's ``proj_type="full"``): R = long_basis.T @ (grad @ basis).

    All arithmetic is float32 and the weight is rounded once; if the basis is a 16-bit tensor, u is rounded to its
    dtype before the back-projection, which is what matrix units multiply. Of a quantized basis the codes are
    multiplied, R = (grad @ codes) * basis_scale and (u * basis_scale) @ codes.T, where a 16-bit weight's dtype is the
    one that u * basis_scale is rounded to (an int8 weight's is bfloat16). If an element of R / grad_scale is NaN,
    infinite or beyond 1.8446743e19, nothing changes but ``state.skipped``, which grows by one.

    Args:
        param: (m, n), any strides; float32, bfloat16 or float16. With ``weight_scale`` the int8 codes of
            ``galore_kernels.quantizers.quantize_weight``, contiguous, which are rounded stochastically:
            ``options.rounding_seed`` must be given.
        grad: (m, n); float32, bfloat16 or float16.
        basis: (S, r), contiguous; float32, bfloat16 or float16. With ``basis_scale`` the codes of
            ``galore_kernels.quantizers.quantize_basis``.
        state: moments of shape (L, r), or (r_long, r) with ``long_basis``.
        options: the scalars.
        side: "left" or "right". scale: GaLore's alpha.
        long_basis: (L, r_long), contiguous, or None.
        basis_scale: (r,) float32, or None for a basis that is not quantized; not with ``long_basis``.
        weight_scale: (m, ceil(n / 256)) float32, updated in place, or None for a weight that is not quantized.
        backend: "auto" or a name from ``backend_info()``.

    Raises:
        ValueError: an argument doesn't fit; the message names it. Nothing has changed.
        RuntimeError: the backend can't serve the device.
    """
    torch.ops.galore_kernels.galore_update(
        param,
        grad,
        basis,
        long_basis,
        basis_scale,
        *flat_state(state, options),
        side=side,
        scale=scale,
        weight_scale=weight_scale,
        **flat_options(options, backend),
    )


define_projected_update("galore_update", "grad")
