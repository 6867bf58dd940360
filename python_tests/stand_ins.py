"""The device backends on a machine of any kind: on its GPU, or with their kernels executed by its CPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from simt_backend import simt_backend

from galore_kernels.ops import registry


@contextlib.contextmanager
def standing_in(name: str) -> Iterator[None]:
    """Makes backend ``name`` serve CPU tensors for a while."""
    before = registry._backends.get(name)
    registry.register(simt_backend())
    try:
        yield
    finally:
        del registry._backends[name]
        if before is not None:
            registry.register(before)
