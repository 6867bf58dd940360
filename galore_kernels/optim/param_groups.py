"""``galore_param_groups``: which of a model's matrices are projected, said by name."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from galore_kernels.nn import (
    FactoredLinear,
    LowRankGradient,
    TargetModules,
    check_unflattened,
    nothing_matches,
    stored_weight,
    target_linears,
)


def galore_param_groups(
    model: nn.Module, target_modules: TargetModules = ("attn", "mlp"), **group_options: Any
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
        ValueError: nothing matches; the message lists the linear layers there are. Or FSDP1 or ZeRO has flattened the
            parameters.
    """
    chosen = list(target_linears(model, target_modules).values())
    prepared = {id(layer.carrier): layer.gradient for layer in model.modules() if isinstance(layer, FactoredLinear)}
    targets = {id(stored_weight(layer)) for layer in chosen}
    factored: dict[int, list[tuple[str, Tensor]]] = {}
    projected: list[tuple[str, Tensor]] = []
    rest: list[tuple[str, Tensor]] = []
    for name, param in model.named_parameters():
        check_unflattened(param, name)
        gradient = prepared.get(id(param))
        if isinstance(gradient, LowRankGradient):
            factored.setdefault(gradient.rank, []).append((name, param))
        elif param.requires_grad:
            is_projected = gradient is not None or id(param) in targets
            (projected if is_projected else rest).append((name, param))
    if not projected and not factored:
        raise nothing_matches(model, target_modules)
    groups: list[dict[str, Any]] = [
        {"params": params, "rank": rank, **group_options} for rank, params in factored.items()
    ]
    if projected:
        groups.append({"params": projected, "rank": 128, **group_options})
    if rest:
        groups.append({"params": rest})
    return groups
