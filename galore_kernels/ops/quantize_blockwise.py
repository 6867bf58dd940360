"""``quantize_blockwise`` and ``dequantize_blockwise``: the 8-bit format of ``galore_kernels.quantizers``."""

from __future__ import annotations

import torch
from torch import Tensor

from galore_kernels.ops import registry
from galore_kernels.ops.adam import WEIGHT_DTYPES, check_tensor
from galore_kernels.ops.library import define
from galore_kernels.quantizers import block_count


def quantize_blockwise(x: Tensor, signed: bool, *, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """Quantizes a tensor to block-wise dynamic 8-bit codes.

    Args:
        x: any shape; float32, bfloat16 or float16. Flattened row-major; must be finite.
        signed: True for a first moment, False for a second moment, whose elements must be >= 0.
        backend: "auto" or a name from ``backend_info()``.

    Returns:
        ``codes`` uint8 with the shape of ``x``, and ``absmax`` float32 of shape (ceil(numel / 256),).
        The nearest code is taken, ties go to the even one; a negative x never becomes a positive or zero code and,
        unsigned, a positive x never becomes zero (bitsandbytes' does, and the next update is then up to 254 x lr).

    Raises:
        ValueError: wrong dtype or layout. RuntimeError: the backend can't serve the device.
    """
    return torch.ops.galore_kernels.quantize_blockwise(x, signed, backend)


def dequantize_blockwise(codes: Tensor, absmax: Tensor, signed: bool, *, backend: str = "auto") -> Tensor:
    """Decodes ``quantize_blockwise``'s result: ``dynamic_map(signed)[codes] * absmax`` of each block.

    Args:
        codes: uint8, any shape. absmax: float32 of shape (ceil(numel / 256),) on the same device.
        signed: as it was quantized. backend: "auto" or a name from ``backend_info()``.

    Returns:
        float32 tensor with the shape of ``codes``.
    """
    return torch.ops.galore_kernels.dequantize_blockwise(codes, absmax, signed, backend)


def _check_quantize(x: Tensor) -> None:
    check_tensor("quantize_blockwise", "x", x, device=x.device, dtypes=WEIGHT_DTYPES)


def _quantize(x: Tensor, signed: bool, backend: str = "auto") -> tuple[Tensor, Tensor]:
    _check_quantize(x)
    run = registry.kernel("quantize_blockwise", backend, x.device)
    return run(x.contiguous(), signed)


def _quantize_fake(x: Tensor, signed: bool, backend: str = "auto") -> tuple[Tensor, Tensor]:
    _check_quantize(x)
    codes = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
    return codes, torch.empty(block_count(x.numel()), dtype=torch.float32, device=x.device)


def _check_dequantize(codes: Tensor, absmax: Tensor) -> None:
    op, device, shape = "dequantize_blockwise", codes.device, (block_count(codes.numel()),)
    check_tensor(op, "codes", codes, device=device, dtypes=(torch.uint8,))
    check_tensor(op, "absmax", absmax, device=device, dtypes=(torch.float32,), shape=shape, contiguous=True)


def _dequantize(codes: Tensor, absmax: Tensor, signed: bool, backend: str = "auto") -> Tensor:
    _check_dequantize(codes, absmax)
    return registry.kernel("dequantize_blockwise", backend, codes.device)(codes.contiguous(), absmax, signed)


def _dequantize_fake(codes: Tensor, absmax: Tensor, signed: bool, backend: str = "auto") -> Tensor:
    _check_dequantize(codes, absmax)
    return torch.empty(codes.shape, dtype=torch.float32, device=codes.device)


define(
    "quantize_blockwise",
    '(Tensor x, bool signed, str backend="auto") -> (Tensor, Tensor)',
    _quantize,
    _quantize_fake,
)
define(
    "dequantize_blockwise",
    '(Tensor codes, Tensor absmax, bool signed, str backend="auto") -> Tensor',
    _dequantize,
    _dequantize_fake,
)
