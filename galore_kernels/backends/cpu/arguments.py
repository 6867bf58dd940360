"""What the native module is told of tensors and options."""

from __future__ import annotations

import torch
from torch import Tensor

from galore_kernels import _native
from galore_kernels.backends.batch import DTYPE_CODES, SIDE_CODES
from galore_kernels.ops.adam import StepOptions


def address(tensor: Tensor | None) -> int:
    """Of its memory; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def typed(tensor: Tensor) -> tuple[int, int]:
    """Address and dtype code."""
    return tensor.data_ptr(), DTYPE_CODES[tensor.dtype]


def inverse_grad_scale(options: StepOptions) -> float:
    """What the gradient is multiplied by."""
    # A tensor's division: a scale of 0 gives infinity, and the update is skipped, where Python's would raise.
    return 1.0 if options.grad_scale is None else float(1.0 / options.grad_scale.double())


def found_inf(options: StepOptions) -> bool:
    """Whether nothing may change."""
    return options.found_inf is not None and float(options.found_inf) != 0.0


def workspace_bytes(rows: int, cols: int, rank: int, side: str, dtype: torch.dtype, threads: int) -> int:
    """Scratch memory that an update of a weight takes beside R."""
    return _native.workspace_bytes(rows, cols, rank, SIDE_CODES[side], DTYPE_CODES[dtype], threads)
