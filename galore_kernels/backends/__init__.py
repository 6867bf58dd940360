"""The backends. Importing one registers it; a backend knows the operations, the operations know no backend."""

from galore_kernels.backends import cpu, cuda, reference, triton

__all__ = ["cpu", "cuda", "reference", "triton"]
