"""The CUDA backend: the kernels of ``csrc/cuda`` as the stages of ``galore_kernels.backends.pipeline``."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from galore_kernels import _native
from galore_kernels.backends.batch import DTYPE_CODES, SIDE_CODES, Batch
from galore_kernels.backends.pipeline import Pipeline
from galore_kernels.ops.adam import AdamOptions, AdamState
from galore_kernels.ops.apollo_update import ApolloOptions
from galore_kernels.ops.random_basis import RandomBasis
from galore_kernels.ops.registry import Backend, register
from galore_kernels.quantizers import block_count

_SERVED = "compute capability 8.0 or later and a driver no older than the toolkit that built them"
_NO_DEVICE = "torch sees no CUDA device"


class CudaStages:
    """``Stages`` of a compiled module.

    Args:
        native: the module: ``galore_kernels._native``, or in tests the same kernels compiled for the CPU.
        device_type: "cuda", or what stands in for it.
    """

    def __init__(self, native: Any, device_type: str) -> None:
        self._native, self.device_type = native, device_type

    def _queue(self, device: torch.device) -> tuple[int, int]:
        """Index of the device and the caller's current stream on it."""
        index = self.device_index(device)
        return index, torch.cuda.current_stream(index).cuda_stream if device.type == "cuda" else 0

    def device_index(self, device: torch.device) -> int:
        """Its number for the runtime; 0 for what stands in for a device."""
        if device.type != "cuda":
            return 0
        return torch.cuda.current_device() if device.index is None else device.index

    def _native_batch(self, batch: Batch) -> Any:
        return self._native.CudaBatch(
            _address(batch.table),
            (*batch.addresses[0], batch.gradients[0]),
            batch.count,
            *batch.shape,
            batch.moments,
            batch.rank,
            SIDE_CODES[batch.side],
            DTYPE_CODES[batch.weight_dtype],
            DTYPE_CODES[batch.grad_dtype],
            DTYPE_CODES[batch.basis_dtype],
            _address(batch.magnitudes),
            batch.eight_bit,
            batch.stochastic,
            batch.aligned,
        )

    def write_column(self, table: Tensor, column: int, values: Sequence[int]) -> None:
        self._native.cuda_write_column(table.data_ptr(), table.shape[1], column, values, *self._queue(table.device))

    def prepare(self, batch: Batch, control: Tensor, options: AdamOptions, scale: float) -> None:
        self._native.cuda_prepare(
            self._native_batch(batch),
            control.data_ptr(),
            *_scalar(options.lr),
            *_scalar(options.grad_scale),
            *_scalar(options.found_inf),
            options.beta1,
            options.beta2,
            options.eps,
            options.weight_decay,
            options.maximize,
            scale,
            *self._queue(batch.device),
        )

    def project_splits(self, batch: Batch) -> int:
        return int(self._native.cuda_project_splits(self._native_batch(batch), self._queue(batch.device)[0]))

    def project(
        self,
        batch: Batch,
        control: Tensor,
        lowrank: Tensor,
        partial: Tensor | None,
        *,
        final: bool,
        squares: Tensor | None = None,
        partial_squares: Tensor | None = None,
    ) -> None:
        self._native.cuda_project(
            self._native_batch(batch),
            control.data_ptr(),
            lowrank.data_ptr(),
            _address(squares),
            final,
            1 if partial is None else partial.shape[0],
            _address(partial),
            _address(partial_squares),
            *self._queue(batch.device),
        )

    def scale_and_check(self, source: Tensor, control: Tensor, lowrank: Tensor) -> None:
        count, elements = lowrank.shape
        queue = self._queue(source.device)
        self._native.cuda_scale_and_check(
            *_typed(source), count, elements, control.data_ptr(), lowrank.data_ptr(), *queue
        )

    def lowrank_adam(self, batch: Batch, control: Tensor, lowrank: Tensor, direction: Tensor) -> None:
        self._native.cuda_lowrank_adam(
            self._native_batch(batch),
            control.data_ptr(),
            lowrank.data_ptr(),
            *_typed(direction),
            *self._queue(batch.device),
        )

    def back_project_update(self, batch: Batch, control: Tensor, direction: Tensor) -> None:
        self._native.cuda_back_project_update(
            self._native_batch(batch), control.data_ptr(), *_typed(direction), *self._queue(batch.device)
        )

    def adam_update(self, batch: Batch, control: Tensor) -> None:
        self._native.cuda_adam_update(self._native_batch(batch), control.data_ptr(), *self._queue(batch.device))

    def gradient_factors(
        self,
        batch: Batch,
        control: Tensor,
        lowrank: Tensor,
        direction: Tensor,
        squares: Tensor,
        norms: Tensor,
        factors: Tensor,
        apollo: ApolloOptions,
    ) -> None:
        self._native.cuda_gradient_factors(
            self._native_batch(batch),
            *(tensor.data_ptr() for tensor in (control, lowrank, direction, squares, norms, factors)),
            apollo.scaling == "tensor",
            math.sqrt(apollo.scale) if apollo.scale_front else 1.0,
            apollo.norm_growth_limit or 0.0,
            *self._queue(batch.device),
        )

    def scaled_gradient_update(self, batch: Batch, control: Tensor, factors: Tensor) -> None:
        self._native.cuda_scaled_gradient_update(
            self._native_batch(batch), control.data_ptr(), factors.data_ptr(), *self._queue(batch.device)
        )

    def random_basis(self, drawn: Tensor, basis: RandomBasis, magnitudes: Tensor) -> None:
        queue = self._queue(drawn.device)
        self._native.cuda_random_basis(drawn.data_ptr(), *drawn.shape, basis.seed, magnitudes.data_ptr(), *queue)

    def in_one_pass(self, batch: Batch) -> bool:
        return bool(self._native.cuda_in_one_pass(self._native_batch(batch), self._queue(batch.device)[0]))

    def galore_update(self, batch: Batch, control: Tensor) -> None:
        self._native.cuda_galore_update(self._native_batch(batch), control.data_ptr(), *self._queue(batch.device))

    def rotate_moments(
        self, source: AdamState, target: AdamState, rotation: Tensor, beta1: float, beta2: float
    ) -> None:
        self._native.cuda_rotate_moments(
            _moments(source),
            _moments(target),
            source.exp_avg.shape[0],
            *rotation.shape,
            rotation.data_ptr(),
            source.step.data_ptr(),
            beta1,
            beta2,
            *self._queue(rotation.device),
        )

    def quantize_blockwise(self, x: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
        codes = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
        absmax = torch.empty(block_count(x.numel()), dtype=torch.float32, device=x.device)
        queue = self._queue(x.device)
        self._native.cuda_quantize_blockwise(*_typed(x), x.numel(), signed, codes.data_ptr(), absmax.data_ptr(), *queue)
        return codes, absmax

    def dequantize_blockwise(self, codes: Tensor, absmax: Tensor, signed: bool) -> Tensor:
        values = torch.empty(codes.shape, dtype=torch.float32, device=codes.device)
        queue = self._queue(codes.device)
        self._native.cuda_dequantize_blockwise(
            codes.data_ptr(), absmax.data_ptr(), codes.numel(), signed, values.data_ptr(), *queue
        )
        return values


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _typed(tensor: Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), DTYPE_CODES[tensor.dtype]


def _moments(state: AdamState) -> tuple[int, ...]:
    moments = (state.exp_avg, state.exp_avg_sq, state.exp_avg_absmax, state.exp_avg_sq_absmax)
    return tuple(map(_address, moments))


def _scalar(scalar: Tensor | None) -> tuple[int, bool]:
    return (0, False) if scalar is None else (scalar.data_ptr(), scalar.dtype == torch.float64)


def make_backend(native: Any, device_type: str) -> Backend:
    """The backend named "cuda" on the kernels of ``native``, for tensors on devices of that type."""
    stages = CudaStages(native, device_type)
    pipeline = Pipeline(stages)

    @functools.cache
    def device_refuses(index: int) -> str | None:
        error: str = native.cuda_device_error(index)
        return f"device {index} can't run its kernels, which are for {_SERVED}: {error}" if error else None

    def refuses(device: torch.device) -> str | None:
        if device.type != device_type:
            return f"it serves {device_type} tensors only, not {device}"
        return device_refuses(stages.device_index(device))

    def describe() -> dict[str, Any]:
        reason = None
        if device_type == "cuda":
            reason = device_refuses(torch.cuda.current_device()) if torch.cuda.is_available() else _NO_DEVICE
        return {
            **({"available": False, "reason": reason} if reason else {}),
            "architectures": native.build_info()["cuda_archs"],
            "galore_update": "one launch: 16-bit tensors of one dtype, the basis quantized or not, rank <= 128 and a "
            "multiple of 8, 16-byte aligned rows, enough panels to fill the device; else, and for int8 weights, four "
            "launches (five where the short side is split)",
        }

    return Backend(
        name="cuda",
        kernels={
            "quantize_blockwise": stages.quantize_blockwise,
            "dequantize_blockwise": stages.dequantize_blockwise,
            "adam8bit_update": pipeline.adam8bit_update,
            "galore_update": pipeline.galore_update,
            "lowrank_update": pipeline.lowrank_update,
            "apollo_update": pipeline.apollo_update,
            "galore_adafactor_update": functools.partial(pipeline.adafactor, is_lowrank=False),
            "lowrank_adafactor_update": functools.partial(pipeline.adafactor, is_lowrank=True),
            "random_basis": pipeline.random_basis,
            "rotate_moments": pipeline.rotate_moments,
        },
        refuses=refuses,
        describe=describe,
        group=pipeline.group,
    )


if _native.build_info()["cuda_archs"]:  # else this build has no such backend
    register(make_backend(_native, "cuda"))
