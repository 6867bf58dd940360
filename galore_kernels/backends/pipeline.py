"""The way of an update through the stages of a device backend. CUDA and Triton differ in the stages alone.

    prepare -> project -> lowrank_adam -> back_project_update          galore_update in four launches
    prepare -> galore_update                                           the same in one pass, where the stages offer it
    prepare -> scale_and_check -> lowrank_adam -> back_project_update  lowrank_update
    prepare -> adam_update                                             adam8bit_update

Nothing is read back from the device. What a launch has to know of another lies in the *control*: one row of
``CONTROL_WORDS`` 32-bit words for each tensor, written by ``prepare``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from galore_kernels.backends.reference.rotate_moments import rotate_moments
from galore_kernels.ops.adam import AdamOptions, AdamState
from galore_kernels.ops.group import GroupUpdate, UpdateGroup
from galore_kernels.ops.projection import long_short

#: int8 and uint8 are the codes of bases in the formats "int8" and "int4".
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3, torch.uint8: 4}
SIDE_CODES = {"right": 0, "left": 1}

#: 32-bit words of a tensor's control row: the eight floats of AdamCoefficients in their order (csrc/core/adam.h), the
#: skip flag (0 go on, 1 the gradient is not representable, 2 found_inf), the panels that have arrived, the number of
#: the step being taken as two words, and four to round the row to 64 bytes.
CONTROL_WORDS = 16

#: Low-rank gradients and directions of a group are kept for as many tensors at a time as fit into this.
WORKSPACE_BYTES = 256 * 2**20

#: Columns of a table of addresses; the gradients' is the last.
TABLE_COLUMNS = 12

#: Columns that point to data, which the kernels may load as vectors.
_DATA_COLUMNS = 8

#: What the kernels' vector loads need of every address, and of the bytes in a row.
ALIGNMENT = 16


@dataclass(frozen=True)
class Batch:
    """N tensors of one shape as the kernels see them.

    Attributes:
        addresses: one row for each tensor: param, basis, exp_avg, exp_avg_sq, exp_avg_absmax, exp_avg_sq_absmax,
            basis_scale, weight_scale, step, skipped, and the rounding seed; 0 where there is none.
        gradients: the gradients' addresses; none before ``with_gradients``.
        table: both as an int64 tensor (N, TABLE_COLUMNS) on the device; None for a single tensor, whose row travels
            with the launch.
        shape: (m, n), or (elements, 1) at full rank. rank: 0 at full rank.
        moments: elements of each moment.
        weight_dtype: of the weight; int8 for codes, which have a ``weight_scale``.
        basis_dtype: of the basis, or of its codes: int8, or uint8 for two 4-bit codes in a byte.
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


class Stages(Protocol):
    """What a device backend implements. Every method only enqueues work on the current stream of the device.

    ``control`` is int32 (N, CONTROL_WORDS), ``lowrank`` float32 (N, elements), ``direction`` (N, elements) of float32
    or of ``Batch.factor_dtype``. A stage after ``prepare`` changes nothing of a tensor whose skip flag is set. Of a
    quantized basis ``project`` multiplies its sums, and ``lowrank_adam`` the direction, by the columns' scales.
    """

    def write_column(self, table: Tensor, column: int, values: Sequence[int]) -> None:
        """table[:, column] = values, from the host, which does not wait; a CUDA graph can hold it."""

    def prepare(self, batch: Batch, control: Tensor, options: AdamOptions, scale: float) -> None:
        """Fills the control rows: the coefficients, the skip flag from ``found_inf``, the step's number."""

    def project_splits(self, batch: Batch) -> int:
        """Into how many parts ``project`` should cut the short dimension, so that the device is busy."""

    def project(self, batch: Batch, control: Tensor, lowrank: Tensor, partial: Tensor | None, *, final: bool) -> None:
        """lowrank = projected gradient; if ``final``, scaled and signed, and the skip flag set where it must be.

        ``partial``: float32 (splits, N, elements) for the sums of the parts; None if there is one part.
        """

    def scale_and_check(self, source: Tensor, control: Tensor, lowrank: Tensor) -> None:
        """lowrank = source (N, elements) scaled and signed, and the skip flag. Both may be the same tensor."""

    def lowrank_adam(self, batch: Batch, control: Tensor, lowrank: Tensor, direction: Tensor) -> None:
        """Updates moments, ``step`` and ``skipped``; direction = Adam's direction, times the columns' scales.

        It may be ``lowrank`` itself.
        """

    def back_project_update(self, batch: Batch, control: Tensor, direction: Tensor) -> None:
        """The weights, from the (L, r) direction; int8 ones' scales too."""

    def adam_update(self, batch: Batch, control: Tensor) -> None:
        """Full rank: checks the gradients, then updates weights, moments, ``step`` and ``skipped``."""

    def in_one_pass(self, batch: Batch) -> bool:
        """Whether ``galore_update`` takes this batch, and is the faster way. It takes no int8 weights."""

    def galore_update(self, batch: Batch, control: Tensor) -> None:
        """project, lowrank_adam and back_project_update in one launch."""

    def rotate_moments(
        self, source: AdamState, target: AdamState, rotation: Tensor, beta1: float, beta2: float
    ) -> None:
        """The moments of ``target`` from those of ``source``: see ``galore_kernels.ops.rotate_moments``."""


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _row(
    param: Tensor,
    weight_scale: Tensor | None,
    basis: Tensor | None,
    basis_scale: Tensor | None,
    state: AdamState,
    seed: int | None,
) -> tuple[int, ...]:
    tensors = (
        param,
        basis,
        state.exp_avg,
        state.exp_avg_sq,
        state.exp_avg_absmax,
        state.exp_avg_sq_absmax,
        basis_scale,
        weight_scale,
        state.step,
        state.skipped,
    )
    return (*map(_address, tensors), seed or 0)


def make_batch(group: UpdateGroup) -> Batch:
    """The batch of a group, without a table and without gradients: see ``with_gradients``."""
    param, state = group.params[0], group.states[0]
    seeds = group.rounding_seeds or (None,) * len(group.params)
    bases = group.bases or (None,) * len(group.params)
    scales = group.basis_scales or (None,) * len(group.params)
    weight_scales = group.weight_scales or (None,) * len(group.params)
    basis, basis_scale = bases[0], scales[0]
    rows = zip(group.params, weight_scales, bases, scales, group.states, seeds, strict=True)
    addresses = tuple(_row(*row) for row in rows)
    rank = 0 if basis is None else basis.shape[1] if basis_scale is None else basis_scale.shape[0]
    basis_dtype = torch.float32 if basis is None else basis.dtype
    # Codes are loaded eight at a time: 16 bytes of what they become, in 16 bits.
    widths = (param.element_size(), basis_dtype.itemsize if basis_scale is None else 2)
    pitches = [] if basis is None else [param.shape[1] * widths[0], rank * widths[1]]
    data = [address for row in addresses for address in row[:_DATA_COLUMNS]]
    return Batch(
        addresses=addresses,
        gradients=(),
        table=None,
        shape=(param.shape[0], param.shape[1]) if basis is not None else (param.numel(), 1),
        rank=rank,
        side=group.side,
        moments=state.exp_avg.numel(),
        weight_dtype=param.dtype,
        grad_dtype=param.dtype,
        basis_dtype=basis_dtype,
        eight_bit=state.exp_avg_absmax is not None,
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


@dataclass(frozen=True)
class _Scratch:
    """What stages of one batch pass to one another. All of it is there before the first tensor changes."""

    control: Tensor
    lowrank: Tensor
    direction: Tensor

    @classmethod
    def of(cls, batch: Batch, count: int, direction_dtype: torch.dtype) -> _Scratch:
        """For up to ``count`` tensors of the batch at a time."""
        lowrank = torch.empty((count, batch.moments), dtype=torch.float32, device=batch.device)
        return cls(new_control(batch)[:count], lowrank, torch.empty_like(lowrank, dtype=direction_dtype))

    def first(self, count: int) -> _Scratch:
        """The part of ``count`` tensors."""
        return _Scratch(self.control[:count], self.lowrank[:count], self.direction[:count])


class _LongSide:
    """The other dimension's products, for one matrix both of whose sides are projected: L indices, k of which are left.

    They are small, and in double: float32 products would be rounded to tf32 where the user allows it. All memory is
    there before the matrix changes.
    """

    def __init__(self, batch: Batch, basis: Tensor) -> None:
        long, kept = basis.shape
        self._basis = basis.double()
        self._long, self._kept = self._basis.new_empty((long, batch.rank)), self._basis.new_empty((kept, batch.rank))
        self.projected = torch.empty((1, long * batch.rank), dtype=torch.float32, device=batch.device)
        self.direction = torch.empty_like(self.projected, dtype=batch.factor_dtype)

    def project(self, lowrank: Tensor) -> None:
        """lowrank (1, k * r) = basis.T @ ``self.projected``."""
        self._long.copy_(self.projected.view_as(self._long))
        torch.mm(self._basis.T, self._long, out=self._kept)
        lowrank.copy_(self._kept.view_as(lowrank))

    def back_project(self, direction: Tensor) -> None:
        """``self.direction`` = basis @ direction (1, k * r)."""
        self._kept.copy_(direction.view_as(self._kept))
        torch.mm(self._basis, self._kept, out=self._long)
        self.direction.copy_(self._long.view_as(self.direction))


def new_control(batch: Batch) -> Tensor:
    """Control rows, to be filled by ``Stages.prepare``."""
    return torch.empty((batch.count, CONTROL_WORDS), dtype=torch.int32, device=batch.device)


class Pipeline:
    """The operations on tensors of a device, from a backend's stages."""

    def __init__(self, stages: Stages) -> None:
        self.stages = stages

    def adam8bit_update(self, param: Tensor, grad: Tensor, state: AdamState, options: AdamOptions) -> None:
        """Contract: ``galore_kernels.ops.adam8bit_update``."""
        weight, grad = param.contiguous(), grad.contiguous()
        group = UpdateGroup("adam8bit_update", (weight,), (state,), rounding_seeds=_seeds(options))
        self.full_rank(with_gradients(make_batch(group), (grad,)), options)
        _write_back(param, weight)

    def galore_update(
        self,
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
        """Contract: ``galore_kernels.ops.galore_update``."""
        weight, grad = param.contiguous(), grad.contiguous()
        scales = _scales(basis_scale), _scales(weight_scale)
        group = UpdateGroup("galore_update", (weight,), (state,), (basis,), side, scale, _seeds(options), *scales)
        self.projected(with_gradients(make_batch(group), (grad,)), options, scale, long_basis)
        _write_back(param, weight)

    def lowrank_update(
        self,
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
        """Contract: ``galore_kernels.ops.lowrank_update``."""
        weight, grad = param.contiguous(), lowrank_grad.contiguous()
        scales = _scales(basis_scale), _scales(weight_scale)
        group = UpdateGroup("lowrank_update", (weight,), (state,), (basis,), side, scale, _seeds(options), *scales)
        batch = with_gradients(make_batch(group), (grad,))
        if long_basis is None:
            long_side, scratch = None, _Scratch.of(batch, 1, batch.factor_dtype)
        else:
            long_side, scratch = _LongSide(batch, long_basis), _Scratch.of(batch, 1, torch.float32)
        self.stages.prepare(batch, scratch.control, options, scale)
        self.stages.scale_and_check(grad.view(1, -1), scratch.control, scratch.lowrank)
        self._from_lowrank(batch, scratch, long_side)
        _write_back(param, weight)

    def rotate_moments(
        self,
        source: AdamState,
        target: AdamState,
        rotation: Tensor,
        long_rotation: Tensor | None,
        beta1: float,
        beta2: float,
    ) -> None:
        """Contract: ``galore_kernels.ops.rotate_moments``. Both sides at once are r x r: the reference does."""
        if long_rotation is not None:
            rotate_moments(source, target, rotation, long_rotation, beta1, beta2)
        else:
            self.stages.rotate_moments(source, target, rotation, beta1, beta2)

    def group(self, group: UpdateGroup) -> GroupUpdate:
        """The update of a group: see ``galore_kernels.ops.group``."""
        return _PreparedGroup(self, group)

    def tabled(self, batch: Batch) -> Batch:
        """``batch`` with a table of its own."""
        table = torch.empty((batch.count, TABLE_COLUMNS), dtype=torch.int64, device=batch.device)
        for column, values in enumerate(zip(*batch.addresses, strict=True)):
            self.stages.write_column(table, column, values)
        self.stages.write_column(table, TABLE_COLUMNS - 1, batch.gradients)
        return replace(batch, table=table)

    def full_rank(self, batch: Batch, options: AdamOptions) -> None:
        """From gradient to weight at full rank."""
        control = new_control(batch)
        self.stages.prepare(batch, control, options, 1.0)
        self.stages.adam_update(batch, control)

    def projected(self, batch: Batch, options: AdamOptions, scale: float, long_basis: Tensor | None = None) -> None:
        """From gradient to weight through the subspace: in one pass, or with R and U in scratch memory."""
        if long_basis is not None:
            self._both_sides(batch, options, scale, long_basis)
            return
        if batch.weight_dtype != torch.int8 and self.stages.in_one_pass(batch):
            control = new_control(batch)
            self.stages.prepare(batch, control, options, scale)
            self.stages.galore_update(batch, control)
            return
        all_scratch = _Scratch.of(batch, _at_once(batch), batch.factor_dtype)
        for part, partial in [(part, self._partial_sums(part)) for part in batch.parts(_at_once(batch))]:
            scratch = all_scratch.first(part.count)
            self.stages.prepare(part, scratch.control, options, scale)
            self.stages.project(part, scratch.control, scratch.lowrank, partial, final=True)
            self._from_lowrank(part, scratch)

    def already_projected(self, batch: Batch, grads: Sequence[Tensor], options: AdamOptions, scale: float) -> None:
        """From low-rank gradients to weights."""
        at_once = _at_once(batch)
        all_scratch = _Scratch.of(batch, at_once, batch.factor_dtype)
        source = torch.empty((at_once, batch.moments), dtype=grads[0].dtype, device=batch.device)
        for first, part in zip(range(0, batch.count, at_once), batch.parts(at_once), strict=True):
            scratch, own = all_scratch.first(part.count), source[: part.count]
            torch.stack([grad.view(-1) for grad in grads[first : first + part.count]], out=own)
            self.stages.prepare(part, scratch.control, options, scale)
            self.stages.scale_and_check(own, scratch.control, scratch.lowrank)
            self._from_lowrank(part, scratch)

    def _both_sides(self, batch: Batch, options: AdamOptions, scale: float, long_basis: Tensor) -> None:
        long_side, scratch = _LongSide(batch, long_basis), _Scratch.of(batch, 1, torch.float32)
        partial = self._partial_sums(batch)
        self.stages.prepare(batch, scratch.control, options, scale)
        self.stages.project(batch, scratch.control, long_side.projected, partial, final=False)
        long_side.project(scratch.lowrank)
        self.stages.scale_and_check(scratch.lowrank, scratch.control, scratch.lowrank)
        self._from_lowrank(batch, scratch, long_side)

    def _partial_sums(self, batch: Batch) -> Tensor | None:
        splits = self.stages.project_splits(batch)
        if splits == 1:
            return None
        shape = (splits, batch.count, batch.long_short()[0] * batch.rank)
        return torch.empty(shape, dtype=torch.float32, device=batch.device)

    def _from_lowrank(self, batch: Batch, scratch: _Scratch, long_side: _LongSide | None = None) -> None:
        direction = scratch.direction
        self.stages.lowrank_adam(batch, scratch.control, scratch.lowrank, direction)
        if long_side is not None:
            long_side.back_project(direction)
            direction = long_side.direction
        self.stages.back_project_update(batch, scratch.control, direction)


def _at_once(batch: Batch) -> int:
    """Tensors whose low-rank gradients and directions fit into the scratch memory."""
    bytes_each = batch.moments * (torch.float32.itemsize + batch.factor_dtype.itemsize)
    return min(batch.count, max(1, WORKSPACE_BYTES // max(1, bytes_each)))


def _seeds(options: AdamOptions) -> tuple[int, ...] | None:
    return None if options.rounding_seed is None else (options.rounding_seed,)


def _scales(scale: Tensor | None) -> tuple[Tensor, ...]:
    return () if scale is None else (scale,)


def _write_back(param: Tensor, weight: Tensor) -> None:
    if weight.data_ptr() != param.data_ptr():
        param.copy_(weight)


class _PreparedGroup:
    """A group with its table, of which only the gradients' column is written again when their addresses change."""

    def __init__(self, pipeline: Pipeline, group: UpdateGroup) -> None:
        self._pipeline, self._group = pipeline, group  # the group's tensors stay where the batch says they are
        self._batch = make_batch(group)

    def __call__(self, grads: Sequence[Tensor], options: AdamOptions) -> None:
        if self._group.operation == "lowrank_update":
            if self._batch.table is None:
                own = replace(self._batch, gradients=(0,) * self._batch.count, aligned=self._batch.fixed_aligned)
                self._batch = self._pipeline.tabled(own)
            self._pipeline.already_projected(self._batch, grads, options, self._group.scale)
            return
        batch = with_gradients(self._batch, grads)
        if batch.table is None:
            batch = self._pipeline.tabled(batch)
        elif batch.gradients != self._batch.gradients:
            # Of a write that is cut short nobody knows how far it came.
            self._batch = replace(self._batch, gradients=())
            self._pipeline.stages.write_column(batch.table, TABLE_COLUMNS - 1, batch.gradients)
        self._batch = batch
        if self._group.operation == "adam8bit_update":
            self._pipeline.full_rank(batch, options)
        else:
            self._pipeline.projected(batch, options, self._group.scale)
