"""The CUDA backend with its kernels executed by the CPU: see ``python_tests/simt``."""

from __future__ import annotations

import simt

from galore_kernels.backends.cuda import CudaStages, make_backend
from galore_kernels.backends.pipeline import Pipeline
from galore_kernels.ops.registry import Backend


def simt_pipeline() -> Pipeline:
    """The operations on these kernels, for CPU tensors."""
    return Pipeline(CudaStages(simt.load(), "cpu"))


def simt_backend() -> Backend:
    """The same as a backend named "cuda"."""
    return make_backend(simt.load(), "cpu")
