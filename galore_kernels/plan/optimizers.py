"""Memory of optimizers: state by moments and bases, and what their update and refresh take beside it.

Ours is counted by the optimizer itself on the meta device. Of the rivals the formulas are what their published code
does with tensors (torch 2.13, bitsandbytes 0.50, galore-torch 1.0), or, where it says so, what their papers state.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

import galore_kernels
from galore_kernels.backends.cpu import workspace_bytes
from galore_kernels.backends.pipeline import WORKSPACE_BYTES
from galore_kernels.plan.refresh import refresh_bytes
from galore_kernels.plan.settings import Settings
from galore_kernels.plan.shapes import LlamaShape, Matrix
from galore_kernels.quantizers import BLOCK_SIZE

__all__ = ["OPTIMIZERS", "Memory", "Parameter", "parameters"]

_FLOAT = torch.float32.itemsize

#: bitsandbytes keeps float32 moments of tensors with fewer elements.
_BNB_MIN_8BIT = 4096


@dataclass(frozen=True)
class Parameter:
    """``count`` parameters of one shape; a norm is a matrix of one column."""

    matrix: Matrix
    count: int
    projected: bool


def parameters(shape: LlamaShape) -> list[Parameter]:
    """All of a model's."""
    linears = [Parameter(matrix, shape.layers, True) for matrix in shape.linears()]
    tables = [Parameter(table, 1, False) for table in shape.tables()]
    return [*linears, *tables, Parameter(Matrix("norm", shape.hidden, 1), shape.norms, False)]


@dataclass(frozen=True)
class Memory:
    """One optimizer's.

    Attributes:
        label: its name in tables.
        state: bytes of (moments, bases) of a whole model.
        update: bytes beside gradients and state while these parameters are updated in one step.
        refresh: the same while the bases of so many matrices of one shape are found, and of the bases found until they
            are in the state; None if there are none.
        modes: values of ``weights`` and ``gradients`` it can be combined with.
        projects: whether a rank counts.
        rank: of all projections, where it is not to be chosen.
    """

    label: str
    state: Callable[[Settings], tuple[int, int]]
    update: Callable[[Settings, Sequence[Parameter]], int]
    refresh: Callable[[Settings, Matrix, int], tuple[int, int]] | None = None
    modes: tuple[str, ...] = ("fp32", "bf16", "dense")
    projects: bool = True
    rank: int | None = None


# ------------------------------------------------------------------ ours


@lru_cache(maxsize=64)
def _our_state(
    shape: LlamaShape, dtype: torch.dtype, rank: int, proj_type: str, basis_format: str | None, class_name: str
) -> tuple[int, int]:
    """(moments and what else the state holds, bases) of the optimizer's own state on the meta device."""
    every = parameters(shape)

    def tensors(projected: bool) -> list[torch.Tensor]:
        chosen = [(p.matrix, p.count) for p in every if p.projected is projected]
        sizes = [((m.rows, m.cols) if m.cols > 1 else (m.rows,), count) for m, count in chosen]
        return [
            torch.empty(size, dtype=dtype, device="meta", requires_grad=True)
            for size, count in sizes
            for _ in range(count)
        ]

    group: dict[str, Any] = {"params": tensors(True), "rank": rank, "proj_type": proj_type}
    if basis_format is not None:
        group["basis_format"] = basis_format
    optimizer = getattr(galore_kernels, class_name)([group, {"params": tensors(False)}])
    group = optimizer.param_groups[0]
    states = (optimizer._layout(param, group).new_state(param) for param in group["params"])
    bases = sum(state[name].nbytes for state in states for name in ("basis", "basis_scale") if name in state)
    return optimizer.state_bytes() - bases, bases


def _ours(class_name: str, update: Callable[[Settings, Sequence[Parameter]], int] | None = None) -> Memory:
    def state(settings: Settings) -> tuple[int, int]:
        options = (settings.rank, settings.proj_type, settings.basis_format)
        return _our_state(settings.shape, settings.dtype, *options, class_name)

    every = ("fp32", "bf16", "int8", "dense", "factored")
    return Memory(class_name, state, update or _our_update, refresh_bytes, every)


def _our_apollo(class_name: str, label: str, rank: int | None = None) -> Memory:
    """It draws its bases, and scales gradients that have to be there."""

    def state(settings: Settings) -> tuple[int, int]:
        return _our_state(settings.shape, settings.dtype, settings.rank, settings.proj_type, None, class_name)

    return Memory(label, state, _our_apollo_update, modes=("fp32", "bf16", "int8", "dense"), rank=rank)


def _our_apollo_update(settings: Settings, params: Sequence[Parameter]) -> int:
    """As GaLore's; on a CPU with the basis, which is drawn for one update, on a GPU with the direction in float32."""

    def scratch(param: Parameter) -> int:
        lowrank, rank = settings.lowrank(param.matrix), settings.rank_of(param.matrix)
        if settings.device == "cpu":
            return _our_scratch(settings, param) + settings.long_short(param.matrix)[1] * rank * 2
        return min(param.count, max(1, WORKSPACE_BYTES // (2 * lowrank * _FLOAT))) * 2 * lowrank * _FLOAT

    return max((scratch(param) for param in params if param.projected), default=0)


def _our_update(settings: Settings, params: Sequence[Parameter]) -> int:
    """R in float32 and Adam's direction, (L, r) each: of as many matrices of a shape as go together.

    On a GPU that is an upper bound: where one launch does it all, nothing is taken.
    """
    return max((_our_scratch(settings, p) for p in params if p.projected), default=0)


def _our_adafactor_update(settings: Settings, params: Sequence[Parameter]) -> int:
    """Of one matrix R in float32, at full rank the gradient; on a CPU it becomes the direction in place.

    On a GPU also u = R over the root of its second moment, and u over its size. At full rank the same of the gradient,
    which is there if it is float32; and once u is gone, also the change, the decayed weight and the new one, and of a
    16-bit weight the old one.
    """

    def scratch(param: Parameter) -> int:
        if settings.device == "cpu":
            return _our_scratch(settings, param) if param.projected else param.matrix.numel * _FLOAT
        if param.projected:
            return 3 * settings.lowrank(param.matrix) * _FLOAT
        return (4 if settings.dtype == torch.float32 else 6) * param.matrix.numel * _FLOAT

    return max(map(scratch, params))


def _our_native(settings: Settings, param: Parameter) -> int:
    """What the CPU's kernels take beside R."""
    matrix, dtype = param.matrix, torch.int8 if settings.weights == "int8" else settings.dtype
    rank, side = settings.rank_of(matrix), settings.side(matrix)
    return workspace_bytes(matrix.rows, matrix.cols, rank, side, dtype, torch.get_num_threads())


def _our_scratch(settings: Settings, param: Parameter) -> int:
    lowrank = settings.lowrank(param.matrix)
    if settings.device == "cpu":
        return lowrank * _FLOAT + _our_native(settings, param)
    each = lowrank * (_FLOAT + settings.dtype.itemsize)
    together = min(param.count, max(1, WORKSPACE_BYTES // each))
    gathered = lowrank * settings.dtype.itemsize if settings.gradients == "factored" else 0  # the gradients, in a row
    return together * (each + gathered)


# ------------------------------------------------------------------ full-rank rivals


def _adamw_state(settings: Settings) -> tuple[int, int]:
    """Two moments in the parameters' dtype, and a step counter each."""
    tensors = sum(param.count for param in parameters(settings.shape))
    return 2 * settings.shape.parameters * settings.dtype.itemsize + tensors * _FLOAT, 0


def _adamw_update(settings: Settings, params: Sequence[Parameter]) -> int:
    """On a GPU (foreach) the roots of all second moments; on a CPU a tensor's, that divided, and the one before."""
    if settings.device == "cuda":
        elements = sum(param.matrix.numel * param.count for param in params)
    else:  # the linear layers' largest follow one another
        elements = max((3 if param.count > 1 else 2) * param.matrix.numel for param in params)
    return elements * settings.dtype.itemsize


def _nothing(settings: Settings, params: Sequence[Parameter]) -> int:
    """Updated in place by one kernel."""
    return 0


def _bitsandbytes_state(settings: Settings) -> tuple[int, int]:
    every = parameters(settings.shape)
    return sum(param.count * _bitsandbytes_moments(param.matrix.numel) for param in every), 0


def _bitsandbytes_moments(elements: int) -> int:
    """Two moments of codes and absmax values, or of float32."""
    if elements < _BNB_MIN_8BIT:
        return 2 * elements * _FLOAT
    return 2 * (elements + -(-elements // BLOCK_SIZE) * _FLOAT)


# ------------------------------------------------------------------ rivals that project


def _low_rank_state(
    moments: Callable[[Settings, int], int],
    basis: Callable[[Settings, Matrix], int],
) -> Callable[[Settings], tuple[int, int]]:
    """State of L x r elements for each projected matrix, of all elements for the rest."""

    def state(settings: Settings) -> tuple[int, int]:
        total, bases = 0, 0
        for param in parameters(settings.shape):
            elements = param.matrix.numel
            if param.projected:
                elements = settings.lowrank(param.matrix)
                bases += param.count * basis(settings, param.matrix)
            total += param.count * moments(settings, elements)
        return total, bases

    return state


def _two_own(settings: Settings, elements: int) -> int:
    """Two moments in the gradient's dtype."""
    return 2 * elements * settings.dtype.itemsize


def _two_8bit(settings: Settings, elements: int) -> int:
    return _bitsandbytes_moments(elements)


def _galore_torch_basis(settings: Settings, matrix: Matrix) -> int:
    """(S, r) in the gradient's dtype; in float32 it is a view that keeps the decomposition's whole factor."""
    short = settings.long_short(matrix)[1]
    columns = min(matrix.rows, matrix.cols) if settings.dtype == torch.float32 else settings.rank_of(matrix)
    return short * columns * settings.dtype.itemsize


def _q_galore_basis(settings: Settings, matrix: Matrix) -> int:
    """4-bit codes and a float32 scale for each 256 (Zhang et al., arXiv 2407.08296)."""
    elements = settings.long_short(matrix)[1] * settings.rank_of(matrix)
    return elements // 2 + -(-elements // BLOCK_SIZE) * _FLOAT


def _apollo_torch_basis(settings: Settings, matrix: Matrix) -> int:
    """(S, r) in the gradient's dtype, which it keeps though a seed would do (Zhu et al., arXiv 2412.05270, table 1)."""
    return settings.long_short(matrix)[1] * settings.rank_of(matrix) * settings.dtype.itemsize


def _galore_torch_update(settings: Settings, params: Sequence[Parameter]) -> int:
    """R, the root of v, Adam's direction; the direction projected back, and that times the scale, (m, n) each."""
    elements = (2 * p.matrix.numel + (3 * settings.lowrank(p.matrix) if p.projected else 0) for p in params)
    return max(elements) * settings.dtype.itemsize


def _galore_torch8bit_update(settings: Settings, params: Sequence[Parameter]) -> int:
    """A copy of the weight, the direction projected back, and that times the scale, (m, n) each; R and its copy."""
    elements = (3 * p.matrix.numel + 2 * settings.lowrank(p.matrix) for p in params if p.projected)
    return max(elements, default=0) * settings.dtype.itemsize


def _apollo_update(settings: Settings, params: Sequence[Parameter]) -> int:
    """The scaled gradient, (m, n), and the projection, (S, r); at full rank the root of v and Adam's direction."""

    def elements(param: Parameter) -> int:
        if not param.projected:
            return 2 * param.matrix.numel
        return param.matrix.numel + settings.long_short(param.matrix)[1] * settings.rank_of(param.matrix)

    return max(map(elements, params)) * settings.dtype.itemsize


def _full_svd(settings: Settings, matrix: Matrix, count: int) -> tuple[int, int]:
    """One matrix after another: a float32 copy of a 16-bit gradient, U (m, k) and V (k, n), k the smaller, and (L, r).

    The last are the other side's vectors, times the singular values, which nobody asks for.
    """
    copy = matrix.numel if settings.dtype != torch.float32 else 0
    factors = min(matrix.rows, matrix.cols) * (matrix.rows + matrix.cols)
    return (copy + factors + settings.lowrank(matrix)) * _FLOAT, 0


def _galore_torch_refresh(settings: Settings, matrix: Matrix, count: int) -> tuple[int, int]:
    """Beside that, the direction projected back and the root of v of the matrix before."""
    before = matrix.numel + settings.lowrank(matrix)
    return _full_svd(settings, matrix, count)[0] + before * settings.dtype.itemsize, 0


OPTIMIZERS: dict[str, Memory] = {
    "galore8bit": _ours("GaLoreFusedAdam8bit"),
    "galore": _ours("GaLoreFusedAdamW"),
    "galore_adafactor": _ours("GaLoreFusedAdafactor", _our_adafactor_update),
    "adamw": Memory("torch AdamW", _adamw_state, _adamw_update, projects=False),
    "adamw_fused": Memory("torch AdamW, fused", _adamw_state, _nothing, projects=False),
    "adamw8bit": Memory("bitsandbytes AdamW8bit", _bitsandbytes_state, _nothing, projects=False),
    "galore_torch": Memory(
        "galore_torch AdamW",
        _low_rank_state(_two_own, _galore_torch_basis),
        _galore_torch_update,
        _galore_torch_refresh,
    ),
    "galore_torch8bit": Memory(
        "galore_torch AdamW8bit", _low_rank_state(_two_8bit, _galore_torch_basis), _galore_torch8bit_update, _full_svd
    ),
    "apollo8bit": _our_apollo("APOLLOFusedAdam8bit", "APOLLOFusedAdam8bit"),
    "apollo": _our_apollo("APOLLOFusedAdamW", "APOLLOFusedAdamW"),
    "apollo_mini": _our_apollo("APOLLOFusedAdam8bit", "APOLLOFusedAdam8bit, Mini", rank=1),
    "apollo_torch": Memory("apollo_torch APOLLOAdamW", _low_rank_state(_two_own, _apollo_torch_basis), _apollo_update),
    "q_galore": Memory(
        "Q-GaLore",
        _low_rank_state(_two_8bit, _q_galore_basis),
        _galore_torch8bit_update,
        _full_svd,
        ("fp32", "bf16", "int8", "dense"),
    ),
}
"""By the name that options use; those of ``galore-pretrain`` among them."""
