"""One parameter's refresh: a basis found in its gradient, and the moments in that basis."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from galore_kernels import ops
from galore_kernels.optim.options import matrix_shape
from galore_kernels.optim.rules import Adam
from galore_kernels.optim.state import Layout, adam_state, float_basis, refresh_record
from galore_kernels.optim.update import Update, derived_seed
from galore_kernels.subspace import (
    Gradient,
    RefreshRecord,
    Schedule,
    ShardedGradient,
    Subspace,
    find_subspaces,
    full_precision,
    in_batches,
    project_rows,
)

Changes = dict[str, Any]

#: The subspace of each of a parameter's bases.
Found = dict[str, Subspace]


#: What a state that is not there yet says of refreshes.
_FRESH: dict[str, Any] = {"step": 0, "skipped": 0, **asdict(RefreshRecord())}


def is_due(update: Update, state: Mapping[str, Any]) -> bool:
    """Whether the parameter's basis has to be found in this step. Reads its step counter.

    Not with a gradient that is projected already, of which there is nothing to find it in: see ``factored``.
    """
    projects = update.layout.rank is not None and not update.is_lowrank
    return projects and counted(update.layout, state) >= due_at(update, state)


def counted(layout: Layout, state: Mapping[str, Any]) -> int:
    """Steps as the schedule counts them: those taken; of a part skipped ones too, which other parts may have taken."""
    return int(state["step"]) + (int(state["skipped"]) if layout.shard is not None else 0)


def due_at(update: Update, state: Mapping[str, Any]) -> int:
    """The number of steps, as ``counted``, from which on the parameter's basis has to be found."""
    return schedule_of(update).due_at(refresh_record(state))


def schedule_of(update: Update) -> Schedule:
    """When the parameter's basis is found anew."""
    group, layout = update.group, update.layout
    chance = (layout.rank or 0) / layout.short
    return Schedule(group["refresh_schedule"], group["update_proj_gap"], update.phase, chance)


def is_asynchronous(update: Update, state: Mapping[str, Any]) -> bool:
    """Whether a basis found in this step is for the next one."""
    return bool(update.group["async_refresh"]) and state["refreshes"] > 0


def batches(updates: Sequence[Update], states: Mapping[Tensor, Mapping[str, Any]]) -> list[list[Update]]:
    """``updates`` in their order, but those whose bases are found in one search behind the first of them.

    On a CPU each is by itself: see ``in_batches``. What isn't due is too, so that processes which have different things
    to update one by one search in the same order.
    """
    together: dict[object, list[Update]] = {}
    for update in updates:
        key: object = update.index
        if in_batches(update.param.device) and is_due(update, states.get(update.param) or _FRESH):
            grad, group = update.grad, update.group
            warm = bool(states.get(update.param)) and group["warm_start"]
            kind = (grad.device, grad.dtype, matrix_shape(grad.shape), update.param.shape)
            key = (*kind, update.layout.side, update.layout.rank, id(group), warm)
        together.setdefault(key, []).append(update)
    return list(together.values())


def find_together(batch: Sequence[Update], states: Mapping[Tensor, Mapping[str, Any]]) -> dict[int, Found]:
    """What is found for a batch of several parameters, by the id of those that need it in this step."""
    if len(batch) == 1:
        return {}
    pairs = [(update, states.get(update.param) or _FRESH) for update in batch]
    due = [(update, state) for update, state in pairs if is_due(update, state) and not is_asynchronous(update, state)]
    if not due:
        return {}
    found = find_bases([update for update, _ in due], [state for _, state in due], [update.grad for update, _ in due])
    return {id(update.param): own for (update, _), own in zip(due, found, strict=True)}


def find_bases(
    updates: Sequence[Update], states: Sequence[Mapping[str, Any]], gradients: Sequence[Gradient]
) -> list[Found]:
    """The subspace of each basis of parameters that ``batches`` has put together. Changes nothing."""
    first, records = updates[0], [refresh_record(state) for state in states]
    matrices = [_matrix(update, gradient) for update, gradient in zip(updates, gradients, strict=True)]
    oriented = [matrix if first.layout.side == "right" else matrix.T for matrix in matrices]
    warm = first.group["warm_start"] and first.layout.bases.keys() <= states[0].keys()
    found: list[Found] = [{} for _ in updates]
    for name in first.layout.bases:
        subspaces = find_subspaces(
            oriented if name == "basis" else [matrix.T for matrix in oriented],
            first.layout.rank or 0,
            previous=[float_basis(state, name) for state in states] if warm else None,
            captured=[record.captured_cold if record.refreshes else None for record in records] if warm else None,
            seeds=[
                derived_seed(update.group["seed"], update.index, name, record.refreshes)
                for update, record in zip(updates, records, strict=True)
            ],
            method=first.group["refresh_method"],
        )
        for own, subspace in zip(found, subspaces, strict=True):
            # A sum over processes may turn out to be zero.
            is_sum = not isinstance(gradients[0], Tensor)
            own[name] = replace(subspace, found=bool(subspace.captured > 0)) if is_sum else subspace
    return found


def _matrix(update: Update, gradient: Gradient) -> Gradient:
    """What is searched: of a part the whole gradient."""
    if not isinstance(gradient, Tensor):
        return gradient
    matrix, shard = gradient.reshape(matrix_shape(gradient.shape)), update.layout.shard
    return matrix if shard is None else ShardedGradient(matrix, shard.start, shard.whole[0], 0, shard.all_reduce)


def projected(update: Update, grad: Tensor, state: Mapping[str, Any]) -> Tensor:
    """The gradient in the subspace of ``state``, (L, r) float32; of a part that ``sums``, its terms of that sum."""
    grad, operands = grad.reshape(matrix_shape(grad.shape)).float(), update.layout.operands(state)
    with torch.autocast(grad.device.type, enabled=False):
        oriented = grad if update.layout.side == "right" else grad.T
        lowrank = project_rows(oriented, operands["basis"], operands.get("basis_scale"))
        return operands["long_basis"].float().T @ lowrank if "long_basis" in operands else lowrank


def changes(update: Update, state: Mapping[str, Any], found: Found, step: int, backend: str) -> Changes:
    """The entries of ``state`` that become others with what was found in the gradient of step number ``step``.

    Where the gradient held no subspace (it is zero, or not finite) the bases stay, and the next refresh is planned;
    until there is a first basis, every step tries. ``backend``: for the moments.
    """
    group, record = update.group, refresh_record(state)
    schedule = schedule_of(update)
    if not all(subspace.found for subspace in found.values()):
        again = schedule.planned(record, step)
        return {"next_refresh": again.next_refresh, "interval": again.interval} if record.refreshes else {}
    changed: Changes = {}
    if update.layout.draws:
        changed |= drawn(update, record.refreshes)
    for name, subspace in found.items():
        changed |= update.layout.stored_basis(name, subspace.basis, update.param.dtype)
    overlap, moments = 0.0, group["moments_on_refresh"]
    reset = moments == "reset" and record.refreshes > 0
    if reset:
        changed |= _reset(update)
    if record.refreshes and found:
        with full_precision(), torch.autocast(update.param.device.type, enabled=False):
            turns = {name: float_basis(state, name).T @ float_basis(changed, name) for name in found}
        kept = [turn.square().sum() / found[name].basis.square().sum() for name, turn in turns.items()]
        overlap = min(map(float, kept))
        if moments == "rotate":
            changed |= _rotated(state, turns, group["betas"], backend)
    basis, counted = found.get("basis"), int(state["step"])
    captured, cold = (0.0, True) if basis is None else (float(basis.captured), basis.cold)
    record = RefreshRecord(
        refreshes=record.refreshes + 1,
        refreshed_at=record.counted_from + step,
        counted_from=record.counted_from + (counted if reset else 0),
        interval=record.interval,
        captured=captured,
        captured_cold=captured if cold else record.captured_cold,
        overlap=overlap,
    )
    planned = schedule.planned(record, 0, elapsed=counted - step) if reset else schedule.planned(record, step)
    return changed | asdict(planned)


def drawn(update: Update, refreshes: int) -> Changes:
    """The entry of the state that says which basis it has after so many others."""
    return {"basis_seed": derived_seed(update.group["seed"], update.index, "basis", refreshes)}


def _rotated(
    state: Mapping[str, Any], turns: Mapping[str, Tensor], betas: tuple[float, float], backend: str
) -> Changes:
    adam = ops.rotate_moments(
        adam_state(state),
        turns["basis"],
        beta1=float(betas[0]),
        beta2=float(betas[1]),
        long_rotation=turns.get("long_basis"),
        backend=backend,
    )
    return {name: value for name in Adam.moment_names if (value := getattr(adam, name)) is not None}


def _reset(update: Update) -> Changes:
    fresh = update.layout.new_state(update.param)
    return {name: fresh[name] for name in (*update.layout.rule.moment_names, "step") if name in fresh}


def take_over(state: dict[str, Any], changed: Mapping[str, Any]) -> None:
    """Puts the changed entries into ``state``: into the memory of the old ones, which a CUDA graph may read."""
    for name, value in changed.items():
        old = state[name]
        fits = isinstance(value, Tensor) and value.dtype == old.dtype and value.device == old.device
        state[name] = old.copy_(value) if fits else value
