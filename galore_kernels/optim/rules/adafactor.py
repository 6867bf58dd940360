"""Adafactor, and GaLore on it: a factored second moment of the projected gradient, and updates of bounded size."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from galore_kernels import ops
from galore_kernels.ops import registry
from galore_kernels.ops.adafactor_update import MOMENTS, moment_shapes
from galore_kernels.optim.options import expect, number
from galore_kernels.optim.rules.rule import Rule, Spec, projected_fields

if TYPE_CHECKING:
    from galore_kernels.optim.state import Layout

# Those of steps relative to the weights; without a learning rate.
_RELATIVE = ("relative_step", "warmup_init")

_SWITCHES = ("scale_parameter", "relative_step", "warmup_init")


class Adafactor(Rule):
    """Adafactor with float32 moments."""

    own_keys = ("eps", "clip_threshold", "decay_rate", "beta1", *_SWITCHES)
    moment_names = MOMENTS
    served_by = "galore_adafactor_update"
    full_rank = "adafactor_update"

    def __repr__(self) -> str:
        return "factored float32 moments"

    def check(self, group: Mapping[str, Any], where: str) -> None:
        for key in _SWITCHES:
            expect(where, key, group[key], isinstance(group[key], bool), "True or False", "pass a bool")
        self.check_lr(group, where)
        relative, warmup = group["relative_step"], group["warmup_init"]
        possible_warmup = relative or not warmup
        expect(where, "warmup_init", warmup, possible_warmup, "False with relative_step=False", "warm lr up instead")
        eps, clip, rate, beta1 = group["eps"], group["clip_threshold"], group["decay_rate"], group["beta1"]
        pair = isinstance(eps, (tuple, list)) and len(eps) == 2
        ok = pair and all((e := number(value)) is not None and 0.0 <= e < math.inf for value in eps)
        expect(where, "eps", eps, ok, "two numbers >= 0", "(1e-30, 1e-3) is usual")
        largest = number(clip)
        expect(where, "clip_threshold", clip, largest is not None and largest > 0.0, "a number > 0", "1.0 is usual")
        power = number(rate)
        ok = power is not None and -math.inf < power <= 0.0
        expect(where, "decay_rate", rate, ok, "a finite number <= 0", "-0.8 is usual")
        decay = number(beta1)
        ok = beta1 is None or (decay is not None and 0.0 <= decay < 1.0)
        expect(where, "beta1", beta1, ok, "a number in [0, 1), or None", "None is usual")
        # A factored moment has no turned form; and a step counter set back would set the relative step back too.
        possible = ("keep",) if relative else ("keep", "reset")
        moments, one = group["moments_on_refresh"], " or ".join(map(repr, possible))
        if moments in ("rotate", "reset"):
            expect(where, "moments_on_refresh", moments, moments in possible, one, '"keep" is the default')

    def check_lr(self, group: Mapping[str, Any], where: str) -> None:
        lr = group["lr"]
        if group["relative_step"]:
            remedy = "pass relative_step=False with a learning rate, or none"
            # 0 is what torch.distributed.checkpoint sets while it has the state made.
            expect(where, "lr", lr, lr is None or number(lr) == 0.0, "None with relative_step=True", remedy)
        else:
            remedy = "pass one, or relative_step=True"
            expect(where, "lr", lr, lr is not None, "a learning rate with relative_step=False", remedy)
            super().check_lr(group, where)

    def has_first_moment(self, group: Mapping[str, Any]) -> bool:
        return group["beta1"] is not None

    def is_eight_bit(self, elements: int) -> bool:
        return False

    def moments(self, layout: Layout) -> dict[str, Spec]:
        shapes = moment_shapes(layout.moments, first_moment=layout.first_moment)
        return {name: (shape, torch.float32) for name, shape in shapes.items()}

    def new_tensors(self, layout: Layout, device: torch.device) -> dict[str, Any]:
        specs = self.moments(layout).items()
        return {name: torch.zeros(shape, dtype=dtype, device=device) for name, (shape, dtype) in specs}

    def scalars(self, group: Mapping[str, Any], lr: Tensor, unscaling: Mapping[str, Any]) -> ops.AdafactorOptions:
        eps, beta1, relative = group["eps"], group["beta1"], group["lr"] is None
        switches: dict[str, Any] = {key: group[key] and (relative or key not in _RELATIVE) for key in _SWITCHES}
        return ops.AdafactorOptions(
            None if relative else lr,
            eps1=float(eps[0]),
            eps2=float(eps[1]),
            clip_threshold=float(group["clip_threshold"]),
            decay_rate=float(group["decay_rate"]),
            beta1=None if beta1 is None else float(beta1),
            weight_decay=float(group["weight_decay"]),
            maximize=group["maximize"],
            **switches,
            **unscaling,
        )

    def update(
        self,
        weight: Tensor,
        grad: Tensor,
        state: Mapping[str, Any],
        options: Any,
        group: Mapping[str, Any],
        layout: Layout,
        *,
        is_lowrank: bool,
        weight_scale: Tensor | None,
        backend: str,
    ) -> None:
        own = self.tensors(state)
        if layout.side is None:
            # The backends of devices have the projected step alone.
            named = backend if registry.implements(self.full_rank, backend) else "reference"
            ops.adafactor_update(weight, grad, own, options, backend=named)
            return
        operation = ops.lowrank_adafactor_update if is_lowrank else ops.galore_adafactor_update
        operation(
            weight,
            grad,
            state["basis"],
            own,
            options,
            side=layout.side,
            scale=float(group["scale"]),
            long_basis=state.get("long_basis"),
            basis_scale=state.get("basis_scale"),
            weight_scale=weight_scale,
            backend=backend,
        )

    def operation(self, layout: Layout, *, is_lowrank: bool) -> str:
        if layout.side is None:
            return self.full_rank
        return "lowrank_adafactor_update" if is_lowrank else "galore_adafactor_update"

    def tensors(self, state: Mapping[str, Any]) -> ops.AdafactorState:
        return ops.AdafactorState.of(state)

    def group_fields(
        self, group: Mapping[str, Any], layout: Layout, states: Sequence[Mapping[str, Any]]
    ) -> dict[str, Any]:
        return projected_fields(group, layout, states)
