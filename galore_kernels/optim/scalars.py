"""The scheduled scalars of a step as tensors on the weights' devices, put there without waiting for a device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_FLOATS = (torch.float32, torch.float64)


def moved(value: Tensor, device: torch.device) -> Tensor:
    """``value`` as a float32 or float64 tensor on ``device``: itself where it is one."""
    if value.device != device:
        # Towards the host a copy has to be waited for: its memory may be read at once.
        value = value.to(device, non_blocking=device.type != "cpu")
    return value if value.dtype in _FLOATS else value.double()


class LearningRates:
    """Learning rates on devices. Those given as numbers are uploaded when they change, into the same memory."""

    def __init__(self) -> None:
        self._uploaded: dict[tuple[int, torch.device], tuple[float, Tensor]] = {}

    def on(self, device: torch.device, lr: float | Tensor, group: int, *, capturing: bool = False) -> Tensor:
        """``lr`` as a 0-d tensor on ``device``; what is a tensor there already is passed on as it is.

        Args:
            group: what tells the parameter group from others; each has memory of its own.
            capturing: a CUDA graph is being captured on the device. The number is then part of the graph, in memory
                of the graph's: what the graph fills must not be taken for uploaded, nor an upload reach the graph.
        """
        if isinstance(lr, Tensor) and (lr.device.type != "cpu" or device.type == "cpu"):
            return moved(lr if lr.dim() == 0 else lr.reshape(()), device)
        number = float(lr)
        if capturing:
            return torch.full((), number, dtype=torch.float64, device=device)
        uploaded = self._uploaded.get((group, device))
        if uploaded is None:
            tensor = torch.full((), number, dtype=torch.float64, device=device)
        elif uploaded[0] == number:
            return uploaded[1]
        else:
            tensor = uploaded[1].fill_(number)
        self._uploaded[group, device] = (number, tensor)
        return tensor


class Unscaling:
    """GradScaler's ``grad_scale`` and ``found_inf`` on every device of a step, each moved there once."""

    def __init__(self, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        for name, value in (("grad_scale", grad_scale), ("found_inf", found_inf)):
            if value is not None and value.numel() != 1:
                raise ValueError(f"{name}: expected a single number, got shape {tuple(value.shape)}; pass a 0-d tensor")
        self._given = {"grad_scale": grad_scale, "found_inf": found_inf}
        self._on: dict[torch.device, dict[str, Any]] = {}

    def found_inf(self, device: torch.device) -> list[Tensor]:
        """``found_inf`` on ``device``, if it was given."""
        found = self.on(device)["found_inf"]
        return [] if found is None else [found]

    def on(self, device: torch.device) -> dict[str, Any]:
        """Both, by the names they have in ``AdamOptions``."""
        if device not in self._on:
            self._on[device] = {k: None if v is None else moved(v, device) for k, v in self._given.items()}
        return self._on[device]
