"""The state of one parameter: its layout (the one definition), its making, its counting and its checking."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from galore_kernels.nn import lowrank_gradient_of
from galore_kernels.ops.adam import WEIGHT_DTYPES, AdamState
from galore_kernels.ops.projection import long_short
from galore_kernels.optim.options import AUTO, matrix_shape, projected_rank, side_of
from galore_kernels.optim.shard import Shard, shard_of
from galore_kernels.quantizers import BASIS_CODE_DTYPES, BLOCK_SIZE, basis_code_shape, dequantize_basis, quantize_basis
from galore_kernels.subspace import RANK_MULTIPLE, RefreshRecord

if TYPE_CHECKING:
    from galore_kernels.optim.rules.rule import Rule, Spec

_BASES = ("basis", "long_basis")


@dataclass(frozen=True)
class Layout:
    """What the state of a parameter consists of.

    Attributes:
        rule: what the moments are for.
        rank: of the projection, or None at full rank.
        side: of the update operation ("left" or "right"), or None at full rank.
        bases: name -> shape of the bases, or of their codes; empty at full rank.
        basis_format: of a quantized basis, or None.
        moments: shape of what the moments are of: the gradient, or its projection; of a ``shard``, this process' part.
        eight_bit: whether they are 8-bit.
        short: the dimension that is projected; 0 at full rank.
        draws: whether the basis is drawn from a seed, and not kept.
        first_moment: whether there is one.
        shard: what this process has of a DTensor, else None.
    """

    rule: Rule
    rank: int | None
    side: str | None
    bases: dict[str, tuple[int, int]]
    moments: tuple[int, ...]
    eight_bit: bool
    basis_format: str | None = None
    short: int = 0
    draws: bool = False
    first_moment: bool = True
    shard: Shard | None = None

    @property
    def sums(self) -> bool:
        """Whether the projection is a sum over processes, of which each has some terms; its moments are then whole."""
        return self.shard is not None and self.side == "left"

    def operands(self, state: Mapping[str, Any]) -> Mapping[str, Any]:
        """``state`` as the update of this process' part takes it: of the bases the rows that belong to it."""
        return {**state, "basis": state["basis"][self.shard.rows]} if self.shard and self.sums else state

    @classmethod
    def of(cls, param: Tensor, group: Mapping[str, Any], rule: Rule) -> Layout:
        """The layout that ``param`` has in ``group``, for the optimizer's rule."""
        factored = lowrank_gradient_of(param)
        rank = projected_rank(param, group) if factored is None else factored.rank
        first, shard = rule.has_first_moment(group), shard_of(param)
        if rank is None:
            shape = tuple(param.shape) if shard is None else shard.shape
            eight_bit = rule.is_eight_bit(param.numel())
            return cls(rule, None, None, {}, shape, eight_bit, first_moment=first, shard=shard)
        side = side_of(param, group) if factored is None else factored.side
        both = side == "full"
        side = "right" if both else side
        long, short = long_short(matrix_shape(param.shape if factored is None else factored.weight.shape), side)
        basis_format = group["basis_format"]
        draws = rule.draws(group)
        of_basis = (short, rank) if basis_format is None else basis_code_shape(short, rank, basis_format)
        bases = {} if draws else {"basis": of_basis}
        if both:
            bases["long_basis"] = (long, rank)
        moments = (rank if both else long, rank)
        # Chosen ranks are fitted to a budget: moments have the format of the least, so that bytes rise with ranks.
        least = min(rank, RANK_MULTIPLE) if group["rank"] == AUTO else rank
        eight_bit = rule.is_eight_bit(least * (least if both else long))
        if shard is not None and side == "right":
            moments = (shard.size, rank)
        return cls(rule, rank, side, bases, moments, eight_bit, basis_format, short, draws, first, shard)

    def fits(self, state: Mapping[str, Any]) -> bool:
        """Whether the tensors of ``state`` have this layout's shapes and, of moments and codes, its dtypes."""
        if self.draws != ("basis_seed" in state):
            return False
        specs: dict[str, Spec] = self.rule.moments(self)
        if self.basis_format is not None and self.bases:
            specs["basis"] = (self.bases["basis"], BASIS_CODE_DTYPES[self.basis_format])
        return all(key in state and tuple(state[key].shape) == shape for key, shape in self.bases.items()) and all(
            key in state and tuple(state[key].shape) == shape and state[key].dtype == dtype
            for key, (shape, dtype) in specs.items()
        )

    def new_state(self, param: Tensor) -> dict[str, Any]:
        """A fresh state on the parameter's device; bases are zero until refreshed.

        They have the parameter's dtype unless they are quantized.
        """
        state: dict[str, Any] = {
            "step": torch.zeros((), dtype=torch.float32, device=param.device),
            "skipped": torch.zeros((), dtype=torch.int64, device=param.device),
            **self.rule.new_tensors(self, param.device),
        }
        if self.eight_bit:
            state["block_size"] = BLOCK_SIZE
        for name, shape in self.bases.items():
            dtype = param.dtype if self.basis_format is None else BASIS_CODE_DTYPES[self.basis_format]
            state[name] = torch.zeros(shape, dtype=dtype, device=param.device)
        if self.rank is not None:
            if self.basis_format is not None:
                state["basis_scale"] = torch.zeros(self.rank, dtype=torch.float32, device=param.device)
            if self.draws:
                state["basis_seed"] = 0
            state.update(asdict(RefreshRecord()))
        return state

    def stored_basis(self, name: str, basis: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        """The entries of the state that hold ``basis``, (S, r) float32; ``dtype``: the parameter's."""
        if self.basis_format is None:
            return {name: basis.to(dtype)}
        codes, scale = quantize_basis(basis, self.basis_format)
        return {name: codes, "basis_scale": scale}


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


def refresh_record(state: Mapping[str, Any]) -> RefreshRecord:
    """What ``state`` remembers of the refreshes of its basis."""
    return RefreshRecord(**{field.name: state[field.name] for field in fields(RefreshRecord)})


def float_basis(state: Mapping[str, Any], name: str) -> Tensor:
    """The basis ``name`` in float32."""
    scale = state.get("basis_scale")
    return state[name].float() if scale is None else dequantize_basis(state[name], scale)


def tensor_bytes(state: Mapping[str, Any]) -> int:
    """Bytes of the tensors in one parameter's state."""
    return sum(value.nbytes for value in state.values() if isinstance(value, Tensor))


def check_state(state: Mapping[str, Any], param: Tensor, layout: Layout, where: str) -> None:
    """Raises ValueError naming the parameter unless a loaded state is whole, of this layout and finite."""
    expected = layout.new_state(torch.empty(0, dtype=param.dtype, device="meta"))
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
            if type(got) is not type(want) or (key == "block_size" and got != want) or not 0 <= got < math.inf:
                raise ValueError(f"{where}: {key} is {got!r}, expected a number like {want}; the state is damaged")
            continue
        if not isinstance(got, Tensor) or got.shape != want.shape:
            shape = tuple(got.shape) if isinstance(got, Tensor) else type(got).__name__
            raise ValueError(
                f"{where}: {key} has shape {shape}, expected {tuple(want.shape)}; "
                "build the model and the optimizer as they were when the checkpoint was saved"
            )
        dtypes = WEIGHT_DTYPES if key in _BASES and layout.basis_format is None else (want.dtype,)
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


def _describe_ranks(group: Mapping[str, Any], ranks: list[int]) -> str:
    if group["rank"] != AUTO:
        return f"rank {', '.join(map(str, ranks))}"
    chosen = "chosen at the first step" if group["chosen_ranks"] is None else f"{ranks[0]} to {ranks[-1]}"
    return f"ranks {chosen}, in {group['rank_budget']} bytes"


def _describe_refresh(group: Mapping[str, Any], rule: Rule) -> str:
    parts = [f"refreshed every {group['update_proj_gap']} steps"]
    parts.append("drawn" if rule.draws(group) else group["refresh_method"])
    if group["refresh_schedule"] != "periodic":
        parts.append(group["refresh_schedule"])
    parts += [name for key, name in (("warm_start", "warm"), ("async_refresh", "asynchronous")) if group[key]]
    if group["moments_on_refresh"] != "keep":
        parts.append(f"moments {group['moments_on_refresh']}")
    if group["basis_format"] is not None:
        parts.append(f"{group['basis_format']} basis")
    return ", ".join(parts)


def describe_group(group: Mapping[str, Any], layouts: list[Layout], rule: Rule) -> str:
    """One line of what a group does, for the optimizer's repr."""
    ranks = sorted({layout.rank for layout in layouts if layout.rank is not None})
    projected = sum(layout.rank is not None for layout in layouts)
    parts = []
    if projected:
        parts.append(
            f"{projected} projected to {_describe_ranks(group, ranks)} ({group['proj_type']}, scale "
            f"{float(group['scale']):g}, {_describe_refresh(group, rule)})"
        )
    if projected < len(layouts):
        parts.append(f"{len(layouts) - projected} at full rank")
    lr = "by the step" if group["lr"] is None else f"{float(group['lr']):g}"
    parts += [f"lr {lr}", f"weight_decay {float(group['weight_decay']):g}"]
    return "; ".join(parts)
