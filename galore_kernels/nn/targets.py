"""Which of a model's linear layers are meant, said by name."""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import Tensor, nn

ALL_LINEAR = "all-linear"
_HEAD_NAMES = ("lm_head", "output", "head", "embed_out", "classifier", "score")

TargetModules = str | Sequence[str]


def stored_weight(layer: nn.Module) -> Tensor:
    """The tensor that a layer keeps as its weight: of int8 ones the codes."""
    codes: Tensor | None = getattr(layer, "weight_codes", None)
    weight: Tensor = layer.weight if codes is None else codes  # type: ignore[assignment]
    return weight


def stored_scale(layer: nn.Module) -> Tensor | None:
    """The scales of int8 codes, or None."""
    scale: Tensor | None = getattr(layer, "weight_scale", None)
    return scale


def _output_head(model: nn.Module) -> set[int]:
    """ids of the output head's weight: what Transformers calls the output embeddings, else a layer named like one."""
    get = getattr(model, "get_output_embeddings", None)
    if get is None:  # DDP hides what its module has
        get = getattr(getattr(model, "module", None), "get_output_embeddings", None)
    head = get() if callable(get) else None
    if head is not None:
        return {id(stored_weight(head))}
    return {
        id(stored_weight(module))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in _HEAD_NAMES
    }


def bare_name(name: str) -> str:
    """A name without the parts that DDP and torch.compile put before or into it."""
    return name.replace("_orig_mod.", "").removeprefix("module.")


def _matches(name: str, targets: TargetModules) -> bool:
    names = {name, bare_name(name)}
    if isinstance(targets, str):
        return any(_fullmatch(targets, name) for name in names)
    return any(target in name or any(_fullmatch(target, one) for one in names) for target in targets)


def _fullmatch(pattern: str, name: str) -> bool:
    try:
        return re.fullmatch(pattern, name) is not None
    except re.error as error:
        raise ValueError(
            f"target_modules: {pattern!r} is no regular expression ({error}); write .* for anything, \\. for a dot"
        ) from error


def target_linears(model: nn.Module, target_modules: TargetModules) -> dict[str, nn.Linear]:
    """The linear layers that ``target_modules`` names, by name.

    Args:
        model: whose ``nn.Linear`` layers are looked through.
        target_modules: a sequence of strings, each matching a layer whose name contains it or that it matches in
            full as a regular expression; or one string, a regular expression for the full name; or "all-linear",
            every linear layer but the output head. In full is with or without the prefixes of DDP and torch.compile.
    """
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    if target_modules == ALL_LINEAR:
        head = _output_head(model)
        return {name: module for name, module in linears.items() if id(stored_weight(module)) not in head}
    return {name: module for name, module in linears.items() if _matches(name, target_modules)}


def nothing_matches(model: nn.Module, target_modules: TargetModules) -> ValueError:
    """The error where no trainable layer is named."""
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return ValueError(
        f"target_modules={target_modules!r} matches no trainable linear layer; there are: {', '.join(names) or 'none'}"
    )
