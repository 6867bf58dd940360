"""``adam8bit_update``: one Adam step of a tensor at full rank, with 8-bit or float32 moments."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from galore_kernels.ops import registry
from galore_kernels.ops.adam import (
    OPTIONS_SCHEMA,
    STATE_SCHEMA,
    WEIGHT_DTYPES,
    AdamOptions,
    AdamState,
    bundle,
    check_adam,
    check_tensor,
    check_weight,
    flat_options,
    flat_state,
)
from galore_kernels.ops.library import define

_NAME = "adam8bit_update"


def adam8bit_update(
    param: Tensor, grad: Tensor, state: AdamState, options: AdamOptions, *, backend: str = "auto"
) -> None:
    """Updates ``param`` and ``state`` in place by one step of AdamW at full rank.

    With t = step + 1 and g = grad / grad_scale (negated if ``maximize``), in float32:

        m = beta1 m + (1 - beta1) g;   v = beta2 v + (1 - beta2) g^2
        u = m / (sqrt(v) + eps)
        param = (param - lr sqrt(1 - beta2^t) / (1 - beta1^t) u) (1 - lr weight_decay)

    (Kingma and Ba, arXiv 1412.6980, section 2's efficient form, and Loshchilov and Hutter, arXiv 1711.05101; eps is
    added to the uncorrected sqrt(v) and the decay follows the update, as in galore_torch.) u is formed from the new
    moments before they are requantized. The weight is rounded once, when stored.

    If an element of g is NaN, infinite or beyond 1.8446743e19 (its square overflows), nothing changes but
    ``state.skipped``, which grows by one.

    Args:
        param: any shape and strides; float32, bfloat16 or float16.
        grad: the same shape; float32, bfloat16 or float16.
        state: moments of as many elements, row-major.
        options: the scalars.
        backend: "auto" or a name from ``backend_info()``.

    Raises:
        ValueError: an argument doesn't fit; the message names it. Nothing has changed.
        RuntimeError: the backend can't serve the device.
    """
    torch.ops.galore_kernels.adam8bit_update(param, grad, *flat_state(state, options), **flat_options(options, backend))


def _check(param: Tensor, grad: Tensor, state: AdamState, options: AdamOptions) -> None:
    check_weight(_NAME, param)
    shape = tuple(param.shape)
    check_tensor(_NAME, "grad", grad, device=param.device, dtypes=WEIGHT_DTYPES, shape=shape)
    check_adam(_NAME, param, param.numel(), state, options)


def _run(param: Tensor, grad: Tensor, *state_tensors: Any, backend: str = "auto", **options: Any) -> None:
    state, bundled = bundle(*state_tensors, **options)
    _check(param, grad, state, bundled)
    registry.kernel(_NAME, backend, param.device)(param, grad, state, bundled)
    torch.autograd.graph.increment_version(param)


def _fake(param: Tensor, grad: Tensor, *state_tensors: Any, backend: str = "auto", **options: Any) -> None:
    _check(param, grad, *bundle(*state_tensors, **options))


define(_NAME, f"(Tensor(a!) param, Tensor grad, {STATE_SCHEMA}, *, {OPTIONS_SCHEMA}) -> ()", _run, _fake)
