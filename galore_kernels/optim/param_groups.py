"""``galore_param_groups``: which of a model's matrices are projected, said by name."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

ALL_LINEAR = "all-linear"
_HEAD_NAMES = ("lm_head", "output", "head", "embed_out", "classifier", "score")


def _output_head(model: nn.Module) -> set[int]:
    """ids of the output head's weight: what Transformers calls the output embeddings, else a layer named like one."""
    get = getattr(model, "get_output_embeddings", None)
    head = get() if callable(get) else None
    if head is not None:
        return {id(head.weight)}
    return {
        id(module.weight)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in _HEAD_NAMES
    }


def _matches(name: str, targets: str | Sequence[str]) -> bool:
    if isinstance(targets, str):
        return _fullmatch(targets, name)
    return any(target in name or _fullmatch(target, name) for target in targets)


def _fullmatch(pattern: str, name: str) -> bool:
    try:
        return re.fullmatch(pattern, name) is not None
    except re.error as error:
        raise ValueError(
            f"target_modules: {pattern!r} is no regular expression ({error}); write .* for anything, \\. for a dot"
        ) from error


def galore_param_groups(
    model: nn.Module, target_modules: str | Sequence[str] = ("attn", "mlp"), **group_options: Any
) -> list[dict[str, Any]]:
    """Two parameter groups: the target modules' weights, projected, and all other trainable parameters at full rank.

    Args:
        model: whose ``nn.Linear`` layers are looked through.
        target_modules: a sequence of strings, each matching a layer whose name contains it or that it matches in
            full as a regular expression; or one string, a regular expression for the full name; or "all-linear",
            every linear layer but the output head.
        group_options: options of the projected group: ``rank``, ``update_proj_gap``, ``scale``, ``proj_type``, ...
            Without ``rank`` the group gets 128.

    Returns:
        ``[{"params": [(name, weight), ...], "rank": r, ...}, {"params": [(name, parameter), ...]}]``, the second
        left out if empty; pass it to ``GaLoreFusedAdam8bit``.

    Raises:
        ValueError: nothing matches; the message lists the linear layers there are.
    """
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    if target_modules == ALL_LINEAR:
        head = _output_head(model)
        chosen = {name for name, module in linears.items() if id(module.weight) not in head}
    else:
        chosen = {name for name in linears if _matches(name, target_modules)}
    targets = {id(linears[name].weight) for name in chosen}
    projected: list[tuple[str, Tensor]] = []
    rest: list[tuple[str, Tensor]] = []
    for name, param in model.named_parameters():
        if param.requires_grad:
            (projected if id(param) in targets else rest).append((name, param))
    if not projected:
        raise ValueError(
            f"target_modules={target_modules!r} matches no trainable linear layer; there are: "
            f"{', '.join(linears) or 'none'}"
        )
    groups: list[dict[str, Any]] = [{"params": projected, "rank": 128, **group_options}]
    if rest:
        groups.append({"params": rest})
    return groups
