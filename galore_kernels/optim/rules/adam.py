"""Adam, and GaLore on it: the projected gradient's direction, projected back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from galore_kernels import ops
from galore_kernels.ops.adam import AdamState
from galore_kernels.optim.options import expect, expect_number, number
from galore_kernels.optim.rules.rule import Rule, Spec, projected_fields
from galore_kernels.optim.state import adam_state

if TYPE_CHECKING:
    from galore_kernels.optim.state import Layout

#: Tensors of fewer elements keep float32 moments: there is little to save and, in norms and biases, much to lose.
MIN_8BIT_ELEMENTS = 4096

_ABSMAX = ("exp_avg_absmax", "exp_avg_sq_absmax")


class Adam(Rule):
    """Adam with float32 moments, or with 8-bit ones where they are large."""

    own_keys: tuple[str, ...] = ("betas", "eps")
    moment_names: tuple[str, ...] = ("exp_avg", "exp_avg_sq", *_ABSMAX)
    takes_shards = True

    def __init__(self, *, eight_bit: bool) -> None:
        self._eight_bit = eight_bit

    def __repr__(self) -> str:
        return f"{'8-bit' if self._eight_bit else 'float32'} moments"

    def check(self, group: Mapping[str, Any], where: str) -> None:
        self.check_lr(group, where)
        betas = group["betas"]
        pair = isinstance(betas, (tuple, list)) and len(betas) == 2
        numbers = [number(b) for b in betas] if pair else []
        ok = pair and all(b is not None and 0.0 <= b < 1.0 for b in numbers)
        expect(where, "betas", betas, ok, "two numbers in [0, 1)", "(0.9, 0.999) is usual")
        expect_number(where, group, "eps", positive=False, remedy="1e-8 is usual")

    def is_eight_bit(self, elements: int) -> bool:
        return self._eight_bit and elements >= MIN_8BIT_ELEMENTS

    def moments(self, layout: Layout) -> dict[str, Spec]:
        dtype = torch.uint8 if layout.eight_bit else torch.float32
        return {"exp_avg": (layout.moments, dtype), "exp_avg_sq": (layout.moments, dtype)}

    def new_tensors(self, layout: Layout, device: torch.device) -> dict[str, Any]:
        adam = AdamState.zeros(layout.moments, eight_bit=layout.eight_bit, device=device)
        return {name: value for name in Adam.moment_names if (value := getattr(adam, name)) is not None}

    def scalars(self, group: Mapping[str, Any], lr: Tensor, unscaling: Mapping[str, Any]) -> ops.AdamOptions:
        return ops.AdamOptions(
            lr,
            beta1=float(group["betas"][0]),
            beta2=float(group["betas"][1]),
            eps=float(group["eps"]),
            weight_decay=float(group["weight_decay"]),
            maximize=group["maximize"],
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
        if layout.side is None:
            ops.adam8bit_update(weight, grad, adam_state(state), options, backend=backend)
            return
        operation = ops.lowrank_update if is_lowrank else ops.galore_update
        operation(
            weight,
            grad,
            state["basis"],
            adam_state(state),
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
            return "adam8bit_update"
        return "lowrank_update" if is_lowrank else "galore_update"

    def tensors(self, state: Mapping[str, Any]) -> AdamState:
        return adam_state(state)

    def group_fields(
        self, group: Mapping[str, Any], layout: Layout, states: Sequence[Mapping[str, Any]]
    ) -> dict[str, Any]:
        return projected_fields(group, layout, states)
