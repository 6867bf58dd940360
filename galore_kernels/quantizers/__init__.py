"""Formats of quantized optimizer state: what the bytes mean, independent of who computes them."""

from galore_kernels.quantizers.blockwise import (
    BLOCK_SIZE,
    SIGNED_ZERO_CODE,
    UNSIGNED_ZERO_CODE,
    block_count,
    dynamic_map,
    rounding_thresholds,
)

__all__ = [
    "BLOCK_SIZE",
    "SIGNED_ZERO_CODE",
    "UNSIGNED_ZERO_CODE",
    "block_count",
    "dynamic_map",
    "rounding_thresholds",
]
