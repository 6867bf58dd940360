"""The stages of ``galore_kernels.backends.stages`` in Triton. Kernels are imported, and so compiled, at first use."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from galore_kernels.backends.batch import TABLE_COLUMNS, Batch
from galore_kernels.ops.adam import AdamOptions, AdamState
from galore_kernels.ops.apollo_update import ApolloOptions
from galore_kernels.ops.random_basis import RandomBasis


class TritonStages:
    """``Stages`` in Triton. Importing this module imports no Triton; calling a stage does."""

    def __init__(self) -> None:
        # The last single tensor, and its table. Another thread's in between costs a launch, no more.
        self._latest: tuple[Batch, Tensor] | None = None

    def _table(self, batch: Batch) -> Tensor:
        if batch.table is not None:
            return batch.table
        latest = self._latest
        if latest is None or latest[0] is not batch:
            from galore_kernels.backends.triton.write_column import write_row

            table = torch.empty((1, TABLE_COLUMNS), dtype=torch.int64, device=batch.device)
            write_row(table, (*batch.addresses[0], batch.gradients[0]))
            latest = self._latest = (batch, table)
        return latest[1]

    def write_column(self, table: Tensor, column: int, values: Sequence[int]) -> None:
        from galore_kernels.backends.triton.write_column import write_column

        write_column(table, column, values)

    def prepare(self, batch: Batch, control: Tensor, options: AdamOptions, scale: float) -> None:
        from galore_kernels.backends.triton.prepare import prepare

        prepare(batch, self._table(batch), control, options, scale)

    def project_splits(self, batch: Batch) -> int:
        from galore_kernels.backends.triton.project import project_splits

        return project_splits(batch)

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
        from galore_kernels.backends.triton.project import project

        table = self._table(batch)
        project(batch, table, control, lowrank, partial, final=final, squares=squares, partial_squares=partial_squares)

    def scale_and_check(self, source: Tensor, control: Tensor, lowrank: Tensor) -> None:
        from galore_kernels.backends.triton.scale_and_check import scale_and_check

        scale_and_check(source, control, lowrank)

    def lowrank_adam(self, batch: Batch, control: Tensor, lowrank: Tensor, direction: Tensor) -> None:
        from galore_kernels.backends.triton.lowrank_adam import lowrank_adam

        lowrank_adam(batch, self._table(batch), control, lowrank, direction)

    def back_project_update(self, batch: Batch, control: Tensor, direction: Tensor) -> None:
        from galore_kernels.backends.triton.back_project_update import back_project_update

        back_project_update(batch, self._table(batch), control, direction)

    def adam_update(self, batch: Batch, control: Tensor) -> None:
        from galore_kernels.backends.triton.adam_update import adam_update

        adam_update(batch, self._table(batch), control)

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
        from galore_kernels.backends.triton.gradient_factors import gradient_factors

        table = self._table(batch)
        gradient_factors(batch, table, control, lowrank, direction, squares, norms, factors, apollo)

    def scaled_gradient_update(self, batch: Batch, control: Tensor, factors: Tensor) -> None:
        from galore_kernels.backends.triton.scaled_gradient_update import scaled_gradient_update

        scaled_gradient_update(batch, self._table(batch), control, factors)

    def random_basis(self, drawn: Tensor, basis: RandomBasis, magnitudes: Tensor) -> None:
        from galore_kernels.backends.triton.random_basis import random_basis

        random_basis(drawn, basis, magnitudes)

    def in_one_pass(self, batch: Batch) -> bool:
        return False

    def galore_update(self, batch: Batch, control: Tensor) -> None:
        raise NotImplementedError("in_one_pass says no")

    def rotate_moments(
        self, source: AdamState, target: AdamState, rotation: Tensor, beta1: float, beta2: float
    ) -> None:
        from galore_kernels.backends.triton.rotate_moments import rotate_moments

        rotate_moments(source, target, rotation, beta1, beta2)

    def quantize_blockwise(self, x: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
        from galore_kernels.backends.triton.quantize_blockwise import quantize_blockwise

        return quantize_blockwise(x, signed)

    def dequantize_blockwise(self, codes: Tensor, absmax: Tensor, signed: bool) -> Tensor:
        from galore_kernels.backends.triton.quantize_blockwise import dequantize_blockwise

        return dequantize_blockwise(codes, absmax, signed)
