"""One parameter's part of a step, checked."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from galore_kernels.nn import CarriedGradient, LowRankGradient
from galore_kernels.optim.packed import projection
from galore_kernels.optim.shard import is_dtensor, local, placements
from galore_kernels.optim.state import Layout


@dataclass(frozen=True)
class Update:
    """A parameter to be updated, checked before anything changes.

    Attributes:
        param: the parameter, which has a gradient of its shape. The state belongs to it.
        group: the parameter group's options.
        index: over all groups, the same after a resume: it goes into the seeds.
        name: for messages.
        layout: of the state.
        phase: in [0, 1), its place among the projected parameters: see ``galore_kernels.subspace.Schedule``.
        carried: if the parameter carries the gradient of another tensor, what knows both, else None.
        is_packed: the first elements of ``param.grad`` are its projection (``galore_kernels.distributed``).
    """

    param: Tensor
    group: Mapping[str, Any]
    index: int
    name: str
    layout: Layout
    phase: float = 0.0
    carried: CarriedGradient | None = None
    is_packed: bool = False

    @property
    def factored(self) -> LowRankGradient | None:
        """If the parameter carries the low-rank gradient of another tensor, what knows both, else None."""
        return self.carried if isinstance(self.carried, LowRankGradient) else None

    @property
    def weight(self) -> Tensor:
        """The tensor that is updated: the parameter, this process' part of it, or the one whose gradient it carries."""
        return local(self.param) if self.carried is None else self.carried.weight

    @property
    def weight_scale(self) -> Tensor | None:
        """The scales of an int8 weight, else None."""
        return None if self.carried is None else self.carried.weight_scale

    @property
    def is_lowrank(self) -> bool:
        """Whether the gradient is projected already."""
        return self.is_packed or self.factored is not None

    @property
    def takes_lowrank(self) -> bool:
        """Whether what updates the weight is given a projected gradient."""
        return self.is_lowrank or self.layout.sums

    @property
    def grad(self) -> Tensor:
        """The gradient of ``weight``. It is not held: a plan lives longer than the gradients it was made for."""
        grad = local(cast(Tensor, self.param.grad))
        return projection(grad, self.layout.moments) if self.is_packed else grad

    def check(self, state: Mapping[str, Any] | None) -> None:
        """Raises ValueError naming the parameter unless gradient and state fit it."""
        param, grad, name = self.param, self.grad, self.name
        if grad.layout != torch.strided or grad.is_complex():
            raise ValueError(f"{name}: expected a dense real gradient, got {grad.layout}, {grad.dtype}; densify it")
        if is_dtensor(param) and placements(param.grad) != placements(param):
            raise ValueError(
                f"{name}: expected a gradient that is divided as the weight, {placements(param)}, got "
                f"{placements(param.grad)}; leave the gradients to fully_shard"
            )
        if not grad.is_floating_point() or grad.dtype == torch.float64:
            raise ValueError(f"{name}: expected a float32, bfloat16 or float16 gradient, got {grad.dtype}")
        if grad.is_inference():
            raise ValueError(f"{name}: its gradient was made in inference mode; run the backward pass outside of it")
        moments = [state[key] for key in self.layout.rule.moments(self.layout) if key in state] if state else []
        if any(tensor.device != param.device for tensor in (grad, *moments)):
            raise ValueError(
                f"{name}: the weight is on {param.device}, its gradient or its state is not; move the model before "
                "the first step, or load the optimizer's state_dict again after moving it"
            )
        shape = torch.Size(self.layout.moments) if self.is_packed else local(param).shape
        if grad.shape != shape or (state and not self.layout.fits(state)):
            options = ", ".join(("rank", "proj_type", *self.layout.rule.structural))
            raise ValueError(
                f"{name}: the weight has shape {tuple(param.shape)}, its gradient {tuple(grad.shape)}, and its "
                f"state was made for another shape or rank, or for other options of its group ({options}), or was "
                "cast; it was changed since the last step: make a new optimizer, or restore it"
            )

    def rounding_seed(self, state: Mapping[str, Any]) -> int | None:
        """Seed for stochastic rounding, or None for rounding to nearest."""
        stochastic = self.group["stochastic_rounding"] and self.weight.dtype == torch.bfloat16
        if not stochastic and self.weight.dtype != torch.int8:
            return None
        # The random bits of a seed depend on Adam's step counter, which "reset" sets back.
        reset = self.layout.rank is not None and self.group["moments_on_refresh"] == "reset"
        refreshes = [state["refreshes"]] if reset else []
        first_row = [] if self.layout.shard is None else [f"row {self.layout.shard.start}"]
        return derived_seed(self.group["seed"], self.index, "rounding", *refreshes, *first_row)


def derived_seed(*parts: object) -> int:
    """A 63-bit seed from the optimizer's seed and what it is for: the same in every process and after a resume."""
    text = ":".join(map(str, parts))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1
