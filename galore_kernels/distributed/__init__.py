"""Training in several processes (torch.distributed)."""

from galore_kernels.distributed.ddp import reduce_lowrank

__all__ = ["reduce_lowrank"]
