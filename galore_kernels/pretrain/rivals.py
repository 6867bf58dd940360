"""Other people's optimizers, made to run correctly and to be comparable; where they are installed.

What has to be done about them, and why:

* galore_torch's ``AdamW8bit`` passes its settings to bitsandbytes by position. Since bitsandbytes 0.50 two of them
  land in ``max_unorm`` and ``skip_zeros``: every update is clipped and small tensors never move, without an error.
* The same class calls ``torch.cuda.synchronize``, which raises where there is no CUDA.
* galore_torch keeps projector objects in its state, which a weights-only checkpoint cannot hold.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch

from .config import PretrainError
from .parallel import own_part

__all__ = [
    "export_state",
    "import_rival",
    "import_state",
    "optimizer_state_bytes",
    "patched_galore_torch_adamw8bit",
]


def import_rival(module: str, package: str) -> ModuleType:
    """Import ``module``, or say which ``pip install`` provides it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise PretrainError(
            f"this optimizer needs the package {package}, which could not be imported ({error}): pip install {package}"
        ) from error


def patched_galore_torch_adamw8bit() -> type[torch.optim.Optimizer]:
    """galore_torch's ``AdamW8bit`` with its settings passed by keyword, and able to step without CUDA.

    The class takes ``(params, lr, betas, eps, weight_decay)`` and galore_torch's group keys. It works with
    bitsandbytes 0.49 and 0.50. Its mathematics is untouched.

    Raises:
        PretrainError: galore_torch or bitsandbytes is not installed.
    """
    two_state = import_rival("bitsandbytes.optim.optimizer", "bitsandbytes").Optimizer2State
    original = import_rival("galore_torch", "galore-torch").GaLoreAdamW8bit

    class PatchedGaLoreAdamW8bit(original):  # type: ignore[misc, valid-type]  # a class known at run time only
        def __init__(
            self,
            params: Any,
            lr: float = 1e-3,
            betas: tuple[float, float] = (0.9, 0.999),
            eps: float = 1e-8,
            weight_decay: float = 0.0,
        ) -> None:
            two_state.__init__(
                self, "adam", params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, optim_bits=8
            )

        def step(self, closure: Callable[[], Any] | None = None) -> Any:
            with _without_cuda_synchronize():
                return super().step(closure)

    return PatchedGaLoreAdamW8bit


@contextlib.contextmanager
def _without_cuda_synchronize() -> Iterator[None]:
    if torch.cuda.is_available():
        yield
        return
    synchronize = torch.cuda.synchronize
    torch.cuda.synchronize = lambda device=None: None
    try:
        yield
    finally:
        torch.cuda.synchronize = synchronize


def optimizer_state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all tensors in the optimizer's state, each tensor once, including those that objects there hold.

    Of what processes have parts of, this one's.

    A tensor counts its own elements, which is kind to galore_torch: in float32 its basis is a view that keeps the
    whole square factor of its SVD alive.
    """
    sizes: dict[tuple[str, int], int] = {}
    pending: list[Any] = list(optimizer.state.values())
    while pending:
        value = pending.pop()
        if isinstance(value, torch.Tensor):
            own = own_part(value)
            sizes[(str(own.device), own.data_ptr())] = own.numel() * own.element_size()
        elif isinstance(value, dict):
            pending.extend(value.values())
        elif isinstance(value, (list, tuple)):
            pending.extend(value)
        elif hasattr(value, "__dict__"):
            pending.extend(vars(value).values())
    return sum(sizes.values())


def export_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """``state_dict()`` of a rival as tensors and plain values: projector objects become their attributes."""
    exported: dict[int, dict[str, Any]] = {}
    for number, parameter in enumerate(_parameters(optimizer)):
        if parameter in optimizer.state:
            state = dict(optimizer.state[parameter])
            if "projector" in state:
                state["projector"] = dict(vars(state["projector"]))
            exported[number] = state
    return {"state": exported}


def import_state(optimizer: torch.optim.Optimizer, exported: dict[str, Any]) -> None:
    """Put an exported state back, bit for bit.

    The optimizers' own ``load_state_dict`` casts to the parameter's dtype or knows nothing of projectors.
    """
    parameters = _parameters(optimizer)
    for number, saved in exported["state"].items():
        parameter = parameters[number]
        state: dict[str, Any] = {
            key: value.to(parameter.device) if isinstance(value, torch.Tensor) else value
            for key, value in saved.items()
        }
        if "projector" in state:
            state["projector"] = _projector(state["projector"], parameter.device)
        optimizer.state[parameter] = state


def _projector(attributes: dict[str, Any], device: torch.device) -> Any:
    if "seed" in attributes:
        projector = import_rival("apollo_torch.random_projector", "apollo-torch").GradientProjector(attributes["rank"])
    else:
        projector = import_rival("galore_torch.galore_projector", "galore-torch").GaLoreProjector(attributes["rank"])
    for key, value in attributes.items():
        setattr(projector, key, value.to(device) if isinstance(value, torch.Tensor) else value)
    return projector


def _parameters(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
