"""What ``galore_update`` and ``lowrank_update`` share: the orientation, the checks and the registration."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from galore_kernels.ops import registry
from galore_kernels.ops.adam import (
    OPTIONS_SCHEMA,
    STATE_SCHEMA,
    WEIGHT_DTYPES,
    AdamOptions,
    AdamState,
    StepOptions,
    bundle,
    check_adam,
    check_tensor,
    check_weight,
    fail,
)
from galore_kernels.ops.library import define
from galore_kernels.quantizers import BASIS_CODE_DTYPES, basis_code_shape, weight_scale_shape

SIDES = ("left", "right")


def long_short(shape: tuple[int, ...], side: str) -> tuple[int, int]:
    """(L, S) of an (m, n) matrix: ``right`` projects the n columns, ``left`` the m rows."""
    rows, cols = shape
    return (rows, cols) if side == "right" else (cols, rows)


def check_oriented(op: str, param: Tensor, side: str) -> tuple[int, int]:
    """Raises ValueError unless ``param`` is a matrix and there is such a side. Returns (L, S)."""
    if param.dim() != 2:
        raise ValueError(
            f"{op}: param must be a matrix, got {param.dim()} dimensions; view it as (m, n), or use adam8bit_update"
        )
    if side not in SIDES:
        raise ValueError(f"{op}: side must be one of {', '.join(SIDES)}, got {side!r}; choose one of them")
    return long_short(tuple(param.shape), side)


def check_projection(
    op: str,
    param: Tensor,
    basis: Tensor,
    long_basis: Tensor | None,
    basis_scale: Tensor | None,
    side: str,
    scale: float,
) -> tuple[int, int]:
    """Raises ValueError unless the projection fits the weight. Returns the shape of the low-rank gradient."""
    long, short = check_oriented(op, param, side)
    if not math.isfinite(scale):
        raise ValueError(f"{op}: scale must be finite, got {scale}; GaLore's default is 0.25")
    device = param.device
    if basis_scale is not None:
        return long, _check_quantized(op, basis, basis_scale, long_basis, short, device)
    check_tensor(op, "basis", basis, device=device, dtypes=WEIGHT_DTYPES, contiguous=True)
    if basis.dim() != 2 or basis.shape[0] != short or basis.shape[1] < 1:
        raise ValueError(
            f"{op}: basis must have the shape ({short}, rank) on side {side!r} of a {tuple(param.shape)} weight, "
            f"got {tuple(basis.shape)}; pass the basis of this weight"
        )
    if long_basis is None:
        return long, basis.shape[1]
    check_tensor(op, "long_basis", long_basis, device=device, dtypes=WEIGHT_DTYPES, contiguous=True)
    if long_basis.dim() != 2 or long_basis.shape[0] != long or long_basis.shape[1] < 1:
        raise ValueError(
            f"{op}: long_basis must have the shape ({long}, rank), got {tuple(long_basis.shape)}; "
            "pass the basis of this weight's other side, or None"
        )
    return long_basis.shape[1], basis.shape[1]


def _check_quantized(
    op: str, basis: Tensor, basis_scale: Tensor, long_basis: Tensor | None, short: int, device: torch.device
) -> int:
    """Raises ValueError unless these are the codes and scales of a quantized basis. Returns its rank."""
    if long_basis is not None:
        raise ValueError(f"{op}: basis_scale must be None with long_basis, got a tensor; pass both bases unquantized")
    check_tensor(op, "basis_scale", basis_scale, device=device, dtypes=(torch.float32,), contiguous=True)
    if basis_scale.dim() != 1 or basis_scale.shape[0] < 1:
        raise ValueError(
            f"{op}: basis_scale must have the shape (rank,), got {tuple(basis_scale.shape)}; pass quantize_basis's"
        )
    rank = basis_scale.shape[0]
    check_tensor(op, "basis", basis, device=device, dtypes=tuple(BASIS_CODE_DTYPES.values()), contiguous=True)
    basis_format = next(name for name, dtype in BASIS_CODE_DTYPES.items() if dtype == basis.dtype)
    check_tensor(
        op, "basis", basis, device=device, dtypes=(basis.dtype,), shape=basis_code_shape(short, rank, basis_format)
    )
    return rank


def check_projected_weight(op: str, param: Tensor, weight_scale: Tensor | None, options: StepOptions) -> None:
    """Raises ValueError unless ``param`` is a weight, or the codes of an int8 weight with its scales."""
    if weight_scale is None:
        check_weight(op, param)
        return
    check_tensor(op, "param", param, device=param.device, dtypes=(torch.int8,), contiguous=True)
    if param.dim() == 2:
        shape = weight_scale_shape((param.shape[0], param.shape[1]))
        check_tensor(
            op,
            "weight_scale",
            weight_scale,
            device=param.device,
            dtypes=(torch.float32,),
            shape=shape,
            contiguous=True,
        )
    if options.rounding_seed is None:
        fail(op, "rounding_seed", "given for an int8 weight", None, "its steps are parts of a code's: pass a seed")


def define_projected_update(name: str, grad_argument: str) -> None:
    """Registers ``galore_kernels::name``, whose gradient is (m, n) if called ``grad``, else (L, r)."""

    def check(
        param: Tensor,
        grad: Tensor,
        basis: Tensor,
        long_basis: Tensor | None,
        basis_scale: Tensor | None,
        state: AdamState,
        options: AdamOptions,
        side: str,
        scale: float,
        weight_scale: Tensor | None,
    ) -> None:
        check_projected_weight(name, param, weight_scale, options)
        lowrank_shape = check_projection(name, param, basis, long_basis, basis_scale, side, scale)
        shape = tuple(param.shape) if grad_argument == "grad" else lowrank_shape
        check_tensor(name, grad_argument, grad, device=param.device, dtypes=WEIGHT_DTYPES, shape=shape)
        check_adam(name, param, math.prod(lowrank_shape), state, options)

    def run(
        param: Tensor,
        grad: Tensor,
        basis: Tensor,
        long_basis: Tensor | None,
        basis_scale: Tensor | None,
        *state_tensors: Any,
        side: str,
        scale: float,
        weight_scale: Tensor | None = None,
        backend: str = "auto",
        **options: Any,
    ) -> None:
        state, bundled = bundle(*state_tensors, **options)
        check(param, grad, basis, long_basis, basis_scale, state, bundled, side, scale, weight_scale)
        kernel = registry.kernel(name, backend, param.device)
        kernel(param, grad, basis, long_basis, basis_scale, state, bundled, side, scale, weight_scale)
        torch.autograd.graph.increment_version(param)

    def fake(
        param: Tensor,
        grad: Tensor,
        basis: Tensor,
        long_basis: Tensor | None,
        basis_scale: Tensor | None,
        *state_tensors: Any,
        side: str,
        scale: float,
        weight_scale: Tensor | None = None,
        backend: str = "auto",
        **options: Any,
    ) -> None:
        bundled = bundle(*state_tensors, **options)
        check(param, grad, basis, long_basis, basis_scale, *bundled, side, scale, weight_scale)

    schema = (
        f"(Tensor(a!) param, Tensor {grad_argument}, Tensor basis, Tensor? long_basis, Tensor? basis_scale, "
        f"{STATE_SCHEMA}, *, str side, float scale, Tensor(h!)? weight_scale=None, {OPTIONS_SCHEMA}) -> ()"
    )
    define(name, schema, run, fake)
