"""Block-wise dynamic 8-bit codes in plain PyTorch. The rules stand in ``galore_kernels.quantizers.blockwise``."""

from __future__ import annotations

import torch
from torch import Tensor

from galore_kernels.quantizers import (
    BLOCK_SIZE,
    SIGNED_ZERO_CODE,
    UNSIGNED_ZERO_CODE,
    block_count,
    dynamic_map,
    rounding_thresholds,
)


def _per_element(absmax: Tensor, numel: int) -> Tensor:
    return absmax.repeat_interleave(BLOCK_SIZE)[:numel]


def _absmax(flat: Tensor) -> Tensor:
    padded = flat.new_zeros(block_count(flat.numel()) * BLOCK_SIZE)
    padded[: flat.numel()] = flat.abs()
    return padded.view(-1, BLOCK_SIZE).amax(dim=1) if flat.numel() else padded


def quantize_blockwise(x: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    flat = x.flatten().float()
    absmax = _absmax(flat)
    scale = _per_element(absmax, flat.numel())
    normalized = torch.where(scale > 0, flat / scale, torch.zeros_like(flat))
    codes = torch.bucketize(normalized, rounding_thresholds(signed).to(x.device))
    if signed:
        codes = torch.where((flat < 0) & (codes == SIGNED_ZERO_CODE), SIGNED_ZERO_CODE - 1, codes)
    else:
        codes = torch.where((flat > 0) & (codes == UNSIGNED_ZERO_CODE), UNSIGNED_ZERO_CODE + 1, codes)
    return codes.to(torch.uint8).view(x.shape), absmax


def dequantize_blockwise(codes: Tensor, absmax: Tensor, signed: bool) -> Tensor:
    values = dynamic_map(signed).to(codes.device)[codes.flatten().long()]
    return (values * _per_element(absmax, codes.numel())).view(codes.shape)
