"""The 8-bit code's tables on a device.

A quotient's code is found with two loads instead of a binary search's eight. Floats whose upper 16 bits agree form a
*bucket*: at most one threshold of either map lies in any (the densest are 0.007 apart, between 0.1 and 1, where buckets
are at most 0.004 wide). So the code is that of the bucket's lowest float, plus one if z lies above that code's
threshold. Quotients below 2^-23 are nearer to zero than to any other value and share the first bucket.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from galore_kernels.quantizers import dynamic_map, rounding_thresholds

#: Upper 16 bits of 2^-23, below every threshold of a nonzero code, and the number of buckets from there to 1.0.
FIRST_BUCKET = (127 - 23) << 7
BUCKETS = (127 << 7) - FIRST_BUCKET + 1


def lowest_of_buckets() -> Tensor:
    """The lowest float of each bucket: the positive ones from the smallest up, then the negative ones likewise."""
    upper = torch.arange(FIRST_BUCKET, FIRST_BUCKET + BUCKETS, dtype=torch.int32, device="cpu") << 16
    return torch.cat([upper.view(torch.float32), -(upper | 0xFFFF).view(torch.float32)])


def _first_codes(signed: bool) -> Tensor:
    return torch.bucketize(lowest_of_buckets(), rounding_thresholds(signed)).to(torch.uint8)


@lru_cache(maxsize=64)
def code_tables(device: torch.device) -> tuple[Tensor, Tensor]:
    """(maps, first codes) on ``device``, copied there once.

    maps: float32, of the signed map and then of the unsigned one 256 values and 256 thresholds, of which the last is
    infinite. first codes: uint8, of each map the code of the lowest float of 2 * BUCKETS buckets.
    """
    infinity = torch.full((1,), torch.inf, dtype=torch.float32, device="cpu")
    maps = [x for signed in (True, False) for x in (dynamic_map(signed), rounding_thresholds(signed), infinity)]
    codes = [_first_codes(signed) for signed in (True, False)]
    return torch.cat(maps).to(device), torch.cat(codes).to(device)
