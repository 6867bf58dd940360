"""The reference backend: plain PyTorch on any device, the oracle for every other backend. Slow and easy to read."""

from __future__ import annotations

import torch

from galore_kernels.backends.reference.adafactor_update import (
    adafactor_update,
    galore_adafactor_update,
    lowrank_adafactor_update,
)
from galore_kernels.backends.reference.adam8bit_update import adam8bit_update
from galore_kernels.backends.reference.apollo_update import apollo_update
from galore_kernels.backends.reference.galore_update import galore_update, lowrank_update
from galore_kernels.backends.reference.quantize_blockwise import dequantize_blockwise, quantize_blockwise
from galore_kernels.backends.reference.random_basis import random_basis
from galore_kernels.backends.reference.rotate_moments import rotate_moments
from galore_kernels.ops.registry import Backend, register


def _refuses(device: torch.device) -> str | None:
    return "a meta tensor has no data" if device.type == "meta" else None


register(
    Backend(
        name="reference",
        kernels={
            "quantize_blockwise": quantize_blockwise,
            "dequantize_blockwise": dequantize_blockwise,
            "adam8bit_update": adam8bit_update,
            "galore_update": galore_update,
            "lowrank_update": lowrank_update,
            "rotate_moments": rotate_moments,
            "random_basis": random_basis,
            "apollo_update": apollo_update,
            "adafactor_update": adafactor_update,
            "galore_adafactor_update": galore_adafactor_update,
            "lowrank_adafactor_update": lowrank_adafactor_update,
        },
        refuses=_refuses,
        describe=lambda: {"devices": "any", "implementation": "plain PyTorch"},
    )
)
