"""The operations: one contract each (shapes, checks, fake, docstring), implemented by ``galore_kernels.backends``."""

from galore_kernels.ops.adam import AdamOptions, AdamState
from galore_kernels.ops.adam8bit_update import adam8bit_update
from galore_kernels.ops.galore_update import galore_update
from galore_kernels.ops.lowrank_update import lowrank_update
from galore_kernels.ops.quantize_blockwise import dequantize_blockwise, quantize_blockwise
from galore_kernels.ops.registry import backend_info
from galore_kernels.ops.rotate_moments import rotate_moments

__all__ = [
    "AdamOptions",
    "AdamState",
    "adam8bit_update",
    "backend_info",
    "dequantize_blockwise",
    "galore_update",
    "lowrank_update",
    "quantize_blockwise",
    "rotate_moments",
]
