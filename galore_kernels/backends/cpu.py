"""The native CPU backend: threaded, vectorised C++ (``csrc/cpu``), reached through addresses and sizes.

Scratch memory is allocated here, before anything is changed; the C++ stages themselves allocate nothing that could
fail half-way. Weights that are not contiguous are updated in a copy and written back.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from galore_kernels import _native
from galore_kernels.backends.batch import DTYPE_CODES, SIDE_CODES
from galore_kernels.backends.reference.adafactor import adafactor_step
from galore_kernels.backends.reference.adam import scaled_gradient
from galore_kernels.backends.reference.rotate_moments import rotate_moments as rotate_both_sides
from galore_kernels.ops.adafactor_update import AdafactorOptions, AdafactorState
from galore_kernels.ops.adam import AdamOptions, AdamState, StepOptions
from galore_kernels.ops.apollo_update import ApolloOptions
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


def _scalars(state: AdamState, options: AdamOptions, inv_grad_scale: float) -> dict[str, Any]:
    return {
        "lr": float(options.lr),
        "beta1": options.beta1,
        "beta2": options.beta2,
        "eps": options.eps,
        "weight_decay": options.weight_decay,
        "step": int(state.step),
        "inv_grad_scale": inv_grad_scale,
        "maximize": options.maximize,
    }


def _moments(state: AdamState) -> tuple[int, int, int, int]:
    return (
        _address(state.exp_avg),
        _address(state.exp_avg_sq),
        _address(state.exp_avg_absmax),
        _address(state.exp_avg_sq_absmax),
    )


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


def adam8bit_update(param: Tensor, grad: Tensor, state: AdamState, options: AdamOptions) -> None:
    if _found_inf(options):
        return
    weight, grad, threads = param.contiguous(), grad.contiguous(), torch.get_num_threads()
    inv_grad_scale = _inverse_grad_scale(options)
    if not _native.all_representable(*_typed(grad), grad.numel(), inv_grad_scale, threads):
        state.skipped.add_(1)
        return
    _native.adam_update(
        *_typed(weight),
        *_typed(grad),
        *_moments(state),
        weight.numel(),
        **_scalars(state, options, inv_grad_scale),
        rounding_seed=options.rounding_seed,
        threads=threads,
    )
    _finish(param, weight, state)


def _finish(param: Tensor, weight: Tensor, state: AdamState | AdafactorState) -> None:
    if weight.data_ptr() != param.data_ptr():
        param.copy_(weight)
    state.step.add_(1)


def galore_update(
    param: Tensor,
    grad: Tensor,
    basis: Tensor,
    long_basis: Tensor | None,
    basis_scale: Tensor | None,
    state: AdamState,
    options: AdamOptions,
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
    _update_weight(
        param, weight_scale, lowrank, basis, long_basis, basis_scale, state, options, side, scale, workspace, threads
    )


def lowrank_update(
    param: Tensor,
    lowrank_grad: Tensor,
    basis: Tensor,
    long_basis: Tensor | None,
    basis_scale: Tensor | None,
    state: AdamState,
    options: AdamOptions,
    side: str,
    scale: float,
    weight_scale: Tensor | None = None,
) -> None:
    if _found_inf(options):
        return
    threads = torch.get_num_threads()
    workspace = _workspace(param, _rank(basis, basis_scale), side, threads)
    lowrank = lowrank_grad.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    inv_grad_scale = _inverse_grad_scale(options)
    if inv_grad_scale != 1.0:
        lowrank *= inv_grad_scale
    if not _representable(lowrank, threads):
        state.skipped.add_(1)
        return
    _update_weight(
        param, weight_scale, lowrank, basis, long_basis, basis_scale, state, options, side, scale, workspace, threads
    )


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
    *,
    divisor: float = 1.0,
    squares: Tensor | None = None,
) -> Tensor | None:
    """R / grad_scale / divisor in float32, or None if it is not representable.

    ``squares``: for the sums of the squares of the gradient's long indices, float32 (L,), which must be finite then.
    """
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
        squares=_address(squares),
        inv_grad_scale=_inverse_grad_scale(options) / divisor,
        workspace=_address(workspace),
        threads=threads,
    )
    if long_basis is not None:
        both = torch.empty((long_basis.shape[1], rank), dtype=torch.float32)
        lowrank = torch.mm(long_basis.float().T, lowrank, out=both)
        representable = _representable(lowrank, threads)
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


def _representable(lowrank: Tensor, threads: int) -> bool:
    return bool(_native.all_representable(*_typed(lowrank), lowrank.numel(), 1.0, threads))


def _update_weight(
    param: Tensor,
    weight_scale: Tensor | None,
    lowrank: Tensor,
    basis: Tensor,
    long_basis: Tensor | None,
    basis_scale: Tensor | None,
    state: AdamState,
    options: AdamOptions,
    side: str,
    scale: float,
    workspace: Tensor,
    threads: int,
) -> None:
    """Adam on the projected gradient (which becomes the update, in place), then back-projection into the weight."""
    weight = param.contiguous()
    direction = lowrank
    if long_basis is not None:
        # The moments may only change once the memory for what follows is there.
        wide = long_basis.float()
        direction = torch.empty((wide.shape[0], lowrank.shape[1]), dtype=torch.float32)
    scalars = _scalars(state, options, 1.0)
    _native.lowrank_adam(_address(lowrank), lowrank.numel(), *_moments(state), **scalars, threads=threads)
    if long_basis is not None:
        torch.mm(wide, lowrank, out=direction)
    _back_project(
        weight, weight_scale, direction, basis, basis_scale, side, scale, scalars, options, workspace, threads
    )
    _finish(param, weight, state)


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


def apollo_update(
    param: Tensor,
    grad: Tensor,
    basis: Tensor | RandomBasis,
    state: AdamState,
    scaled_norm: Tensor,
    options: AdamOptions,
    apollo: ApolloOptions,
    side: str,
    weight_scale: Tensor | None = None,
) -> None:
    if _found_inf(options):
        return
    weight, grad, threads = param.contiguous(), grad.contiguous(), torch.get_num_threads()
    rows, cols = param.shape
    long, short = long_short((rows, cols), side)
    divisor = 1.0
    if isinstance(basis, RandomBasis):
        divisor = math.sqrt(basis.rank)
        basis = random_basis(short, basis, param.device)
    rank = basis.shape[1]
    squares, factors = torch.empty((2, long), dtype=torch.float32)
    of_lowrank, of_direction = torch.empty((2, long), dtype=torch.float64)
    workspace = _workspace(param, rank, side, threads)
    lowrank = _projected(
        param, grad, basis, None, None, options, side, workspace, threads, divisor=divisor, squares=squares
    )
    if lowrank is None:
        state.skipped.add_(1)
        return
    scalars = _scalars(state, options, _inverse_grad_scale(options))
    _native.row_squares(_address(lowrank), long, rank, _address(of_lowrank), threads)
    _native.lowrank_adam(
        _address(lowrank), lowrank.numel(), *_moments(state), **{**scalars, "inv_grad_scale": 1.0}, threads=threads
    )
    _native.row_squares(_address(lowrank), long, rank, _address(of_direction), threads)
    norm = _native.gradient_factors(
        _address(of_direction),
        _address(of_lowrank),
        _address(squares),
        long,
        apollo.scaling == "tensor",
        apollo.scale,
        apollo.scale_front,
        apollo.norm_growth_limit or 0.0,
        float(scaled_norm),
        _address(factors),
        **scalars,
    )
    _native.scaled_gradient_update(
        *_typed(weight),
        _address(weight_scale),
        *_typed(grad),
        rows,
        cols,
        SIDE_CODES[side],
        _address(factors),
        **scalars,
        rounding_seed=options.rounding_seed,
        threads=threads,
    )
    scaled_norm.fill_(norm)
    _finish(param, weight, state)


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


register(
    Backend(
        name="cpu",
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
        describe=_native.build_info,
    )
)
