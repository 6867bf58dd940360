"""The states of a model and its optimizer as a checkpoint holds them: whole, whatever number of processes trains.

Parameters have their numbers there, as in ``Optimizer.state_dict``.
"""

from __future__ import annotations

from typing import Any

import torch

from . import rivals
from .config import OURS, Config

__all__ = ["load_states", "whole_states"]

# Their own state_dict would not survive a weights-only checkpoint, or would come back cast.
_EXPORTED = frozenset(("adamw8bit", "galore_torch", "galore_torch8bit", "galore_torch_adafactor", "apollo_torch"))


def whole_states(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, config: Config
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Of model and optimizer, as tensors and plain values.

    Where each process has a part all call it, and the first gets them, on the CPU; the others get nothing.
    """
    if _is_divided(model):
        from torch.distributed.checkpoint import state_dict

        whole = state_dict.StateDictOptions(full_state_dict=True, cpu_offload=True)
        named = state_dict.get_optimizer_state_dict(model, optimizer, options=whole)
        return state_dict.get_model_state_dict(model, options=whole), _numbered(named)
    if config.optimizer in _EXPORTED:
        return model.state_dict(), rivals.export_state(optimizer)
    return model.state_dict(), optimizer.state_dict()


def load_states(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    config: Config,
    model_state: dict[str, Any],
    optimizer_state: dict[str, Any],
) -> None:
    """Put back what :func:`whole_states` returned to the first process; each keeps its part."""
    if _is_divided(model):
        from torch.distributed.checkpoint import state_dict

        whole = state_dict.StateDictOptions(full_state_dict=True)
        state_dict.set_model_state_dict(model, model_state, options=whole)
        # Ours take whole tensors; torch's are given theirs divided.
        divided = optimizer_state if config.optimizer in OURS else _divided(optimizer, optimizer_state)
        optimizer.load_state_dict(divided)
        return
    model.load_state_dict(model_state)
    if config.optimizer in _EXPORTED:
        rivals.import_state(optimizer, optimizer_state)
    else:
        optimizer.load_state_dict(optimizer_state)


def _is_divided(model: torch.nn.Module) -> bool:
    return any(hasattr(parameter, "full_tensor") for parameter in model.parameters())


def _numbered(named: dict[str, Any]) -> dict[str, Any]:
    """torch's state dict with the parameters' names in place of their numbers, with their numbers again."""
    if not named:
        return named
    groups = named["param_groups"]
    numbers = {name: number for number, name in enumerate(name for group in groups for name in group["params"])}
    return {
        "state": {numbers[name]: state for name, state in named["state"].items()},
        "param_groups": [{**group, "params": [numbers[name] for name in group["params"]]} for group in groups],
    }


def _divided(optimizer: torch.optim.Optimizer, whole: dict[str, Any]) -> dict[str, Any]:
    from torch.distributed.tensor import distribute_tensor

    parameters: list[Any] = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    divided = {}
    for number, state in whole["state"].items():
        parameter = parameters[number]
        divided[number] = {
            key: distribute_tensor(value, parameter.device_mesh, parameter.placements)
            if isinstance(value, torch.Tensor) and value.shape == parameter.shape
            else value
            for key, value in state.items()
        }
    return {**whole, "state": divided}
