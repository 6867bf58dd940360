"""``apollo_update``: gradient in, weight out - the whole APOLLO step of one matrix."""

from __future__ import annotations

import math
from dataclasses import dataclass
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
    fail,
    flat_options,
    flat_state,
)
from galore_kernels.ops.library import define
from galore_kernels.ops.projection import check_oriented, check_projected_weight, check_projection
from galore_kernels.ops.random_basis import RandomBasis, check_random_basis

SCALINGS = ("channel", "tensor")

#: Added to the norm that a direction's is divided by, and to the last step's norm by the limiter.
NORM_EPS = 1e-8


@dataclass(frozen=True)
class ApolloOptions:
    """How low-rank moments become factors of the raw gradient.

    Attributes:
        scale: APOLLO's alpha; the gradient is multiplied by its root.
        scaling: "channel", a factor for each long index, or "tensor", one for the matrix.
        scale_front: multiply by the root before the limiter sees the norm, instead of after.
        norm_growth_limit: the norm may become so many times that of the last step (Fira, arXiv 2410.01623), or None.
    """

    scale: float = 1.0
    scaling: str = "channel"
    scale_front: bool = False
    norm_growth_limit: float | None = 1.01


def apollo_update(
    param: Tensor,
    grad: Tensor,
    basis: Tensor | RandomBasis,
    state: AdamState,
    scaled_norm: Tensor,
    options: AdamOptions,
    apollo: ApolloOptions,
    *,
    side: str,
    weight_scale: Tensor | None = None,
    backend: str = "auto",
) -> None:
    """Updates ``param``, ``state`` and ``scaled_norm`` in place by one step of APOLLO (Zhu et al., arXiv 2412.05270).

        g = grad / grad_scale;  R = g @ basis (right)  or  g.T @ basis (left)      (L, r), float32 sums
        u = Adam's direction of R before bias correction, from moments of shape (L, r)      see ``adam8bit_update``
        s_j = |u_j| / (|R_j| + 1e-8) for each long index j,  or one s = |u| / (|R| + 1e-8)        (section 4.1)
        n = |s g|, times sqrt(scale) with scale_front
        l = max(n / (scaled_norm + 1e-8), limit) / limit, and 1 without a limit or where scaled_norm <= 1e-8
        param = (param - lr sqrt(1 - beta2^t) / (1 - beta1^t) sqrt(scale) / l (s g)) (1 - lr weight_decay)
        scaled_norm = n / l

    where s multiplies the rows of g on side "right", the columns on side "left". n and l are computed in double, the
    rest in float32; the weight is rounded once. A ``scaled_norm`` up to 1e-8 limits nothing: it is 0 before the first
    step, and after a gradient of zeros, or of next to nothing, the growth from it would take a thousand steps to reach
    an ordinary norm.

    If an element of R is NaN, infinite or beyond 1.8446743e19, or the float32 sum of the squares of a long index of
    ``grad``, unscaled, is not finite, nothing changes but ``state.skipped``, which grows by one.

    Args:
        param: (m, n), any strides; float32, bfloat16 or float16. With ``weight_scale`` int8 codes, as in
            ``galore_update``.
        grad: (m, n); float32, bfloat16 or float16.
        basis: what is drawn from a seed, or (S, r), contiguous, float32, bfloat16 or float16.
        state: moments of shape (L, r).
        scaled_norm: 0-d float32, the norm of the last step's scaled gradient; 0 before the first.
        options: the scalars of Adam. apollo: APOLLO's.
        side: "left" or "right".
        weight_scale: (m, ceil(n / 256)) float32, updated in place, or None for a weight that is not quantized.
        backend: "auto" or a name from ``backend_info()``.

    Raises:
        ValueError: an argument doesn't fit; the message names it. Nothing has changed.
        RuntimeError: the backend can't serve the device.
    """
    drawn = basis if isinstance(basis, RandomBasis) else None
    torch.ops.galore_kernels.apollo_update(
        param,
        grad,
        basis if isinstance(basis, Tensor) else None,
        *flat_state(state, options),
        scaled_norm,
        side=side,
        rank=0 if drawn is None else drawn.rank,
        basis_seed=None if drawn is None else drawn.seed,
        basis_family="" if drawn is None else drawn.family,
        scale=apollo.scale,
        scaling=apollo.scaling,
        scale_front=apollo.scale_front,
        norm_growth_limit=apollo.norm_growth_limit,
        weight_scale=weight_scale,
        **flat_options(options, backend),
    )


_SCHEMA = (
    f"(Tensor(a!) param, Tensor grad, Tensor? basis, {STATE_SCHEMA}, Tensor(i!) scaled_norm, *, str side, int rank, "
    "int? basis_seed, str basis_family, float scale, str scaling, bool scale_front, float? norm_growth_limit, "
    f"Tensor(h!)? weight_scale=None, {OPTIONS_SCHEMA}) -> ()"
)


def check_apollo(op: str, apollo: ApolloOptions) -> None:
    """Raises ValueError unless the options are possible."""
    if not (apollo.scale > 0.0 and math.isfinite(apollo.scale)):
        fail(op, "scale", "finite and > 0", apollo.scale, "APOLLO's is 1, APOLLO-Mini's 128")
    if apollo.scaling not in SCALINGS:
        fail(op, "scaling", f"one of {', '.join(SCALINGS)}", repr(apollo.scaling), "choose one of them")
    limit = apollo.norm_growth_limit
    if limit is not None and not (limit >= 1.0 and math.isfinite(limit)):
        fail(op, "norm_growth_limit", "finite and >= 1, or None", limit, "1.01 is the papers'")


def check_drawn(op: str, param: Tensor, basis: RandomBasis, side: str) -> tuple[int, int]:
    """Raises ValueError unless the weight can be projected so. Returns the shape of the low-rank gradient."""
    check_random_basis(op, basis)
    return check_oriented(op, param, side)[0], basis.rank


def check_norm(op: str, param: Tensor, scaled_norm: Tensor) -> None:
    """Raises ValueError unless this can be the last step's norm."""
    check_tensor(op, "scaled_norm", scaled_norm, device=param.device, dtypes=(torch.float32,), shape=())


def _checked(
    param: Tensor,
    grad: Tensor,
    basis: Tensor | None,
    *state_tensors: Any,
    side: str,
    rank: int,
    basis_seed: int | None,
    basis_family: str,
    scale: float,
    scaling: str,
    scale_front: bool,
    norm_growth_limit: float | None,
    weight_scale: Tensor | None = None,
    backend: str = "auto",
    **scalars: Any,
) -> tuple[Any, ...]:
    """The arguments of a backend's kernel, checked."""
    *tensors, lr, scaled_norm = state_tensors
    state, options = bundle(*tensors, lr, **scalars)
    apollo = ApolloOptions(scale, scaling, scale_front, norm_growth_limit)
    chosen: Tensor | RandomBasis
    check_apollo("apollo_update", apollo)
    check_projected_weight("apollo_update", param, weight_scale, options)
    if basis is not None:
        chosen, shape = basis, check_projection("apollo_update", param, basis, None, None, side, scale)
    else:
        if basis_seed is None:
            fail("apollo_update", "basis_seed", "given where there is no basis", None, "pass a RandomBasis")
        chosen = RandomBasis(rank, basis_seed or 0, basis_family)
        shape = check_drawn("apollo_update", param, chosen, side)
    check_tensor("apollo_update", "grad", grad, device=param.device, dtypes=WEIGHT_DTYPES, shape=tuple(param.shape))
    check_adam("apollo_update", param, math.prod(shape), state, options)
    check_norm("apollo_update", param, scaled_norm)
    return param, grad, chosen, state, scaled_norm, options, apollo, side, weight_scale


def _run(param: Tensor, *args: Any, backend: str = "auto", **kwargs: Any) -> None:
    checked = _checked(param, *args, **kwargs)
    registry.kernel("apollo_update", backend, param.device)(*checked)
    torch.autograd.graph.increment_version(param)


def _fake(*args: Any, **kwargs: Any) -> None:
    _checked(*args, **kwargs)


define("apollo_update", _SCHEMA, _run, _fake)
