"""The block-wise dynamic 8-bit format of the moments (Dettmers et al., arXiv 2110.02861).

A tensor is cut into blocks of 256 consecutive elements (row-major). Each block stores its largest magnitude
(*absmax*, float32) and each element an 8-bit *code*, an index into a fixed table of 256 values in [-1, 1]; an
element decodes to ``dynamic_map[code] * absmax``. The tables equal bitsandbytes' to the bit, so that states can be
compared and converted. What differs from bitsandbytes is one rule of rounding: a positive second moment never
becomes zero.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

BLOCK_SIZE = 256
SIGNED_ZERO_CODE = 127
UNSIGNED_ZERO_CODE = 0
_DECADES = 7  # 1e-6 .. 1

# Whatever torch's default dtype and device are when the first caller comes: the tables are cached.
_TABLE: Any = {"dtype": torch.float32, "device": "cpu"}


def block_count(numel: int) -> int:
    """Number of blocks (and so of absmax values) that ``numel`` elements occupy; the last may be short."""
    return -(-numel // BLOCK_SIZE)


@lru_cache(maxsize=2)
def _dynamic_map(signed: bool) -> Tensor:
    # Float32 throughout: a float64 derivation differs from bitsandbytes' table by 1-2 ulp.
    values = [torch.tensor([0.0, 1.0], **_TABLE)]
    for decade in range(_DECADES):
        cells = 2**decade if signed else 2 ** (decade + 1)
        edges = torch.linspace(0.1, 1.0, cells + 1, **_TABLE)
        centres = (edges[:-1] + edges[1:]) / 2.0 * 10.0 ** (decade - _DECADES + 1)
        values.append(centres)
        if signed:
            values.append(-centres)
    return torch.cat(values).sort().values


def dynamic_map(signed: bool) -> Tensor:
    """The 256 float32 values that codes stand for, ascending, shape (256,).

    ``signed=True`` serves the first moment (zero is code 127, no -1), ``signed=False`` the second (zero is code 0).
    """
    return _dynamic_map(signed).clone()


def rounding_thresholds(signed: bool) -> Tensor:
    """Float32 thresholds T, shape (255,), such that the nearest code of z is the number of T[c] < z.

    T[c] is the midpoint of the codes c and c + 1. An exact tie belongs to the even code, as on CUDA in
    bitsandbytes: below an odd c the tie rounds up, so its threshold is lowered by one float.
    """
    values = _dynamic_map(signed)
    midpoints = (values[:-1] + values[1:]) * 0.5
    lowered = torch.nextafter(midpoints, torch.tensor(-torch.inf, **_TABLE))
    odd = torch.arange(255, device="cpu") % 2 == 1
    return torch.where(odd, lowered, midpoints)
