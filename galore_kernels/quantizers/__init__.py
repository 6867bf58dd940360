"""Formats of quantized optimizer state: what the bytes mean, independent of who computes them."""

from galore_kernels.quantizers.basis import (
    BASIS_CODE_DTYPES,
    BASIS_FORMATS,
    basis_code_shape,
    basis_codes,
    dequantize_basis,
    quantize_basis,
)
from galore_kernels.quantizers.blockwise import (
    BLOCK_SIZE,
    SIGNED_ZERO_CODE,
    UNSIGNED_ZERO_CODE,
    block_count,
    dynamic_map,
    rounding_thresholds,
)
from galore_kernels.quantizers.weight import (
    GROUP_SIZE,
    dequantize_weight,
    quantize_weight,
    requantize_weight,
    weight_scale_shape,
)

__all__ = [
    "BASIS_CODE_DTYPES",
    "BASIS_FORMATS",
    "BLOCK_SIZE",
    "GROUP_SIZE",
    "SIGNED_ZERO_CODE",
    "UNSIGNED_ZERO_CODE",
    "basis_code_shape",
    "basis_codes",
    "block_count",
    "dequantize_basis",
    "dequantize_weight",
    "dynamic_map",
    "quantize_basis",
    "quantize_weight",
    "requantize_weight",
    "rounding_thresholds",
    "weight_scale_shape",
]
