"""Whether Triton can serve a device. Importing this imports no Triton."""

from __future__ import annotations

import importlib.util
import os
import sys
from functools import lru_cache
from typing import Any

import torch

_NOT_INSTALLED = "triton is not installed; pip install triton"

#: Device types that Triton compiles for. AMD's cards are "cuda" to torch.
_DEVICE_TYPES = ("cuda", "xpu")


@lru_cache(maxsize=1)
def installed() -> bool:
    """Whether ``import triton`` would find a package."""
    return importlib.util.find_spec("triton") is not None


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on the CPU: settled by TRITON_INTERPRET when they are made."""
    settled = getattr(sys.modules.get("galore_kernels.backends.triton.products"), "INTERPRETED", None)
    if settled is not None:
        return bool(settled.value)
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "y", "on", "yes", "true")


def refuses(device: torch.device, *, in_interpreter: bool) -> str | None:
    """The reason why tensors on ``device`` can't be served, or None."""
    if not installed():
        return _NOT_INSTALLED
    if in_interpreter != interpreted():
        state = "is not set" if in_interpreter else "is set, under which no kernel is compiled"
        return f"the environment variable TRITON_INTERPRET {state}"
    served = ("cpu",) if in_interpreter else _DEVICE_TYPES
    return None if device.type in served else f"it serves {' and '.join(served)} tensors only, not {device}"


def describe(*, in_interpreter: bool) -> dict[str, Any]:
    """What ``backend_info()`` tells."""
    facts: dict[str, Any] = {
        "interpreted": in_interpreter,
        "galore_update": "four launches (five where the short side is split); compiled at first use",
    }
    if not installed():
        facts |= {"available": False, "reason": _NOT_INSTALLED}
    elif not in_interpreter and not torch.cuda.is_available() and not torch.xpu.is_available():
        facts |= {"available": False, "reason": f"torch sees no {' or '.join(_DEVICE_TYPES)} device"}
    return facts
