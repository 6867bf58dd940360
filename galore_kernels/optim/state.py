"""The state of one parameter: its layout (the one definition), its making, its counting and its checking."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from galore_kernels.ops.adam import WEIGHT_DTYPES, AdamState
from galore_kernels.ops.projection import long_short
from galore_kernels.optim.options import matrix_shape, projected_rank, side_of
from galore_kernels.quantizers import BLOCK_SIZE

#: Tensors of fewer elements keep float32 moments: there is little to save and, in norms and biases, much to lose.
MIN_8BIT_ELEMENTS = 4096

_MOMENTS = ("exp_avg", "exp_avg_sq")
_ABSMAX = ("exp_avg_absmax", "exp_avg_sq_absmax")
_BASES = ("basis", "long_basis")


@dataclass(frozen=True)
class Layout:
    """What the state of a parameter consists of.

    Attributes:
        rank: of the projection, or None at full rank.
        side: of the update operation ("left" or "right"), or None at full rank.
        bases: name -> shape of the bases, empty at full rank.
        moments: shape of the moments.
        eight_bit: whether they are 8-bit.
    """

    rank: int | None
    side: str | None
    bases: dict[str, tuple[int, int]]
    moments: tuple[int, ...]
    eight_bit: bool

    @classmethod
    def of(cls, param: Tensor, group: Mapping[str, Any], *, eight_bit: bool) -> Layout:
        """The layout that ``param`` has in ``group``; ``eight_bit`` is the optimizer's wish."""
        rank = projected_rank(param, group)
        if rank is None:
            large = param.numel() >= MIN_8BIT_ELEMENTS
            return cls(None, None, {}, tuple(param.shape), eight_bit and large)
        side = side_of(param, group)
        both = side == "full"
        side = "right" if both else side
        long, short = long_short(matrix_shape(param.shape), side)
        bases = {"basis": (short, rank)}
        if both:
            bases["long_basis"] = (long, rank)
        moments = (rank if both else long, rank)
        return cls(rank, side, bases, moments, eight_bit and math.prod(moments) >= MIN_8BIT_ELEMENTS)

    def fits(self, state: Mapping[str, Any]) -> bool:
        """Whether the tensors of ``state`` have this layout's shapes, and its moments this layout's dtype."""
        shapes = {**dict.fromkeys(_MOMENTS, self.moments), **self.bases}
        dtype = torch.uint8 if self.eight_bit else torch.float32
        return all(key in state and tuple(state[key].shape) == shape for key, shape in shapes.items()) and all(
            state[key].dtype == dtype for key in _MOMENTS
        )

    def new_state(self, param: Tensor) -> dict[str, Any]:
        """A fresh state on the parameter's device; bases have the parameter's dtype and are zero until refreshed."""
        adam = AdamState.zeros(self.moments, eight_bit=self.eight_bit, device=param.device)
        state: dict[str, Any] = {"step": adam.step, "skipped": adam.skipped}
        for name in (*_MOMENTS, *(_ABSMAX if self.eight_bit else ())):
            state[name] = getattr(adam, name)
        if self.eight_bit:
            state["block_size"] = BLOCK_SIZE
        for name, shape in self.bases.items():
            state[name] = torch.zeros(shape, dtype=param.dtype, device=param.device)
        if self.rank is not None:
            state["refreshes"] = 0
        return state


def adam_state(state: Mapping[str, Any]) -> AdamState:
    """The tensors that the update operations take."""
    return AdamState(
        state["exp_avg"],
        state["exp_avg_sq"],
        state.get("exp_avg_absmax"),
        state.get("exp_avg_sq_absmax"),
        state["step"],
        state["skipped"],
    )


def tensor_bytes(state: Mapping[str, Any]) -> int:
    """Bytes of the tensors in one parameter's state."""
    return sum(value.nbytes for value in state.values() if isinstance(value, Tensor))


def check_state(state: Mapping[str, Any], param: Tensor, layout: Layout, where: str) -> None:
    """Raises ValueError naming the parameter unless a loaded state is whole, of this layout and finite."""
    expected = layout.new_state(torch.empty_like(param, device="meta"))
    if not isinstance(state, Mapping):
        raise ValueError(f"{where}: its state is a {type(state).__name__}, expected a dict; the state is damaged")
    if set(state) != set(expected):
        missing, extra = sorted(set(expected) - set(state)), sorted(set(state) - set(expected))
        raise ValueError(
            f"{where}: the state's fields don't fit: missing {missing or 'none'}, unexpected {extra or 'none'}; "
            "it was saved by another optimizer, for another rank, or is incomplete"
        )
    for key, want in expected.items():
        got = state[key]
        if not isinstance(want, Tensor):
            if type(got) is not int or (key == "block_size" and got != want) or got < 0:
                raise ValueError(f"{where}: {key} is {got!r}, expected an integer like {want}; the state is damaged")
            continue
        if not isinstance(got, Tensor) or got.shape != want.shape:
            shape = tuple(got.shape) if isinstance(got, Tensor) else type(got).__name__
            raise ValueError(
                f"{where}: {key} has shape {shape}, expected {tuple(want.shape)}; "
                "build the model and the optimizer as they were when the checkpoint was saved"
            )
        dtypes = WEIGHT_DTYPES if key in _BASES else (want.dtype,)
        if got.dtype not in dtypes:
            raise ValueError(f"{where}: {key} has dtype {got.dtype}, expected {want.dtype}; the state was cast")
        _check_values(key, got, where)


def _check_values(key: str, value: Tensor, where: str) -> None:
    if value.is_floating_point() and not bool(torch.isfinite(value).all()):
        raise ValueError(f"{where}: {key} holds NaN or Inf; go back to an earlier checkpoint")
    signed = key in ("exp_avg", *_BASES)
    if not signed and value.dtype != torch.uint8 and bool((value < 0).any()):
        raise ValueError(f"{where}: {key} holds negative values; go back to an earlier checkpoint")
    if key == "step" and float(value) != int(value):
        raise ValueError(f"{where}: step is {float(value)}, expected a whole number; the state is damaged")


def describe_group(group: Mapping[str, Any], layouts: list[Layout]) -> str:
    """One line of what a group does, for the optimizer's repr."""
    ranks = sorted({layout.rank for layout in layouts if layout.rank is not None})
    projected = sum(layout.rank is not None for layout in layouts)
    parts = []
    if projected:
        parts.append(
            f"{projected} projected to rank {', '.join(map(str, ranks))} ({group['proj_type']}, scale "
            f"{float(group['scale']):g}, refreshed every {group['update_proj_gap']} steps, {group['refresh_method']})"
        )
    if projected < len(layouts):
        parts.append(f"{len(layouts) - projected} at full rank")
    parts += [f"lr {float(group['lr']):g}", f"weight_decay {float(group['weight_decay']):g}"]
    return "; ".join(parts)
