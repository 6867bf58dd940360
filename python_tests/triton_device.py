"""Where the Triton tests run: on a GPU if there is one, else in Triton's interpreter."""

from __future__ import annotations

from dataclasses import fields, replace

import torch
from torch import Tensor

from galore_kernels.backends.triton import make_backend
from galore_kernels.ops import AdamOptions, AdamState
from galore_kernels.ops.group import UpdateGroup

DEVICE = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
BACKEND = make_backend(in_interpreter=DEVICE.type == "cpu")


def moved_state(state: AdamState, device: torch.device = DEVICE) -> AdamState:
    """A copy of the state on ``device``."""
    named = {field.name: getattr(state, field.name) for field in fields(state)}
    return replace(state, **{name: x.to(device, copy=True) for name, x in named.items() if x is not None})


def moved_options(options: AdamOptions) -> AdamOptions:
    """The options with their tensors on the tests' device."""
    named = {name: getattr(options, name) for name in ("lr", "grad_scale", "found_inf")}
    return replace(options, **{name: x.to(DEVICE) for name, x in named.items() if x is not None})


def galore_update(
    param: Tensor,
    grad: Tensor,
    basis: Tensor,
    state: AdamState,
    options: AdamOptions,
    side: str,
    scale: float,
    basis_scale: Tensor | None = None,
    operation: str = "galore_update",
    weight_scale: Tensor | None = None,
) -> tuple[Tensor, AdamState]:
    """The operation by the Triton backend on copies; CPU tensors in, CPU tensors out. But ``weight_scale`` changes."""
    weight, moved = param.to(DEVICE, copy=True), moved_state(state)
    scales, weight_scales = (None if x is None else x.to(DEVICE) for x in (basis_scale, weight_scale))
    BACKEND.kernels[operation](
        weight,
        grad.to(DEVICE),
        basis.to(DEVICE),
        None,
        scales,
        moved,
        moved_options(options),
        side,
        scale,
        weight_scales,
    )
    if weight_scale is not None and weight_scales is not None:
        weight_scale.copy_(weight_scales)
    return weight.cpu(), moved_state(moved, torch.device("cpu"))


def group_update(
    group: UpdateGroup, grads: list[Tensor], options: AdamOptions, steps: int = 1
) -> list[tuple[Tensor, AdamState]]:
    """The update of a group of CPU tensors on copies, ``steps`` times. Scales of weights and norms do change."""
    cpu = torch.device("cpu")
    there = replace(
        group,
        params=tuple(param.to(DEVICE, copy=True) for param in group.params),
        states=tuple(map(moved_state, group.states)),
        bases=tuple(basis.to(DEVICE) if isinstance(basis, Tensor) else basis for basis in group.bases),
        basis_scales=tuple(basis_scale.to(DEVICE) for basis_scale in group.basis_scales),
        weight_scales=tuple(weight_scale.to(DEVICE) for weight_scale in group.weight_scales),
        scaled_norms=tuple(scaled_norm.to(DEVICE) for scaled_norm in group.scaled_norms),
    )
    assert BACKEND.group is not None
    update = BACKEND.group(there)
    for _ in range(steps):
        update([grad.to(DEVICE) for grad in grads], moved_options(options))
    kept = (*group.weight_scales, *group.scaled_norms)
    for before, after in zip(kept, (*there.weight_scales, *there.scaled_norms), strict=True):
        before.copy_(after)
    return [(param.cpu(), moved_state(state, cpu)) for param, state in zip(there.params, there.states, strict=True)]
