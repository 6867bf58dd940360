"""The native CPU backend: threaded, vectorised C++ (``csrc/cpu``), reached through addresses and sizes.

An update is one call, for one tensor or for many of one shape, and is done or not done when an interrupt arrives.
Adafactor's, whose step in the subspace is the reference's, is made of stages.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from galore_kernels import _native
from galore_kernels.backends.batch import DTYPE_CODES, SIDE_CODES, make_batch
from galore_kernels.backends.reference.adafactor import adafactor_step
from galore_kernels.backends.reference.adam import scaled_gradient
from galore_kernels.backends.reference.rotate_moments import rotate_moments as rotate_both_sides
from galore_kernels.backends.single import SingleUpdates
from galore_kernels.ops.adafactor_update import AdafactorOptions, AdafactorState
from galore_kernels.ops.adam import AdamOptions, AdamState, StepOptions
from galore_kernels.ops.group import UpdateGroup
from galore_kernels.ops.projection import long_short
from galore_kernels.ops.random_basis import RandomBasis, magnitudes
from galore_kernels.ops.registry import Backend, register
from galore_kernels.quantizers import block_count


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _typed(tensor: Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), DTYPE_CODES[tensor.dtype]


def _inverse_grad_scale(options: StepOptions) -> float:
    # A tensor's division: a scale of 0 gives infinity, and the update is skipped, where Python's would raise.
    return 1.0 if options.grad_scale is None else float(1.0 / options.grad_scale.double())


def _found_inf(options: StepOptions) -> bool:
    return options.found_inf is not None and float(options.found_inf) != 0.0


def quantize_blockwise(x: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    codes = torch.empty(x.shape, dtype=torch.uint8)
    absmax = torch.empty(block_count(x.numel()), dtype=torch.float32)
    _native.quantize_blockwise(
        *_typed(x), x.numel(), signed, _address(codes), _address(absmax), torch.get_num_threads()
    )
    return codes, absmax


def dequantize_blockwise(codes: Tensor, absmax: Tensor, signed: bool) -> Tensor:
    values = torch.empty(codes.shape, dtype=torch.float32)
    _native.dequantize_blockwise(
        _address(codes), _address(absmax), codes.numel(), signed, _address(values), torch.get_num_threads()
    )
    return values


class _Group:
    """The update of a group: see ``galore_kernels.ops.group``."""

    def __init__(self, group: UpdateGroup, long_basis: Tensor | None = None) -> None:
        self._group, self._long_basis = group, long_basis  # whose tensors stay where the batch says they are
        drawn = group.bases[0] if group.bases else None
        self._magnitudes = _magnitudes(drawn.family) if isinstance(drawn, RandomBasis) else None
        batch = make_batch(group, self._magnitudes)
        self._batch = _native.CpuBatch(
            [(*row, 0) for row in batch.addresses],
            *batch.shape,
            batch.moments,
            batch.rank,
            SIDE_CODES[batch.side],
            DTYPE_CODES[batch.weight_dtype],
            DTYPE_CODES[batch.basis_dtype],
            _address(self._magnitudes),
            batch.stochastic,
            *(_typed(long_basis) if long_basis is not None else (0, 0)),
            long_basis.shape[1] if long_basis is not None else 0,
        )

    def __call__(self, grads: Sequence[Tensor], options: AdamOptions) -> None:
        if _found_inf(options):
            return
        scalars = _native.CpuScalars(
            float(options.lr),
            options.beta1,
            options.beta2,
            options.eps,
            options.weight_decay,
            _inverse_grad_scale(options),
            options.maximize,
        )
        gradients = [grad.data_ptr() for grad in grads], DTYPE_CODES[grads[0].dtype]
        operation, apollo, threads = self._group.operation, self._group.apollo, torch.get_num_threads()
        if operation == "adam8bit_update":
            _native.cpu_adam_update(self._batch, *gradients, scalars, threads)
        elif apollo is not None:
            tensor, limit = apollo.scaling == "tensor", apollo.norm_growth_limit or 0.0
            how = tensor, apollo.scale, apollo.scale_front, limit
            _native.cpu_apollo_update(self._batch, *gradients, scalars, *how, threads)
        else:
            run = _native.cpu_galore_update if operation == "galore_update" else _native.cpu_lowrank_update
            run(self._batch, *gradients, scalars, self._group.scale, threads)


class _Single(SingleUpdates):
    def update(self, group: UpdateGroup, grad: Tensor, options: AdamOptions, long_basis: Tensor | None = None) -> None:
        _Group(group, long_basis)((grad,), options)


def _finish(param: Tensor, weight: Tensor, state: AdamState | AdafactorState) -> None:
    if weight.data_ptr() != param.data_ptr():
        param.copy_(weight)
    state.step.add_(1)


def _projected(
    param: Tensor,
    grad: Tensor,
    basis: Tensor,
    long_basis: Tensor | None,
    basis_scale: Tensor | None,
    options: StepOptions,
    side: str,
    workspace: Tensor,
    threads: int,
) -> Tensor | None:
    """R / grad_scale in float32, or None if it is not representable."""
    rows, cols = param.shape
    rank, grad = _rank(basis, basis_scale), grad.contiguous()
    lowrank = torch.empty((long_short((rows, cols), side)[0], rank), dtype=torch.float32)
    representable = _native.project(
        *_typed(grad),
        rows,
        cols,
        SIDE_CODES[side],
        *_typed(basis),
        _address(basis_scale),
        rank,
        _address(lowrank),
        squares=0,
        inv_grad_scale=_inverse_grad_scale(options),
        workspace=_address(workspace),
        threads=threads,
    )
    if long_basis is not None:
        both = torch.empty((long_basis.shape[1], rank), dtype=torch.float32)
        lowrank = torch.mm(long_basis.float().T, lowrank, out=both)
        representable = _native.all_representable(*_typed(lowrank), lowrank.numel(), 1.0, threads)
    return lowrank if representable else None


def _rank(basis: Tensor, basis_scale: Tensor | None) -> int:
    # Two 4-bit codes share a column of the tensor.
    return basis.shape[1] if basis_scale is None else basis_scale.shape[0]


def _workspace(param: Tensor, rank: int, side: str, threads: int) -> Tensor:
    rows, cols = param.shape
    return torch.empty(workspace_bytes(rows, cols, rank, side, param.dtype, threads), dtype=torch.uint8)


def workspace_bytes(rows: int, cols: int, rank: int, side: str, dtype: torch.dtype, threads: int) -> int:
    """Scratch memory that an update of a weight takes beside R."""
    return _native.workspace_bytes(rows, cols, rank, SIDE_CODES[side], DTYPE_CODES[dtype], threads)


def _back_project(
    weight: Tensor,
    weight_scale: Tensor | None,
    direction: Tensor,
    basis: Tensor,
    basis_scale: Tensor | None,
    side: str,
    scale: float,
    scalars: dict[str, Any],
    options: StepOptions,
    workspace: Tensor,
    threads: int,
) -> None:
    """weight = (weight - step size * scale * X) * decay, X = direction @ basis.T or its transpose."""
    rows, cols = weight.shape
    _native.back_project_update(
        *_typed(weight),
        _address(weight_scale),
        rows,
        cols,
        SIDE_CODES[side],
        _address(direction),
        *_typed(basis),
        _address(basis_scale),
        _rank(basis, basis_scale),
        scale=scale,
        **scalars,
        rounding_seed=options.rounding_seed,
        workspace=_address(workspace),
        threads=threads,
    )


@functools.cache
def _magnitudes(family: str) -> Tensor:
    return magnitudes(family).to(torch.bfloat16)


def random_basis(short: int, basis: RandomBasis, device: torch.device) -> Tensor:
    drawn = torch.empty((short, basis.rank), dtype=torch.bfloat16)
    table, threads = _magnitudes(basis.family), torch.get_num_threads()
    _native.random_basis(basis.seed, short, basis.rank, _address(table), _address(drawn), threads)
    return drawn


def adafactor_update(param: Tensor, grad: Tensor, state: AdafactorState, options: AdafactorOptions) -> None:
    def write(weight: Tensor, direction: Tensor, scale: float, scalars: dict[str, Any]) -> None:
        rows = weight.shape[0] if weight.dim() > 1 else 1  # which threads share
        factor = torch.full((rows,), scale, dtype=torch.float32)
        _native.scaled_gradient_update(
            *_typed(weight),
            0,
            *_typed(direction),
            rows,
            weight.numel() // max(1, rows),
            SIDE_CODES["right"],
            _address(factor),
            **scalars,
            rounding_seed=options.rounding_seed,
            threads=torch.get_num_threads(),
        )

    if not _found_inf(options):
        _adafactor(param, None, scaled_gradient(grad.contiguous(), options), state, options, 1.0, write)


def galore_adafactor_update(
    param: Tensor,
    grad: Tensor,
    basis: Tensor,
    long_basis: Tensor | None,
    basis_scale: Tensor | None,
    state: AdafactorState,
    options: AdafactorOptions,
    side: str,
    scale: float,
    weight_scale: Tensor | None = None,
) -> None:
    if _found_inf(options):
        return
    threads = torch.get_num_threads()
    workspace = _workspace(param, _rank(basis, basis_scale), side, threads)
    lowrank = _projected(param, grad, basis, long_basis, basis_scale, options, side, workspace, threads)
    if lowrank is None:
        state.skipped.add_(1)
        return
    g = scaled_gradient(lowrank, replace(options, grad_scale=None))  # the projection has divided by it
    _projected_adafactor(
        param, weight_scale, g, basis, long_basis, basis_scale, state, options, side, scale, workspace, threads
    )


def lowrank_adafactor_update(
    param: Tensor,
    lowrank_grad: Tensor,
    basis: Tensor,
    long_basis: Tensor | None,
    basis_scale: Tensor | None,
    state: AdafactorState,
    options: AdafactorOptions,
    side: str,
    scale: float,
    weight_scale: Tensor | None = None,
) -> None:
    if _found_inf(options):
        return
    threads = torch.get_num_threads()
    workspace = _workspace(param, _rank(basis, basis_scale), side, threads)
    g = scaled_gradient(lowrank_grad, options)
    _projected_adafactor(
        param, weight_scale, g, basis, long_basis, basis_scale, state, options, side, scale, workspace, threads
    )


def _projected_adafactor(
    param: Tensor,
    weight_scale: Tensor | None,
    g: Tensor,
    basis: Tensor,
    long_basis: Tensor | None,
    basis_scale: Tensor | None,
    state: AdafactorState,
    options: AdafactorOptions,
    side: str,
    scale: float,
    workspace: Tensor,
    threads: int,
) -> None:
    """Adafactor on the projected gradient, scaled and signed, then back-projection into the weight."""

    def write(weight: Tensor, direction: Tensor, scale: float, scalars: dict[str, Any]) -> None:
        wide = direction if long_basis is None else long_basis.float() @ direction
        _back_project(weight, weight_scale, wide, basis, basis_scale, side, scale, scalars, options, workspace, threads)

    _adafactor(param, weight_scale, g, state, options, scale, write)


def _adafactor(
    param: Tensor,
    weight_scale: Tensor | None,
    g: Tensor,
    state: AdafactorState,
    options: AdafactorOptions,
    scale: float,
    write: Callable[[Tensor, Tensor, float, dict[str, Any]], None],
) -> None:
    """The step of a gradient, scaled and signed, that ``write`` puts into the weight.

    ``write``: (weight, direction, step size, scalars): weight = (weight - step size * what the direction stands for)
    * (1 - scalars["weight_decay"]).
    """
    if param.numel() == 0:
        state.step.add_(1)
        return
    step = adafactor_step(g, param, weight_scale, state, options)
    if not bool(step.finite):
        state.skipped.add_(1)
        return
    weight = param.contiguous()
    size, decay = map(float, step.decayed_last(scale))
    scalars = {"lr": 1.0, "beta1": 0.0, "beta2": 0.0, "eps": 0.0, "weight_decay": 1.0 - decay, "step": int(state.step)}
    write(weight, step.direction.contiguous(), size, {**scalars, "inv_grad_scale": 1.0, "maximize": False})
    for moment, value in step.moments:
        moment.copy_(value)
    _finish(param, weight, state)


def _moments(state: AdamState) -> tuple[int, int, int, int]:
    return (
        _address(state.exp_avg),
        _address(state.exp_avg_sq),
        _address(state.exp_avg_absmax),
        _address(state.exp_avg_sq_absmax),
    )


def rotate_moments(
    source: AdamState, target: AdamState, rotation: Tensor, long_rotation: Tensor | None, beta1: float, beta2: float
) -> None:
    if long_rotation is not None:  # both sides projected: r x r moments, once in a refresh
        rotate_both_sides(source, target, rotation, long_rotation, beta1, beta2)
        return
    threads = torch.get_num_threads()
    rank, new_rank = rotation.shape
    workspace = torch.empty(_native.rotate_workspace_bytes(rank, new_rank, threads), dtype=torch.uint8)
    _native.rotate_moments(
        source.exp_avg.shape[0],
        _address(rotation),
        rank,
        new_rank,
        *_moments(source),
        *_moments(target),
        beta1=beta1,
        beta2=beta2,
        step=int(source.step),
        workspace=_address(workspace),
        threads=threads,
    )


def _refuses(device: torch.device) -> str | None:
    return None if device.type == "cpu" else f"it serves cpu tensors only, not {device}"


_single = _Single()
register(
    Backend(
        name="cpu",
        kernels={
            "quantize_blockwise": quantize_blockwise,
            "dequantize_blockwise": dequantize_blockwise,
            "adam8bit_update": _single.adam8bit_update,
            "galore_update": _single.galore_update,
            "lowrank_update": _single.lowrank_update,
            "rotate_moments": rotate_moments,
            "random_basis": random_basis,
            "apollo_update": _single.apollo_update,
            "adafactor_update": adafactor_update,
            "galore_adafactor_update": galore_adafactor_update,
            "lowrank_adafactor_update": lowrank_adafactor_update,
        },
        refuses=_refuses,
        describe=_native.build_info,
        group=_Group,
    )
)
