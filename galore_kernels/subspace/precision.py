"""Matrix products in true fp32, whatever the process is set to."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

_lock = threading.Lock()
_users = 0
_restore: list[Callable[[], None]] = []


@contextmanager
def full_precision() -> Iterator[None]:
    """Inside, fp32 products are not lowered to TF32 (CUDA) or bfloat16 (CPU), which training scripts ask for.

    A TF32 product leaves a basis orthonormal to 1e-3 only, and rounding noise at 1e-3 of sigma_1. PyTorch
    has no such switch per call or per thread, so the process-wide one is raised, by the first thread in, and
    put back, by the last one out: a thread that put it back alone would lower it under the others. Nothing
    is touched where products are true fp32 already, PyTorch's default.
    """
    global _users
    with _lock:
        _users += 1
        if _users == 1:
            _restore[:] = _raise_precision()
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if _users == 0:
                for restore in _restore:
                    restore()
                _restore.clear()


def _raise_precision() -> list[Callable[[], None]]:
    """Sets true fp32 and returns what puts each changed setting back."""
    if not hasattr(torch.backends.cuda.matmul, "fp32_precision"):  # before PyTorch 2.9: one setting for all
        lowered = torch.get_float32_matmul_precision()
        if lowered == "highest":
            return []
        torch.set_float32_matmul_precision("highest")
        return [lambda: torch.set_float32_matmul_precision(lowered)]
    # From 2.9 on each backend has its own, and reading the common one raises once a script has set one of
    # them.
    restore: list[Callable[[], None]] = []
    for matmul in (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul):  # type: ignore[attr-defined]
        before = matmul.fp32_precision
        if before not in ("ieee", "none"):  # "none": nobody has asked for less
            matmul.fp32_precision = "ieee"
            restore.append(functools.partial(setattr, matmul, "fp32_precision", before))
    return restore
