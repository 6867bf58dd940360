"""The device backends on a machine of any kind: on its GPU, or with their kernels executed by its CPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from device_backend import on_device
from simt_backend import simt_backend

from galore_kernels.backends import triton
from galore_kernels.ops import registry
from galore_kernels.ops.registry import Backend

DEVICE_BACKENDS = ("cuda", "triton")


def stand_in(name: str) -> Backend:
    """A backend ``name`` that serves CPU tensors."""
    if torch.cuda.is_available() and name in registry._backends:
        return on_device(registry._backends[name], torch.device("cuda"))
    # conftest.py has switched Triton's interpreter on.
    return simt_backend() if name == "cuda" else triton.make_backend(in_interpreter=True)


@contextlib.contextmanager
def serving(name: str) -> Iterator[str]:
    """Backend ``name``, which serves CPU tensors for a while whatever it is."""
    if name not in DEVICE_BACKENDS:
        yield name
        return
    before = registry._backends.get(name)
    registry.register(stand_in(name))
    try:
        yield name
    finally:
        del registry._backends[name]
        if before is not None:
            registry.register(before)
