"""The way of an update through the stages of a device backend. CUDA and Triton differ in the stages alone.

    prepare -> project -> lowrank_adam -> back_project_update          galore_update in four launches
    prepare -> galore_update                                           the same in one pass, where the stages offer it
    prepare -> scale_and_check -> lowrank_adam -> back_project_update  lowrank_update
    prepare -> adam_update                                             adam8bit_update
    prepare -> project -> lowrank_adam -> gradient_factors -> scaled_gradient_update         apollo_update
    prepare -> project -> (torch on R) -> back_project_update          galore_adafactor_update
    prepare -> scale_and_check -> (torch on R) -> back_project_update  lowrank_adafactor_update

Nothing is read back from the device. What a launch has to know of another lies in the *control*: one row of
``CONTROL_WORDS`` 32-bit words for each tensor, written by ``prepare``.

Adafactor's step on R is torch's operations, which write the control too. It moves 6 bytes for each element of a 16-bit
weight (gradient read, weight read and written), 2 more with ``scale_parameter``, whose size of the weight is a pass of
its own, and for each element of R some 64: it is read or written in float32 that often, 2 bytes for each of the
weight's at r / S = 128 / 4096. That is counted, not measured, and much of the last stays in a large card's cache.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import fields, replace

import torch
from torch import Tensor

from galore_kernels.backends.batch import (
    SKIP,
    SKIP_GRADIENT,
    STEP_SIZE,
    TABLE_COLUMNS,
    Batch,
    basis_rank,
    make_batch,
    new_control,
    with_gradients,
)
from galore_kernels.backends.reference.adafactor import adafactor_step, allowed, commit
from galore_kernels.backends.reference.rotate_moments import rotate_moments
from galore_kernels.backends.scratch import ApolloScratch, LongSide, Scratch
from galore_kernels.backends.single import SingleUpdates, scales, seeds, write_back
from galore_kernels.backends.stages import Stages
from galore_kernels.ops.adafactor_update import AdafactorOptions, AdafactorState
from galore_kernels.ops.adam import AdamOptions, AdamState, StepOptions
from galore_kernels.ops.apollo_update import ApolloOptions
from galore_kernels.ops.group import GroupUpdate, UpdateGroup
from galore_kernels.ops.projection import long_short
from galore_kernels.ops.random_basis import RandomBasis, magnitudes

#: Low-rank gradients and directions of a group are kept for as many tensors at a time as fit into this.
WORKSPACE_BYTES = 256 * 2**20


class Pipeline(SingleUpdates):
    """The operations on tensors of a device, from a backend's stages."""

    def __init__(self, stages: Stages) -> None:
        self.stages = stages
        self._magnitudes: dict[tuple[str, torch.device], Tensor] = {}

    def update(self, group: UpdateGroup, grad: Tensor, options: AdamOptions, long_basis: Tensor | None = None) -> None:
        batch = with_gradients(make_batch(group, self.magnitudes(group)), (grad,))
        self.run(group, batch, (grad,), options, long_basis)

    def adafactor(
        self,
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
        *,
        is_lowrank: bool,
    ) -> None:
        """Contracts: ``galore_kernels.ops.galore_adafactor_update`` and ``lowrank_adafactor_update``."""
        if param.numel() == 0:
            state.step.add_(allowed(options, param.device))
            return
        weight, grad = param.contiguous(), grad.contiguous()
        rank = basis_rank(basis, basis_scale)
        kept = long_short(param.shape, side)[0] if long_basis is None else long_basis.shape[1]
        lowrank = torch.empty((kept, rank), dtype=torch.float32, device=param.device)
        # The stages that run don't look at moments: R, of whose shape they would be, stands for both.
        in_place = AdamState(lowrank, lowrank, None, None, state.step, state.skipped)
        own_scales = scales(basis_scale), scales(weight_scale)
        group = UpdateGroup(
            "galore_adafactor_update", (weight,), (in_place,), (basis,), side, scale, seeds(options), *own_scales
        )
        batch = with_gradients(make_batch(group), (grad,))
        control, flat = new_control(batch), lowrank.view(1, -1)
        long_side = None if long_basis is None else LongSide(batch, long_basis)

        # The step's size and decay follow; meanwhile any number on the device is a learning rate.
        shared = {field.name: getattr(options, field.name) for field in fields(StepOptions)}
        partial = self._partial_sums(batch)
        self.stages.prepare(batch, control, AdamOptions(state.step, 0.0, 0.0, 0.0, **shared), 1.0)
        if is_lowrank:
            self.stages.scale_and_check(grad.view(1, -1), control, flat)
        else:
            self._project(batch, control, flat, partial, long_side)

        step = adafactor_step(lowrank, weight, weight_scale, state, options)
        skip = control[0, SKIP]
        skip |= ~step.finite * SKIP_GRADIENT
        control.view(torch.float32)[0, STEP_SIZE : STEP_SIZE + 2] = torch.stack(step.decayed_last(scale))
        direction = step.direction if basis_scale is None else step.direction * basis_scale
        dtype = torch.float32 if long_side is not None else batch.factor_dtype
        direction = direction.to(dtype).view(1, -1)
        commit(step.moments, state, skip == 0, skip == SKIP_GRADIENT)
        self._back_project(batch, control, direction, long_side)
        write_back(param, weight)

    def random_basis(self, short: int, basis: RandomBasis, device: torch.device) -> Tensor:
        """Contract: ``galore_kernels.ops.random_basis``."""
        drawn = torch.empty((short, basis.rank), dtype=torch.bfloat16, device=device)
        self.stages.random_basis(drawn, basis, self._magnitudes_of(basis.family, device))
        return drawn

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

    def magnitudes(self, group: UpdateGroup) -> Tensor | None:
        """``Batch.magnitudes`` of a group; None if its bases are not drawn."""
        basis = group.bases[0] if group.bases else None
        if not isinstance(basis, RandomBasis):
            return None
        return self._magnitudes_of(basis.family, group.params[0].device)

    def _magnitudes_of(self, family: str, device: torch.device) -> Tensor:
        known = self._magnitudes.get((family, device))
        if known is not None:
            return known
        values = magnitudes(family).to(torch.bfloat16)
        if _capturing(device):
            # A graph can't hold a copy from memory that the host may free, and what it writes is its own.
            table = torch.empty_like(values, device=device)
            self.stages.write_column(table.view(torch.int64).view(-1, 1), 0, values.view(torch.int64).tolist())
            return table
        self._magnitudes[family, device] = values.to(device)  # waits: any stream may read it from now on
        return self._magnitudes[family, device]

    def tabled(self, batch: Batch) -> Batch:
        """``batch`` with a table of its own."""
        table = torch.empty((batch.count, TABLE_COLUMNS), dtype=torch.int64, device=batch.device)
        for column, values in enumerate(zip(*batch.addresses, strict=True)):
            self.stages.write_column(table, column, values)
        self.stages.write_column(table, TABLE_COLUMNS - 1, batch.gradients)
        return replace(batch, table=table)

    def run(
        self,
        group: UpdateGroup,
        batch: Batch,
        grads: Sequence[Tensor],
        options: AdamOptions,
        long_basis: Tensor | None = None,
    ) -> None:
        """One step of all tensors of ``group``, whose batch is ``batch``."""
        if group.operation == "adam8bit_update":
            self.full_rank(batch, options)
        elif group.operation == "lowrank_update":
            self.already_projected(batch, grads, options, group.scale, long_basis)
        elif group.apollo is not None:
            self.scaled(batch, options, group.apollo)
        else:
            self.projected(batch, options, group.scale, long_basis)

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
        all_scratch = Scratch.of(batch, _at_once(batch), batch.factor_dtype)
        for part, partial in [(part, self._partial_sums(part)) for part in batch.parts(_at_once(batch))]:
            scratch = all_scratch.first(part.count)
            self.stages.prepare(part, scratch.control, options, scale)
            self._project(part, scratch.control, scratch.lowrank, partial, None)
            self._from_lowrank(part, scratch)

    def scaled(self, batch: Batch, options: AdamOptions, apollo: ApolloOptions) -> None:
        """From gradient to weight with the gradient's own directions, scaled by what the subspace's moments say."""
        bytes_each = 2 * batch.moments * torch.float32.itemsize
        at_once = _that_fit(batch, bytes_each)
        all_scratch = ApolloScratch.of(batch, at_once)
        stages, root = self.stages, math.sqrt(apollo.scale)
        for part, partial, partial_squares in [
            (part, self._partial_sums(part), self._partial_squares(part)) for part in batch.parts(at_once)
        ]:
            own = all_scratch.first(part.count)
            lowrank, direction, squares = own.lowrank, own.direction, own.squares
            stages.prepare(part, own.control, options, root)
            stages.project(
                part, own.control, lowrank, partial, final=True, squares=squares, partial_squares=partial_squares
            )
            stages.lowrank_adam(part, own.control, lowrank, direction)
            stages.gradient_factors(part, own.control, lowrank, direction, squares, own.norms, own.factors, apollo)
            stages.scaled_gradient_update(part, own.control, own.factors)

    def already_projected(
        self,
        batch: Batch,
        grads: Sequence[Tensor],
        options: AdamOptions,
        scale: float,
        long_basis: Tensor | None = None,
    ) -> None:
        """From low-rank gradients to weights."""
        at_once = _at_once(batch)
        long_side = None if long_basis is None else LongSide(batch, long_basis)
        all_scratch = Scratch.of(batch, at_once, batch.factor_dtype if long_side is None else torch.float32)
        source = grads[0].view(1, -1)
        if batch.count > 1:
            source = source.new_empty((at_once, batch.moments))
        for first, part in zip(range(0, batch.count, at_once), batch.parts(at_once), strict=True):
            scratch, own = all_scratch.first(part.count), source[: part.count]
            if batch.count > 1:
                torch.stack([grad.view(-1) for grad in grads[first : first + part.count]], out=own)
            self.stages.prepare(part, scratch.control, options, scale)
            self.stages.scale_and_check(own, scratch.control, scratch.lowrank)
            self._from_lowrank(part, scratch, long_side)

    def _both_sides(self, batch: Batch, options: AdamOptions, scale: float, long_basis: Tensor) -> None:
        long_side, scratch = LongSide(batch, long_basis), Scratch.of(batch, 1, torch.float32)
        partial = self._partial_sums(batch)
        self.stages.prepare(batch, scratch.control, options, scale)
        self._project(batch, scratch.control, scratch.lowrank, partial, long_side)
        self._from_lowrank(batch, scratch, long_side)

    def _project(
        self, batch: Batch, control: Tensor, lowrank: Tensor, partial: Tensor | None, long_side: LongSide | None
    ) -> None:
        """lowrank = the projected gradient, of one side or both, scaled and signed; and the skip flag."""
        if long_side is None:
            self.stages.project(batch, control, lowrank, partial, final=True)
            return
        self.stages.project(batch, control, long_side.projected, partial, final=False)
        long_side.project(lowrank)
        self.stages.scale_and_check(lowrank, control, lowrank)

    def _partial_sums(self, batch: Batch) -> Tensor | None:
        return self._of_splits(batch, batch.long_short()[0] * batch.rank)

    def _partial_squares(self, batch: Batch) -> Tensor | None:
        return self._of_splits(batch, batch.long_short()[0])

    def _of_splits(self, batch: Batch, elements: int) -> Tensor | None:
        splits = self.stages.project_splits(batch)
        if splits == 1:
            return None
        return torch.empty((splits, batch.count, elements), dtype=torch.float32, device=batch.device)

    def _from_lowrank(self, batch: Batch, scratch: Scratch, long_side: LongSide | None = None) -> None:
        self.stages.lowrank_adam(batch, scratch.control, scratch.lowrank, scratch.direction)
        self._back_project(batch, scratch.control, scratch.direction, long_side)

    def _back_project(self, batch: Batch, control: Tensor, direction: Tensor, long_side: LongSide | None) -> None:
        """The weight, from a direction of one side or both."""
        if long_side is not None:
            long_side.back_project(direction)
            direction = long_side.direction
        self.stages.back_project_update(batch, control, direction)


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _at_once(batch: Batch) -> int:
    """Tensors whose low-rank gradients and directions fit into the scratch memory."""
    return _that_fit(batch, batch.moments * (torch.float32.itemsize + batch.factor_dtype.itemsize))


def _that_fit(batch: Batch, bytes_each: int) -> int:
    return min(batch.count, max(1, WORKSPACE_BYTES // max(1, bytes_each)))


class _PreparedGroup:
    """A group with its table, of which only the gradients' column is written again when their addresses change."""

    def __init__(self, pipeline: Pipeline, group: UpdateGroup) -> None:
        self._pipeline, self._group = pipeline, group  # the group's tensors stay where the batch says they are
        self._batch = make_batch(group, pipeline.magnitudes(group))

    def __call__(self, grads: Sequence[Tensor], options: AdamOptions) -> None:
        pipeline = self._pipeline
        if self._group.operation == "lowrank_update":  # whose gradients no stage finds by the table
            if self._batch.table is None:
                own = replace(self._batch, gradients=(0,) * self._batch.count, aligned=self._batch.fixed_aligned)
                self._batch = pipeline.tabled(own)
            pipeline.run(self._group, self._batch, grads, options)
            return
        batch = with_gradients(self._batch, grads)
        if batch.table is None:
            batch = pipeline.tabled(batch)
        elif batch.gradients != self._batch.gradients:
            # Of a write that is cut short nobody knows how far it came.
            self._batch = replace(self._batch, gradients=())
            pipeline.stages.write_column(batch.table, TABLE_COLUMNS - 1, batch.gradients)
        self._batch = batch
        pipeline.run(self._group, batch, grads, options)
