"""torch's dtypes in Triton."""

from __future__ import annotations

from typing import Any

import torch
from triton import language as tl

from galore_kernels.backends.triton.configuration import PanelTile, Tile

_DTYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.int8: tl.int8,
    torch.uint8: tl.uint8,
}


def triton_dtype(dtype: torch.dtype) -> Any:
    """The dtype as a kernel's constant."""
    return _DTYPES[dtype]


def offset_dtype(tile: Tile | PanelTile, pitch: int) -> Any:
    """The integer that reaches over any tile of a matrix whose rows are ``pitch`` elements apart."""
    return tl.int32 if tile.reach * pitch < 2**31 else tl.int64
