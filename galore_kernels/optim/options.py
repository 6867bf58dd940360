"""The options of a parameter group: defaults, validation, and which parameters they project.

The keys are galore_torch's (``rank``, ``update_proj_gap``, ``scale``, ``proj_type``) and torch.optim's.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from numbers import Real
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from galore_kernels.nn import carried_gradient_of
from galore_kernels.ops.adam import WEIGHT_DTYPES, overlaps
from galore_kernels.quantizers import BASIS_FORMATS
from galore_kernels.subspace import (
    MOMENTS_ON_REFRESH,
    PROJ_TYPES,
    RANK_MULTIPLE,
    REFRESH_METHODS,
    REFRESH_SCHEDULES,
    projection_side,
)

if TYPE_CHECKING:
    from galore_kernels.optim.rules.rule import Rule

#: The ``rank`` that is chosen for each matrix at the first step.
AUTO = "auto"

#: Options that decide the shape of the state; a checkpoint must have been made with the same ones.
STRUCTURAL = ("rank", "proj_type", "project_nd", "basis_format")

#: Keys of every optimizer's groups; a rule adds its own.
COMMON = (
    "params",
    "param_names",
    "lr",
    "weight_decay",
    "rank",
    "rank_budget",
    "chosen_ranks",
    "update_proj_gap",
    "scale",
    "proj_type",
    "refresh_method",
    "refresh_schedule",
    "warm_start",
    "async_refresh",
    "moments_on_refresh",
    "basis_format",
    "stochastic_rounding",
    "maximize",
    "project_nd",
    "seed",
    "rank_is_explicit",
)

#: Of the keys that a constructor may leave out.
SUBSPACE_DEFAULTS = {
    "rank_budget": None,
    "chosen_ranks": None,
    "refresh_method": "randomized",
    "refresh_schedule": "periodic",
    "warm_start": False,
    "async_refresh": False,
    "moments_on_refresh": "keep",
    "basis_format": None,
}


def number(value: object) -> float | None:
    """``value`` as a float if it is a real number (a 0-d tensor counts), else None."""
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex():
        return float(value)
    if isinstance(value, Real) and not isinstance(value, bool):
        return float(value)
    return None


def expect(where: str, key: str, value: object, ok: bool, expected: str, remedy: str) -> None:
    """Raises the ValueError of a group's option unless it is ``ok``."""
    if not ok:
        raise ValueError(f"{key}={value!r} in {where}: expected {expected}; {remedy}")


def expect_number(where: str, group: Mapping[str, Any], key: str, *, positive: bool, remedy: str) -> None:
    """Raises ValueError unless the option is a finite number, positive or at least not negative."""
    value = number(group[key])
    bound = "> 0" if positive else ">= 0"
    ok = value is not None and math.isfinite(value) and (value > 0 if positive else value >= 0)
    expect(where, key, group[key], ok, f"a finite number {bound}", remedy)


def _expect_count(where: str, group: Mapping[str, Any], key: str, remedy: str) -> None:
    value = group[key]
    ok = isinstance(value, int) and not isinstance(value, bool) and value >= 1
    expect(where, key, value, ok, "an integer >= 1", remedy)


def expect_choice(where: str, group: Mapping[str, Any], key: str, choices: tuple[str, ...]) -> None:
    """Raises ValueError unless the option is one of ``choices``."""
    value = group[key]
    if value in choices:
        return
    close = difflib.get_close_matches(str(value), choices, n=1)
    remedy = f'did you mean "{close[0]}"?' if close else "choose one of them"
    expect(where, key, value, False, f"one of {', '.join(choices)}", remedy)


def check_lr(group: Mapping[str, Any], where: str) -> None:
    """Checks the learning rate. Raises ValueError; of a tensor on a device the number isn't read: that would wait."""
    lr = group["lr"]
    if not (isinstance(lr, Tensor) and lr.device.type != "cpu" and lr.numel() == 1 and not lr.is_complex()):
        expect_number(where, group, "lr", positive=False, remedy="1e-3 to 1e-2 are usual for GaLore")


def check_scheduled(group: Mapping[str, Any], where: str, rule: Rule) -> None:
    """Checks what a scheduler may have changed since the group was made. Raises ValueError naming key and group."""
    rule.check(group, where)
    expect_number(where, group, "weight_decay", positive=False, remedy="0 turns it off")
    expect_choice(where, group, "proj_type", PROJ_TYPES)
    expect_number(where, group, "scale", positive=True, remedy="0.25 is GaLore's default")
    _expect_count(where, group, "update_proj_gap", "200 is GaLore's default")
    expect_choice(where, group, "refresh_schedule", REFRESH_SCHEDULES)
    expect_choice(where, group, "moments_on_refresh", MOMENTS_ON_REFRESH)


def check_group(group: Mapping[str, Any], where: str, rule: Rule) -> None:
    """Checks every option of a complete group. Raises ValueError naming the key, the group and the remedy."""
    known = rule.keys
    for key in group:
        # "rnak" is a typo; "lr_scale", "d_scale" and "lr0" are other libraries' own keys.
        close = difflib.get_close_matches(key, known, n=1, cutoff=0.75)
        if (
            key not in known
            and close
            and abs(len(close[0]) - len(key)) <= max(1, len(close[0]) // 6)
            and key[-1:].isalpha()
        ):
            raise ValueError(f'unknown key "{key}" in {where}: did you mean "{close[0]}"?')
    check_scheduled(group, where, rule)
    if group["rank"] == AUTO:
        _expect_count(where, group, "rank_budget", 'rank="auto" divides so many bytes of state among the matrices')
    elif group["rank"] is not None:
        _expect_count(where, group, "rank", 'rank=None keeps the group at full rank, "auto" chooses')
        budget = group["rank_budget"]
        expect(where, "rank_budget", budget, budget is None, 'None unless rank="auto"', "leave one of them out")
    ranks, count = group["chosen_ranks"], len(group.get("params", ()))
    whole = isinstance(ranks, (tuple, list)) and len(ranks) == count and all(map(_is_chosen_rank, ranks))
    expect(where, "chosen_ranks", ranks, ranks is None or whole, "None, or a rank for each parameter", "leave it out")
    expect_choice(where, group, "refresh_method", REFRESH_METHODS)
    if group["basis_format"] is not None:
        expect_choice(where, group, "basis_format", BASIS_FORMATS)
        both = group["proj_type"] == "full"
        expect(where, "basis_format", group["basis_format"], not both, 'None with proj_type="full"', "leave it out")
    seed = group["seed"]
    is_seed = isinstance(seed, int) and not isinstance(seed, bool) and seed >= 0
    expect(where, "seed", seed, is_seed, "an integer >= 0", "0 is the default")
    for key in ("stochastic_rounding", "maximize", "project_nd", "warm_start", "async_refresh"):
        expect(where, key, group[key], isinstance(group[key], bool), "True or False", "pass a bool")


def _is_chosen_rank(rank: object) -> bool:
    return type(rank) is int and rank >= 0 and rank % RANK_MULTIPLE == 0


def check_param(param: object, name: str) -> None:
    """Raises TypeError or ValueError unless ``param`` is a tensor that can be optimized."""
    if not isinstance(param, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(param).__name__}; pass model.parameters()")
    if param.layout != torch.strided:
        raise ValueError(f"{name}: expected a dense parameter, got {param.layout}; call .to_dense()")
    if param.dtype not in WEIGHT_DTYPES:
        raise ValueError(
            f"{name}: expected float32, bfloat16 or float16, got {param.dtype}; "
            "convert it, or give it to another optimizer"
        )
    if not (param.is_leaf or param.retains_grad):
        raise ValueError(f"{name}: expected a leaf tensor, got a result of {param.grad_fn}; pass the parameter itself")
    if overlaps(param) and carried_gradient_of(param) is None:  # those have no elements
        raise ValueError(f"{name}: expected elements of its own, got an overlapping or expanded tensor; clone it")


def matrix_shape(shape: torch.Size) -> tuple[int, int]:
    """A tensor of two or more dimensions seen as a matrix: the first against all others, as convolutions are."""
    return shape[0], math.prod(shape[1:])


def projected_rank(param: Tensor, group: Mapping[str, Any]) -> int | None:
    """The rank ``param`` is projected to, or None if it takes full-rank Adam.

    Matrices (and, with ``project_nd``, tensors of more dimensions) are projected. Where the group itself named its
    rank, all of them are, the rank clamped to min(m, n) as galore_torch does; where it inherited the constructor's,
    those with min(m, n) > rank. With ``rank="auto"``, those with min(m, n) > 16.
    """
    rank = group["rank"]
    if rank is None or param.numel() == 0 or not (param.dim() == 2 or (param.dim() > 2 and group["project_nd"])):
        return None
    smaller = min(matrix_shape(param.shape))
    if rank == AUTO:
        return _chosen_rank(param, group) if smaller > RANK_MULTIPLE else None
    if group["rank_is_explicit"]:
        return min(int(rank), smaller)
    return int(rank) if smaller > rank else None


def _chosen_rank(param: Tensor, group: Mapping[str, Any]) -> int:
    """The rank that was chosen at the first step; before it, the least that can be."""
    if group["chosen_ranks"] is None:
        return RANK_MULTIPLE
    rank: int = next(rank for rank, own in zip(group["chosen_ranks"], group["params"], strict=True) if own is param)
    most = min(matrix_shape(param.shape))
    if not 0 < rank <= most:
        raise ValueError(
            f"chosen_ranks: {rank} for a matrix of shape {tuple(param.shape)}, expected a multiple of {RANK_MULTIPLE} "
            f"up to {most}; the checkpoint is damaged, or the option was edited: leave it out"
        )
    return rank


def side_of(param: Tensor, group: Mapping[str, Any]) -> str:
    """ "left", "right" or "full" for a projected parameter."""
    return projection_side(group["proj_type"], *matrix_shape(param.shape))
