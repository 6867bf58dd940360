"""A checksum over one parameter's state, so that a flipped bit in a checkpoint is refused rather than trained on."""

from __future__ import annotations

import ctypes
import zlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from galore_kernels.optim.shard import local


def _tensor_crc(tensor: Tensor, crc: int) -> int:
    flat = local(tensor).detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    if flat.numel() == 0:
        return crc
    # A view of the memory without a copy, and without asking for numpy.
    return zlib.crc32((ctypes.c_char * flat.numel()).from_address(flat.data_ptr()), crc)


def state_checksum(state: Mapping[str, Any]) -> int:
    """CRC-32 over the names, dtypes, shapes and bytes of a state's entries (tensors and plain numbers)."""
    crc = 0
    for key in sorted(state):
        value = state[key]
        if isinstance(value, Tensor):
            crc = zlib.crc32(f"{key}:{value.dtype}:{tuple(value.shape)};".encode(), crc)
            crc = _tensor_crc(value, crc)
        else:
            crc = zlib.crc32(f"{key}={value!r};".encode(), crc)
    return crc
