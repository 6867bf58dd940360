"""What a native call or a launch is told: N tensors of one shape, a row of addresses for each of them.

What a launch on a device has to know of another lies in the *control*, int32 rows of ``CONTROL_WORDS``, written by
``prepare``. The kernels' side is ``csrc/core/tensor_row.h``, ``csrc/cuda/batch.h`` and ``backends/triton/elements.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from galore_kernels.ops.adafactor_update import AdafactorState
from galore_kernels.ops.adam import AdamState
from galore_kernels.ops.group import UpdateGroup
from galore_kernels.ops.projection import long_short
from galore_kernels.ops.random_basis import RandomBasis

#: int8 and uint8 are the codes of bases in the formats "int8" and "int4".
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3, torch.uint8: 4}
SIDE_CODES = {"right": 0, "left": 1}

#: 32-bit words of a tensor's control row: the eight floats of AdamCoefficients in their order (csrc/core/adam.h), the
#: skip flag (0 go on, 1 the gradient is not representable, 2 found_inf), the panels that have arrived, the number of
#: the step being taken as two words, the step size before it was rounded to a float as the two of a double, and two to
#: round the row to 64 bytes.
CONTROL_WORDS = 16

#: Those words that the host names too.
STEP_SIZE, DECAY, SKIP = 6, 7, 8

#: Why a tensor is left alone. Bits, because projections of many programs set the first.
SKIP_GRADIENT = 1  # not representable; counted
SKIP_FOUND_INF = 2  # the caller's, who counts it

#: Columns of a table of addresses; the gradients' is the last.
TABLE_COLUMNS = 14

#: Columns that point to data, which the kernels may load as vectors.
_DATA_COLUMNS = 8

#: What the kernels' vector loads need of every address, and of the bytes in a row.
ALIGNMENT = 16


@dataclass(frozen=True)
class Batch:
    """N tensors of one shape as the kernels see them.

    Attributes:
        addresses: one row for each tensor: param, basis, exp_avg, exp_avg_sq, exp_avg_absmax, exp_avg_sq_absmax (of
            Adafactor exp_avg_sq_row, exp_avg_sq_col), basis_scale, weight_scale, step, skipped, the rounding seed,
            scaled_norm and the drawn basis' seed; 0 where there is none.
        gradients: the gradients' addresses; none before ``with_gradients``.
        table: both as an int64 tensor (N, TABLE_COLUMNS) on the device; None for a single tensor, whose row travels
            with the launch.
        shape: (m, n), or (elements, 1) at full rank. rank: 0 at full rank.
        moments: elements of each moment; of Adafactor, of the gradient or its projection.
        weight_dtype: of the weight; int8 for codes, which have a ``weight_scale``.
        basis_dtype: of the basis, or of its codes: int8, or uint8 for two 4-bit codes in a byte; bfloat16 if it is
            drawn.
        magnitudes: ``ops.random_basis.magnitudes`` in bfloat16 on the device, if the bases are drawn, else None. The
            entries are to be divided by sqrt(rank).
        fixed_aligned: whether every address and every row of weight, moments and basis is a multiple of 16 bytes; rows
            of codes, of eight codes.
        aligned: the same of the gradients too.
    """

    addresses: tuple[tuple[int, ...], ...]
    gradients: tuple[int, ...]
    table: Tensor | None
    shape: tuple[int, int]
    rank: int
    side: str
    moments: int
    weight_dtype: torch.dtype
    grad_dtype: torch.dtype
    basis_dtype: torch.dtype
    magnitudes: Tensor | None
    eight_bit: bool
    stochastic: bool
    fixed_aligned: bool
    aligned: bool
    device: torch.device

    def parts(self, size: int) -> Iterator[Batch]:
        """The batch in pieces of at most ``size`` tensors."""
        for first in range(0, self.count, size):
            part = slice(first, first + size)
            table = None if self.table is None else self.table[part]
            yield replace(self, addresses=self.addresses[part], gradients=self.gradients[part], table=table)

    @property
    def count(self) -> int:
        """Number of tensors."""
        return len(self.addresses)

    @property
    def factor_dtype(self) -> torch.dtype:
        """Dtype that the basis is multiplied in, and the direction stored: the basis', or the weight's for codes.

        Where both are codes, bfloat16.
        """
        if self.basis_dtype.is_floating_point:
            return self.basis_dtype
        return torch.bfloat16 if self.weight_dtype == torch.int8 else self.weight_dtype

    def long_short(self) -> tuple[int, int]:
        """(L, S) of the matrices."""
        return long_short(self.shape, self.side)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _moments(state: AdamState | AdafactorState) -> tuple[Tensor | None, ...]:
    if isinstance(state, AdafactorState):
        return state.exp_avg, state.exp_avg_sq, state.exp_avg_sq_row, state.exp_avg_sq_col
    return state.exp_avg, state.exp_avg_sq, state.exp_avg_absmax, state.exp_avg_sq_absmax


def _elements(param: Tensor, state: AdamState | AdafactorState, rank: int) -> int:
    """``Batch.moments``."""
    if not isinstance(state, AdafactorState):
        return state.exp_avg.numel()
    if state.exp_avg_sq_row is None or rank == 0:
        return param.numel()
    return state.exp_avg_sq_row.numel() * rank


def _row(
    param: Tensor,
    weight_scale: Tensor | None,
    basis: Tensor | RandomBasis | None,
    basis_scale: Tensor | None,
    state: AdamState | AdafactorState,
    seed: int | None,
    scaled_norm: Tensor | None,
) -> tuple[int, ...]:
    tensors = (
        param,
        basis if isinstance(basis, Tensor) else None,
        *_moments(state),
        basis_scale,
        weight_scale,
        state.step,
        state.skipped,
    )
    basis_seed = basis.seed if isinstance(basis, RandomBasis) else 0
    return (*map(_address, tensors), seed or 0, _address(scaled_norm), basis_seed)


def basis_rank(basis: Tensor, basis_scale: Tensor | None) -> int:
    """r of a basis (S, r), or of its codes, of which two 4-bit ones share a column."""
    return int(basis.shape[1] if basis_scale is None else basis_scale.shape[0])


def _rank_and_dtype(basis: Tensor | RandomBasis | None, basis_scale: Tensor | None) -> tuple[int, torch.dtype]:
    """``Batch.rank`` and ``Batch.basis_dtype``."""
    if basis is None:
        return 0, torch.float32
    if isinstance(basis, RandomBasis):
        return basis.rank, torch.bfloat16
    return basis_rank(basis, basis_scale), basis.dtype


def make_batch(group: UpdateGroup, magnitudes: Tensor | None = None) -> Batch:
    """The batch of a group, without a table and without gradients: see ``with_gradients``.

    ``magnitudes``: of a group whose bases are drawn; ``Pipeline.magnitudes`` has them.
    """
    param, state = group.params[0], group.states[0]
    none = (None,) * len(group.params)
    bases, scales = group.bases or none, group.basis_scales or none
    weight_scales, seeds, norms = group.weight_scales or none, group.rounding_seeds or none, group.scaled_norms or none
    rows = zip(group.params, weight_scales, bases, scales, group.states, seeds, norms, strict=True)
    addresses = tuple(_row(*row) for row in rows)
    basis, basis_scale = bases[0], scales[0]
    rank, basis_dtype = _rank_and_dtype(basis, basis_scale)
    pitches = [] if basis is None else [param.shape[1] * param.element_size()]
    if isinstance(basis, Tensor):
        # Codes are loaded eight at a time: 16 bytes of what they become, in 16 bits.
        pitches.append(rank * (basis_dtype.itemsize if basis_scale is None else 2))
    data = [address for row in addresses for address in row[:_DATA_COLUMNS]]
    return Batch(
        addresses=addresses,
        gradients=(),
        table=None,
        shape=(param.shape[0], param.shape[1]) if basis is not None else (param.numel(), 1),
        rank=rank,
        side=group.side,
        moments=_elements(param, state, rank),
        weight_dtype=param.dtype,
        grad_dtype=param.dtype,
        basis_dtype=basis_dtype,
        magnitudes=magnitudes,
        eight_bit=isinstance(state, AdamState) and state.exp_avg_absmax is not None,
        stochastic=group.rounding_seeds is not None,
        fixed_aligned=not any(x % ALIGNMENT for x in (*pitches, *data)),
        aligned=False,
        device=param.device,
    )


def with_gradients(batch: Batch, grads: Sequence[Tensor]) -> Batch:
    """The batch with these contiguous gradients; their column in a table is as it was."""
    gradients = tuple([grad.data_ptr() for grad in grads])
    dtype = grads[0].dtype
    if gradients == batch.gradients and dtype == batch.grad_dtype:
        return batch
    pitch = batch.shape[1] * dtype.itemsize if batch.rank else 0
    aligned = batch.fixed_aligned and not any(x % ALIGNMENT for x in (pitch, *gradients))
    return replace(batch, gradients=gradients, grad_dtype=dtype, aligned=aligned)


def new_control(batch: Batch) -> Tensor:
    """Control rows, to be filled by ``Stages.prepare``."""
    return torch.empty((batch.count, CONTROL_WORDS), dtype=torch.int32, device=batch.device)
