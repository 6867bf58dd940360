"""How a kernel is launched: on the tensors' device and its current stream, with arithmetic that is fixed."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch

from galore_kernels.backends.triton.availability import interpreted


@contextlib.contextmanager
def _without_numpy_warnings() -> Iterator[None]:
    # The interpreter computes in NumPy, which warns of an overflow that a kernel is there to find, and of how some
    # versions of the interpreter use it.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


def _on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    if interpreted():
        return _without_numpy_warnings()
    if device.type == "cuda" and device.index not in (None, torch.cuda.current_device()):
        return torch.cuda.device(device)
    if device.type == "xpu" and device.index not in (None, torch.xpu.current_device()):
        return torch.xpu.device(device)
    return contextlib.nullcontext()


def launch(
    kernel: Any, programs: int, device: torch.device, *args: Any, warps: int, stages: int = 1, **constants: Any
) -> None:
    """Enqueues ``programs`` programs of a kernel on the current stream of ``device``; none if there are none.

    Multiply-adds are never contracted: the same numbers come out whatever the compiler makes of an expression.
    """
    if programs == 0:
        return
    with _on(device):
        kernel[(programs,)](*args, **constants, num_warps=warps, num_stages=stages, enable_fp_fusion=False)


@lru_cache(maxsize=64)
def multiprocessors(device: torch.device) -> int:
    """How many programs' worth of processors the device has; 1 where that means nothing."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).multi_processor_count)
    if device.type == "xpu":
        return int(torch.xpu.get_device_properties(device).gpu_subslice_count)
    return 1
