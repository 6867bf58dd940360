"""The operations: one contract each (shapes, checks, fake, docstring), implemented by ``galore_kernels.backends``."""

from galore_kernels.ops.adafactor_update import (
    AdafactorOptions,
    AdafactorState,
    adafactor_update,
    galore_adafactor_update,
    lowrank_adafactor_update,
)
from galore_kernels.ops.adam import AdamOptions, AdamState
from galore_kernels.ops.adam8bit_update import adam8bit_update
from galore_kernels.ops.apollo_update import ApolloOptions, apollo_update
from galore_kernels.ops.galore_update import galore_update
from galore_kernels.ops.lowrank_update import lowrank_update
from galore_kernels.ops.quantize_blockwise import dequantize_blockwise, quantize_blockwise
from galore_kernels.ops.random_basis import RandomBasis, random_basis
from galore_kernels.ops.registry import backend_info
from galore_kernels.ops.rotate_moments import rotate_moments

__all__ = [
    "AdafactorOptions",
    "AdafactorState",
    "AdamOptions",
    "AdamState",
    "ApolloOptions",
    "RandomBasis",
    "adafactor_update",
    "adam8bit_update",
    "apollo_update",
    "backend_info",
    "dequantize_blockwise",
    "galore_adafactor_update",
    "galore_update",
    "lowrank_adafactor_update",
    "lowrank_update",
    "quantize_blockwise",
    "random_basis",
    "rotate_moments",
]
