"""Random bases in plain PyTorch. Contract: ``galore_kernels.ops.random_basis``."""

from __future__ import annotations

import torch
from torch import Tensor

from galore_kernels.backends.reference.rounding import random_bits16
from galore_kernels.ops.random_basis import RandomBasis, magnitudes


def random_basis(short: int, basis: RandomBasis, device: torch.device) -> Tensor:
    padded = -(-basis.rank // 8) * 8  # a row begins a block of random bits
    bits = random_bits16(basis.seed, 0, short * padded, device).view(short, padded)[:, : basis.rank]
    size = magnitudes(basis.family).to(device)[(bits >> 4) & 0x7FF]
    return torch.where(bits >= 0x8000, -size, size).to(torch.bfloat16)
