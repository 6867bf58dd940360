"""The native module called with tensors, for the tests of the module itself: addresses, dtype codes, workspace."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from galore_kernels import _native

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
PARAM_CODES = {**DTYPE_CODES, torch.int8: 3}
SIDE_CODES = {"right": 0, "left": 1}
BLOCK = 256

FloatArray = NDArray[np.float32]


@dataclass(frozen=True)
class Scalars:
    """Adam's scalars under the native module's names."""

    lr: float = 1e-2
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.1
    step: int = 4
    inv_grad_scale: float = 1.0
    maximize: bool = False

    def replace(self, **changes: Any) -> Scalars:
        return replace(self, **changes)


@dataclass
class State:
    """Adam's moments as the native module takes them; absmax None means float32 moments."""

    m: Tensor
    v: Tensor
    m_absmax: Tensor | None
    v_absmax: Tensor | None

    def addresses(self) -> tuple[int, int, int, int]:
        absmax = [0 if t is None else t.data_ptr() for t in (self.m_absmax, self.v_absmax)]
        return self.m.data_ptr(), self.v.data_ptr(), absmax[0], absmax[1]

    def clone(self) -> State:
        m_absmax = None if self.m_absmax is None else self.m_absmax.clone()
        v_absmax = None if self.v_absmax is None else self.v_absmax.clone()
        return State(self.m.clone(), self.v.clone(), m_absmax, v_absmax)

    def tensors(self) -> list[Tensor]:
        return [t for t in (self.m, self.v, self.m_absmax, self.v_absmax) if t is not None]


def random_state(n: int, *, eight_bit: bool, generator: torch.Generator) -> State:
    """Moments as after some steps: m of both signs and v positive, over several orders of magnitude."""
    decades = torch.empty(n).uniform_(-3, 0, generator=generator)
    m = torch.randn(n, generator=generator) * 10**decades
    v = m.square() * torch.rand(n, generator=generator)
    if not eight_bit:
        return State(m, v, None, None)
    m_codes, m_absmax = quantize(m, signed=True)
    v_codes, v_absmax = quantize(v, signed=False)
    return State(m_codes, v_codes, m_absmax, v_absmax)


def quantize(x: Tensor, *, signed: bool, threads: int = 1) -> tuple[Tensor, Tensor]:
    codes = torch.full((x.numel(),), 77, dtype=torch.uint8)
    absmax = torch.full((-(-x.numel() // BLOCK),), -1.0)
    _native.quantize_blockwise(
        x.data_ptr(), DTYPE_CODES[x.dtype], x.numel(), signed, codes.data_ptr(), absmax.data_ptr(), threads
    )
    return codes, absmax


def dequantize(codes: Tensor, absmax: Tensor, *, signed: bool, threads: int = 1) -> Tensor:
    out = torch.full((codes.numel(),), torch.nan)
    _native.dequantize_blockwise(codes.data_ptr(), absmax.data_ptr(), codes.numel(), signed, out.data_ptr(), threads)
    return out


def dequantized(state: State) -> tuple[FloatArray, FloatArray]:
    """The moments as float32 arrays, by table lookup in numpy."""
    if state.m_absmax is None or state.v_absmax is None:
        return state.m.numpy().copy(), state.v.numpy().copy()
    moments = []
    for codes, absmax, signed in ((state.m, state.m_absmax, True), (state.v, state.v_absmax, False)):
        values = np.array(_native.dynamic_map(signed), dtype=np.float32)[codes.numpy()]
        moments.append(values * np.repeat(absmax.numpy(), BLOCK)[: codes.numel()])
    return moments[0], moments[1]


def adam_update(
    param: Tensor, grad: Tensor, state: State, scalars: Scalars, *, rounding_seed: int | None = None, threads: int = 1
) -> None:
    _native.adam_update(
        param.data_ptr(),
        DTYPE_CODES[param.dtype],
        grad.data_ptr(),
        DTYPE_CODES[grad.dtype],
        *state.addresses(),
        param.numel(),
        **asdict(scalars),
        rounding_seed=rounding_seed,
        threads=threads,
    )


def lowrank_adam(lowrank: Tensor, state: State, scalars: Scalars, *, threads: int = 1) -> None:
    _native.lowrank_adam(lowrank.data_ptr(), lowrank.numel(), *state.addresses(), **asdict(scalars), threads=threads)


GUARD_FLOATS = 1 << 18
GUARD = 12345.0


def workspace(rows: int, cols: int, rank: int, side: str, dtype: torch.dtype, threads: int) -> Tensor:
    """Scratch memory of the two products; ``dtype``: of the weight."""
    return guarded(_native.workspace_bytes(rows, cols, rank, SIDE_CODES[side], PARAM_CODES[dtype], threads))


def guarded(size: int) -> Tensor:
    """What is asked for, filled with NaN since nothing may depend on what it held, and a guard behind it."""
    scratch = torch.full((size // 4 + GUARD_FLOATS,), torch.nan)
    scratch[-GUARD_FLOATS:] = GUARD
    return scratch


def check_guard(scratch: Tensor) -> None:
    """Nothing may be written behind what was asked for."""
    assert bool((scratch[-GUARD_FLOATS:] == GUARD).all()), "the native code wrote past its workspace"


def project(
    grad: Tensor, basis: Tensor, side: str, *, inv_grad_scale: float = 1.0, threads: int = 1
) -> tuple[Tensor, bool]:
    rows, cols = grad.shape
    rank = basis.shape[1]
    long_size = rows if side == "right" else cols
    lowrank = torch.full((long_size, rank), torch.nan)
    scratch = workspace(rows, cols, rank, side, torch.float32, threads)
    representable = _native.project(
        grad.data_ptr(),
        DTYPE_CODES[grad.dtype],
        rows,
        cols,
        SIDE_CODES[side],
        basis.data_ptr(),
        DTYPE_CODES[basis.dtype],
        0,
        rank,
        lowrank.data_ptr(),
        squares=0,
        inv_grad_scale=inv_grad_scale,
        workspace=scratch.data_ptr(),
        threads=threads,
    )
    check_guard(scratch)
    return lowrank, representable


def back_project_update(
    param: Tensor,
    update: Tensor,
    basis: Tensor,
    side: str,
    scalars: Scalars,
    *,
    scale: float = 0.25,
    rounding_seed: int | None = None,
    weight_scale: Tensor | None = None,
    threads: int = 1,
) -> None:
    rows, cols = param.shape
    rank = basis.shape[1]
    scratch = workspace(rows, cols, rank, side, param.dtype, threads)
    _native.back_project_update(
        param.data_ptr(),
        PARAM_CODES[param.dtype],
        0 if weight_scale is None else weight_scale.data_ptr(),
        rows,
        cols,
        SIDE_CODES[side],
        update.data_ptr(),
        basis.data_ptr(),
        DTYPE_CODES[basis.dtype],
        0,
        rank,
        scale=scale,
        **asdict(scalars),
        rounding_seed=rounding_seed,
        workspace=scratch.data_ptr(),
        threads=threads,
    )
    check_guard(scratch)


def rotate_moments(state: State, rotation: Tensor, *, step: int, threads: int = 1) -> State:
    rank, new_rank = rotation.shape
    rows = state.m.numel() // rank
    size = rows * new_rank
    absmax = [None if t is None else torch.full((-(-size // BLOCK),), torch.nan) for t in (state.m_absmax,) * 2]
    dtype = state.m.dtype
    target = State(torch.full((size,), 77, dtype=dtype), torch.full((size,), 77, dtype=dtype), *absmax)
    scratch = guarded(_native.rotate_workspace_bytes(rank, new_rank, threads))
    _native.rotate_moments(
        rows,
        rotation.data_ptr(),
        rank,
        new_rank,
        *state.addresses(),
        *target.addresses(),
        beta1=0.9,
        beta2=0.999,
        step=step,
        workspace=scratch.data_ptr(),
        threads=threads,
    )
    check_guard(scratch)
    return target


def bits(x: Tensor) -> NDArray[np.uint32]:
    """The bit patterns of a float32 tensor, so that -0.0 and NaN are told apart from what equals or differs."""
    return x.contiguous().view(torch.int32).numpy().view(np.uint32)
