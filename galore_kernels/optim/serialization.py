"""Optimizer state dicts: what is added on the way out, what is checked on the way in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any

from torch import Tensor

from galore_kernels.nn import DenseGradient, LowRankGradient, bare_name
from galore_kernels.optim.checksum import state_checksum
from galore_kernels.optim.options import STRUCTURAL, check_group
from galore_kernels.optim.rules import Rule
from galore_kernels.optim.sharded_state import own_part
from galore_kernels.optim.state import Layout, check_state

FORMAT_VERSION = 2
HEADER = "galore_kernels"

NamedParams = list[tuple[int, str, Tensor, dict[str, Any]]]


def add_header(state_dict: dict[str, Any], optimizer: str) -> dict[str, Any]:
    """Adds the format version, the optimizer's name and a checksum per parameter under the key "galore_kernels".

    Version and name are in each group as well: ``torch.distributed.checkpoint`` keeps nothing else.
    """
    checksums = {index: state_checksum(state) for index, state in state_dict["state"].items()}
    origin = {HEADER: f"{optimizer}, format {FORMAT_VERSION}"}
    state_dict["param_groups"] = [{k: _plain(v) for k, v in g.items()} | origin for g in state_dict["param_groups"]]
    state_dict[HEADER] = {"format_version": FORMAT_VERSION, "optimizer": optimizer, "checksums": checksums}
    return state_dict


def _plain(value: Any) -> Any:
    """Schedules computed with numpy leave its scalars in the groups, which a weights-only load refuses."""
    if isinstance(value, tuple):
        return tuple(map(_plain, value))
    exact = value is None or type(value) in {bool, int, float}
    return float(value) if isinstance(value, Real) and not exact else value


def checked(
    state_dict: Mapping[str, Any],
    optimizer: str,
    groups: list[dict[str, Any]],
    params: NamedParams,
    layout_of: Callable[[Tensor, dict[str, Any]], Layout],
    rule: Rule,
) -> tuple[dict[Tensor, dict[str, Any]], list[dict[str, Any]]]:
    """The state by parameter (copied to its device) and the groups of a state dict that passes every check.

    Raises ValueError otherwise; see ``GaLoreFusedAdam8bit.load_state_dict``. Changes nothing.
    """
    checksums = _check_header(with_header(state_dict), optimizer)
    saved_groups, saved_state = state_dict["param_groups"], state_dict["state"]
    new_groups = merged_groups(saved_groups, groups, rule)
    indices = [index for group in saved_groups for index in group["params"]]
    belongs = len(set(indices)) == len(indices) and set(saved_state) <= set(indices)
    if not belongs or (checksums is not None and set(checksums) != set(saved_state)):
        raise ValueError("state_dict: its state does not belong to its param_groups; the checkpoint is damaged")
    state: dict[Tensor, dict[str, Any]] = {}
    merged = [group for group in new_groups for _ in group["params"]]
    for saved_index, (_, name, param, _), group in zip(indices, params, merged, strict=True):
        if saved_index not in saved_state:
            continue
        saved, layout = saved_state[saved_index], layout_of(param, group)
        entry = own_part(saved, layout, name) if isinstance(saved, Mapping) else saved
        check_state(entry, param, layout, name)
        if checksums is not None and state_checksum(saved) != checksums[saved_index]:
            raise ValueError(
                f"{name}: its state does not match its checksum: the checkpoint is damaged, or the dict was kept "
                "over a step without being copied; go back to an earlier one"
            )
        state[param] = {
            key: value.detach().to(param.device, copy=True).contiguous() if isinstance(value, Tensor) else value
            for key, value in entry.items()
        }
    return state, new_groups


def with_header(state_dict: Mapping[str, Any]) -> Mapping[str, Any]:
    """The dict, with the header that its groups tell if it lost its own, and has no checksums any more."""
    groups = state_dict.get("param_groups") if HEADER not in state_dict else None
    origins = {str(group.get(HEADER)) for group in groups or () if isinstance(group, Mapping)}
    name, _, version = origins.pop().partition(", format ") if len(origins) == 1 else ("", "", "")
    if not version.isdecimal():
        return state_dict
    return {**state_dict, HEADER: {"format_version": int(version), "optimizer": name, "checksums": None}}


def _check_header(state_dict: Mapping[str, Any], optimizer: str) -> Mapping[Any, int] | None:
    missing = [key for key in ("state", "param_groups", HEADER) if key not in state_dict]
    if missing:
        raise ValueError(
            f"state_dict: the keys {missing} are missing; not saved by a galore_kernels optimizer, or not whole"
        )
    header, groups = state_dict[HEADER], state_dict["param_groups"]
    whole = isinstance(header, Mapping) and isinstance(state_dict["state"], Mapping) and isinstance(groups, list)
    if not whole or not all(isinstance(g, Mapping) and isinstance(g.get("params"), list) for g in groups):
        raise ValueError("state_dict: it is not built as a state dict is; go back to an earlier checkpoint")
    version = header.get("format_version")
    if version != FORMAT_VERSION:
        raise ValueError(
            f"state_dict: format version {version!r}, this release reads {FORMAT_VERSION}; "
            "load it with the release that saved it"
        )
    if header.get("optimizer") != optimizer:
        raise ValueError(f"state_dict: saved by {header.get('optimizer')}, not {optimizer}; construct that optimizer")
    checksums = header.get("checksums", ())
    if checksums is not None and not isinstance(checksums, Mapping):
        raise ValueError("state_dict: its checksums are missing; the checkpoint is damaged")
    return checksums


def check_sizes(saved: list[dict[str, Any]], current: list[dict[str, Any]]) -> None:
    """Raises ValueError unless both are as many groups of as many parameters."""
    if [len(group["params"]) for group in saved] != [len(group["params"]) for group in current]:
        raise ValueError(
            f"state_dict: param groups of {[len(g['params']) for g in saved]} parameters, the optimizer has "
            f"{[len(g['params']) for g in current]}; build it with the same groups as when it was saved"
        )


def merged_groups(saved: list[dict[str, Any]], current: list[dict[str, Any]], rule: Rule) -> list[dict[str, Any]]:
    """The groups that an optimizer with the ``current`` ones has after loading. Raises ValueError; changes nothing."""
    check_sizes(saved, current)
    merged = []
    for index, (old, new) in enumerate(zip(saved, current, strict=True)):
        where = f"state_dict, param group {index}"
        missing = [key for key in rule.keys if key in new and key not in old and key != "param_names"]
        if missing:
            raise ValueError(f"{where}: the keys {missing} are missing; the checkpoint is incomplete")
        _check_names(old.get("param_names"), new.get("param_names"), where)
        for key in (*STRUCTURAL, *rule.structural):
            if old[key] != new[key]:
                raise ValueError(
                    f"{where}: {key}={old[key]!r}, the optimizer was built with {key}={new[key]!r}; "
                    "the state can't be converted: use the checkpoint's value, or start with fresh state"
                )
        options = {**new, **{key: _copied(value) for key, value in old.items() if key != HEADER}}
        options.update({key: new[key] for key in ("params", "param_names", "rank_is_explicit") if key in new})
        for key in (*rule.own_keys, "chosen_ranks"):
            options[key] = tuple(options[key]) if isinstance(options[key], list) else options[key]
        check_group(options, where, rule)
        merged.append(options)
    return merged


def _copied(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


def _check_names(old: list[str] | None, new: list[str] | None, where: str) -> None:
    """Two layers of one shape that changed places would load without a word; their names tell."""
    if old is None or new is None:
        return
    for position, (saved, here) in enumerate(zip(old, new, strict=True)):
        if _bare(saved) != _bare(here):
            raise ValueError(
                f'{where}: parameter {position} is "{saved}" there and "{here}" here; '
                "pass the parameters in the order in which they were saved"
            )


def _bare(name: str) -> str:
    """A parameter's name whatever wraps the model.

    One that carries a prepared layer's gradient has its weight's name: the state is the same.
    """
    layer, _, own = bare_name(name).rpartition(".")
    return f"{layer}.{'weight' if own in (LowRankGradient.name, DenseGradient.name) else own}"
