"""``import_state_dict``: the state of galore_torch's, bitsandbytes' and torch's optimizers, made the state of ours."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from galore_kernels.ops import dequantize_blockwise, quantize_blockwise
from galore_kernels.ops.adafactor_update import moment_shapes
from galore_kernels.ops.projection import long_short
from galore_kernels.optim.base import LowRankOptimizer
from galore_kernels.optim.options import matrix_shape
from galore_kernels.optim.refresh import drawn, schedule_of
from galore_kernels.optim.rules import Adafactor, Apollo
from galore_kernels.optim.serialization import HEADER, add_header, check_sizes, merged_groups, with_header
from galore_kernels.optim.state import Layout
from galore_kernels.optim.update import Update
from galore_kernels.quantizers import SIGNED_ZERO_CODE, UNSIGNED_ZERO_CODE, block_count, dynamic_map
from galore_kernels.subspace import RefreshRecord

#: Where bitsandbytes (since 0.49) hides the tensors of a state from FSDP.
_HIDDEN = "__bnb_optimizer_quant_state__"

#: The group keys of theirs that say nothing here.
_DROPPED = (
    "alpha", "amsgrad", "capturable", "correct_bias", "decoupled_weight_decay", "differentiable", "foreach", "fused",
    "t_alpha", "t_beta3",
)  # fmt: skip

_TURNED = {"exp_avg_sq_row": "exp_avg_sq_col", "exp_avg_sq_col": "exp_avg_sq_row"}

#: Largest deviation of a basis vector's length from 1: rounding of each entry to bfloat16 is 2^-9 of it.
_UNIT_TOLERANCE = 0.01


def is_own(state_dict: Mapping[str, Any]) -> bool:
    """Whether an optimizer of this library saved it."""
    return isinstance(state_dict, Mapping) and HEADER in with_header(state_dict)


@torch.no_grad()
def import_state_dict(optimizer: LowRankOptimizer, state_dict: Mapping[str, Any]) -> None:
    """Loads the state dict of another package's optimizer, so that its training goes on where it was.

    Understood are those of galore_torch's ``GaLoreAdamW`` and ``GaLoreAdamW8bit``, apollo_torch's ``APOLLOAdamW`` and
    ``QAPOLLOAdamW``, bitsandbytes' ``AdamW8bit`` (and ``AdamW``), and ``torch.optim.AdamW``; for a
    ``GaLoreFusedAdafactor`` those of galore_torch's ``GaLoreAdafactor`` and transformers' ``Adafactor``. Projectors may
    be the packages' objects, as ``state_dict()`` holds them (of a file, ``torch.load(path, weights_only=False)`` gives
    them where the package is installed), or dicts of their attributes. Moments are decoded, turned to long-major and,
    where the optimizer's are 8-bit, encoded; those in bitsandbytes' format that need no turning keep their codes. A
    second moment of theirs that was rounded to zero becomes the smallest positive one. Random bases are drawn anew: to
    APOLLO the import is one more refresh, which leaves the moments as its own do. The next refresh is at the step at
    which theirs would be, but for staggered and adaptive schedules, which begin anew; ``subspace_report`` counts
    refreshes from here on, and knows no captured energy before the next.

    The options of a group that both packages have (``lr``, ``betas``, ``eps``, ``weight_decay``, ``update_proj_gap``,
    ``scale``, a scheduler's ``initial_lr``) become the state dict's, as with any ``load_state_dict``; others stay.

    Args:
        optimizer: with the same parameters in the same groups and order, and the same ``rank`` and ``proj_type``.
        state_dict: theirs. Without ``"param_groups"`` the parameters are counted through, and all options stay.

    Raises:
        TypeError: ``optimizer`` is none of this library's. ValueError: the state dict is of another optimizer or other
            groups, ranks or shapes, lacks fields or holds NaN. The message names the parameter; nothing has changed.
    """
    if not isinstance(optimizer, LowRankOptimizer):
        raise TypeError(
            f"optimizer: expected one of galore_kernels, got {type(optimizer).__name__}; pass the one that a wrapper "
            "wraps"
        )
    if is_own(state_dict):
        raise ValueError("state_dict: saved by an optimizer of galore_kernels; pass it to load_state_dict")
    groups = _groups(optimizer, state_dict)
    merged = [group for group in merged_groups(groups, optimizer.param_groups, optimizer.rule) for _ in group["params"]]
    indices = [index for group in groups for index in group["params"]]
    saved = state_dict["state"]
    if len(set(indices)) != len(indices) or not set(saved) <= set(indices):
        raise ValueError("state_dict: its state does not belong to its param_groups; the checkpoint is damaged")
    state = {}
    for index, update, group in zip(indices, optimizer.listed(), merged, strict=True):
        entry = saved.get(index)
        before_a_step = isinstance(entry, Mapping) and set(entry) == {"seed"}  # apollo_torch's
        if entry and not before_a_step and (step := _step(entry, update.name)):
            own = replace(update, group=group, layout=Layout.of(update.param, group, optimizer.rule))
            state[index] = _converted({**entry, **entry.get(_HIDDEN, {})}, step, own)
    optimizer.load_state_dict(add_header({"state": state, "param_groups": groups}, type(optimizer).__name__))


def _groups(optimizer: LowRankOptimizer, state_dict: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The optimizer's groups with the state dict's options and parameters' indices."""
    current = optimizer.param_groups
    whole = isinstance(state_dict, Mapping) and isinstance(state_dict.get("state"), Mapping)
    if whole and "param_groups" not in state_dict:
        counter = iter(range(sum(len(group["params"]) for group in current)))
        return [{**group, "params": [next(counter) for _ in group["params"]]} for group in current]
    theirs = state_dict.get("param_groups") if whole else None
    if not isinstance(theirs, list) or not all(
        isinstance(group, Mapping) and isinstance(group.get("params"), list) for group in theirs
    ):
        raise ValueError('state_dict: expected a dict with "state" and "param_groups"; pass theirs.state_dict()')
    check_sizes(theirs, current)
    groups = []
    for index, (group, own) in enumerate(zip(theirs, current, strict=True)):
        where = f"state_dict, param group {index}"
        for key, wanted in (("correct_bias", True), ("amsgrad", False)):
            if group.get(key, wanted) != wanted:
                raise ValueError(f"{where}: {key}={group[key]!r}, expected {wanted}; its training can't be continued")
        if not group.get("decoupled_weight_decay", True) and group.get("weight_decay"):
            raise ValueError(f"{where}: expected decoupled weight decay, got Adam's; its training can't be continued")
        kept = {key: value for key, value in own.items() if key != "param_names"}
        options = {key: value for key, value in group.items() if key not in _DROPPED}
        groups.append({**kept, **options, "rank": group.get("rank")})
    return groups


def _step(state: Any, name: str) -> int:
    """The number of steps that were taken."""
    step = state.get("step") if isinstance(state, Mapping) else None
    number = float(step) if isinstance(step, (int, float, Tensor)) and torch.as_tensor(step).numel() == 1 else -1.0
    if not (number >= 0 and number.is_integer()):
        raise ValueError(f"{name}: expected a state with a count of steps, got step={step!r}; the state is damaged")
    return int(number)


def _converted(state: Mapping[str, Any], step: int, update: Update) -> dict[str, Any]:
    """One parameter's state as ours is."""
    layout, param = update.layout, update.param
    if layout.rank is None and "projector" in state:
        raise ValueError(
            f"{update.name}: the state is of a projected matrix, expected one at full rank; give its group the key rank"
        )
    if layout.rank is not None:
        _check_kind(state, update)
    entry = layout.new_state(param)
    entry["step"].fill_(step)
    entry |= (_factored_moments if isinstance(layout.rule, Adafactor) else _moments)(state, update)
    if layout.draws:
        entry |= drawn(update, 0)
    elif layout.rank is not None:
        for name, basis in _bases(_projector(state, update), update).items():
            entry |= layout.stored_basis(name, basis.contiguous(), param.dtype)
    if "scaled_norm" in entry:
        entry["scaled_norm"].copy_(_norm(state, update))
    if layout.rank is not None:
        entry |= asdict(_record(step, update))
    return entry


def _check_kind(state: Mapping[str, Any], update: Update) -> None:
    """Raises ValueError unless GaLore's state is for one of GaLore's optimizers, and APOLLO's for one of APOLLO's."""
    rule = update.layout.rule
    theirs, ours = "seed" in state, isinstance(rule, Apollo)  # apollo_torch gives every parameter a seed
    if theirs != ours:
        names = {True: "APOLLO", False: "GaLore"}
        raise ValueError(
            f"{update.name}: the state is {names[theirs]}'s, expected {names[ours]}'s: the moments of one say nothing "
            f"to the other; construct one of {names[theirs]}'s optimizers"
        )
    if update.layout.draws and (rank := _projector(state, update)["rank"]) > (update.layout.rank or 0):
        raise ValueError(
            f"{update.name}: its random projection has rank {rank}, which is more than its matrix has dimensions; here "
            f"it has {update.layout.rank}, and other moments: begin with fresh state"
        )


def _tensor(state: Mapping[str, Any], key: str, update: Update, shape: tuple[int, ...]) -> Tensor:
    """The tensor ``key`` on the parameter's device."""
    value = state.get(key)
    if not isinstance(value, Tensor) or tuple(value.shape) != shape:
        got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(
            f"{update.name}: {key} of the state: expected a tensor of shape {shape}, got {got}; build model and groups "
            "as they were when it was saved"
        )
    return value.to(update.param.device)


def _moments(state: Mapping[str, Any], update: Update) -> dict[str, Tensor]:
    """The entries of the state that hold the moments."""
    layout, result = update.layout, {}
    turned = layout.side == "left"
    shape = layout.moments[::-1] if turned else layout.moments
    theirs = ("exp_avg", "exp_avg_sq") if "exp_avg" in state else ("state1", "state2")
    moments = [_tensor(state, key, update, shape) for key in theirs]
    absmax: list[Tensor | None] = [None, None]
    if any(moment.dtype == torch.uint8 for moment in moments):
        absmax = [_absmax(state, number, moment, update) for number, moment in zip((1, 2), moments, strict=True)]
        # What isn't zero has seen gradients: the step after one of 0 would be up to 254 lr.
        lost = (moments[1] == UNSIGNED_ZERO_CODE) & (moments[0] != SIGNED_ZERO_CODE)
        moments[1] = moments[1].masked_fill(lost, UNSIGNED_ZERO_CODE + 1)
    for key, moment, scale in zip(("exp_avg", "exp_avg_sq"), moments, absmax, strict=True):
        signed = key == "exp_avg"
        if scale is not None and layout.eight_bit and not turned:
            result[key], result[f"{key}_absmax"] = moment, scale
            continue
        values = (moment if scale is None else dequantize_blockwise(moment, scale, signed)).float()
        _check_values(values, key, update)
        values = (values.T if turned else values).contiguous()
        if layout.eight_bit:
            result[key], result[f"{key}_absmax"] = quantize_blockwise(values, signed)
        else:
            result[key] = values
    return result


def _factored_moments(state: Mapping[str, Any], update: Update) -> dict[str, Tensor]:
    """The entries of the state that hold Adafactor's moments: where it is turned, their columns are our rows."""
    layout, result = update.layout, {}
    turned = layout.side == "left"
    shape = layout.moments[::-1] if turned else layout.moments
    for key, of in moment_shapes(shape, first_moment=layout.first_moment).items():
        values = _tensor(state, key, update, of).float()
        _check_values(values, key, update)
        result[_TURNED.get(key, key) if turned else key] = (
            values.T if turned and key == "exp_avg" else values
        ).contiguous()
    return result


def _check_values(values: Tensor, key: str, update: Update) -> None:
    """Raises ValueError unless ``values`` may be a moment's, first or second."""
    if not bool(torch.isfinite(values).all()) or (key != "exp_avg" and bool((values < 0).any())):
        raise ValueError(f"{update.name}: {key} of the state holds NaN, Inf or a negative square; it is damaged")


def _absmax(state: Mapping[str, Any], number: int, codes: Tensor, update: Update) -> Tensor:
    """The largest magnitudes of the blocks of bitsandbytes' first or second moment, which is checked."""
    qmap = _tensor(state, f"qmap{number}", update, (256,))
    absmax = _tensor(state, f"absmax{number}", update, (block_count(codes.numel()),))
    if not torch.equal(qmap, dynamic_map(number == 1).to(qmap)) or absmax.dtype != torch.float32:
        raise ValueError(
            f"{update.name}: qmap{number} and absmax{number} of the state: expected bitsandbytes' dynamic 8-bit code "
            "in float32, got others; the state was cast or is damaged"
        )
    if codes.dtype != torch.uint8 or not codes.is_contiguous():
        raise ValueError(
            f"{update.name}: state{number} of the state: expected contiguous uint8 codes, got {codes.dtype} with "
            f"strides {codes.stride()}; the parameter was strided, or the state is damaged"
        )
    return absmax


def _projector(state: Mapping[str, Any], update: Update) -> Mapping[str, Any]:
    """The attributes of a projector, which must be what its group says."""
    projector, group, name = state.get("projector"), update.group, update.name
    if projector is None:
        raise ValueError(
            f"{name}: the state holds no projector, expected that of a matrix projected to rank {update.layout.rank}; "
            "give its group no rank (rank=None)"
        )
    attributes: Mapping[str, Any] = projector if isinstance(projector, Mapping) else vars(projector)
    for key in ("rank", "update_proj_gap", "scale", "proj_type"):
        if attributes.get(key) != group[key]:
            raise ValueError(
                f"{name}: its projector has {key}={attributes.get(key)!r}, its group {group[key]!r}; galore_torch goes "
                "by the projector: set the group's to the same"
            )
    return attributes


def _bases(projector: Mapping[str, Any], update: Update) -> dict[str, Tensor]:
    """Our bases, (S, r) float32: theirs on the left, theirs transposed on the right."""
    layout, name, theirs = update.layout, update.name, projector.get("ortho_matrix")
    long, short = long_short(matrix_shape(update.weight.shape), layout.side or "right")
    rank = layout.rank or 0
    if "long_basis" in layout.bases:
        pair = theirs if isinstance(theirs, (list, tuple)) and len(theirs) == 2 else (None, None)
        given = {"ortho_matrix[0]": pair[0], "ortho_matrix[1]": pair[1]}
        bases = {
            "long_basis": _tensor(given, "ortho_matrix[0]", update, (long, rank)),
            "basis": _tensor(given, "ortho_matrix[1]", update, (rank, short)).T,
        }
    elif layout.side == "left":
        bases = {"basis": _tensor(projector, "ortho_matrix", update, (short, rank))}
    else:
        bases = {"basis": _tensor(projector, "ortho_matrix", update, (rank, short)).T}
    for basis in bases.values():
        lengths = torch.linalg.vector_norm(basis.float(), dim=0)
        if not bool(((lengths - 1).abs() <= _UNIT_TOLERANCE).all()):
            raise ValueError(
                f"{name}: ortho_matrix of its projector: expected vectors of length 1, got {float(lengths.min()):.3g} "
                f"to {float(lengths.max()):.3g}; it is damaged, or not galore_torch's"
            )
    return {key: basis.float() for key, basis in bases.items()}


def _norm(state: Mapping[str, Any], update: Update) -> Tensor:
    """That of APOLLO's last scaled gradient; 0 where its limiter was off."""
    norm = _tensor(state, "scaled_grad", update, ()).float() if "scaled_grad" in state else torch.zeros(())
    if "state1" in state:  # QAPOLLOAdamW's, which is taken after bias correction
        (beta1, beta2), step = update.group["betas"], _step(state, update.name)
        norm = norm * ((1 - beta1**step) / math.sqrt(1 - beta2**step))
    if not 0 <= float(norm) < float("inf"):
        raise ValueError(f"{update.name}: scaled_grad of the state is {float(norm)}, expected a norm; it is damaged")
    return norm


def _record(step: int, update: Update) -> RefreshRecord:
    """As after a first refresh, at galore_torch's last multiple of the gap."""
    gap = update.group["update_proj_gap"]
    last = (step - 1) // gap * gap
    # A warm start has nothing to compare with, so that it has to capture nearly everything.
    record = RefreshRecord(refreshes=1, refreshed_at=last, captured_cold=1.0)
    planned = schedule_of(update).planned(record, last)
    # A staggered matrix whose turn has passed waits for the next: due at once, they would all be so for good.
    return planned if planned.next_refresh >= step else replace(planned, next_refresh=planned.next_refresh + gap)
