"""The Triton backend: portable kernels, compiled where they run, as the stages of ``galore_kernels.backends.pipeline``.

Importing this package registers the backend and imports no Triton.
"""

from __future__ import annotations

from functools import partial

from galore_kernels.backends.pipeline import Pipeline
from galore_kernels.backends.triton import availability
from galore_kernels.backends.triton.stages import TritonStages
from galore_kernels.ops.registry import Backend, register

__all__ = ["make_backend"]


def make_backend(*, in_interpreter: bool = False) -> Backend:
    """The backend named "triton". Without Triton it exists, and says in its refusals how to get it.

    Args:
        in_interpreter: for tests: a backend that serves CPU tensors, and nothing else, under TRITON_INTERPRET=1. It is
            another one than the registered, which "auto" would otherwise choose for every CPU tensor.
    """
    stages = TritonStages()
    pipeline = Pipeline(stages)
    return Backend(
        name="triton",
        kernels={
            "quantize_blockwise": stages.quantize_blockwise,
            "dequantize_blockwise": stages.dequantize_blockwise,
            "adam8bit_update": pipeline.adam8bit_update,
            "galore_update": pipeline.galore_update,
            "lowrank_update": pipeline.lowrank_update,
            "apollo_update": pipeline.apollo_update,
            "galore_adafactor_update": partial(pipeline.adafactor, is_lowrank=False),
            "lowrank_adafactor_update": partial(pipeline.adafactor, is_lowrank=True),
            "random_basis": pipeline.random_basis,
            "rotate_moments": pipeline.rotate_moments,
        },
        refuses=partial(availability.refuses, in_interpreter=in_interpreter),
        describe=partial(availability.describe, in_interpreter=in_interpreter),
        group=pipeline.group,
    )


register(make_backend())
