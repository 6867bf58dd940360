"""What CUDA and Triton implement, and ``galore_kernels.backends.pipeline`` arranges into operations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from galore_kernels.backends.batch import Batch
from galore_kernels.ops.adam import AdamOptions, AdamState
from galore_kernels.ops.apollo_update import ApolloOptions
from galore_kernels.ops.random_basis import RandomBasis


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
        """lowrank = projected gradient; if ``final``, scaled and signed, and the skip flag set where it must be.

        ``partial``: float32 (splits, N, elements) for the sums of the parts; None if there is one part. With
        ``squares``, float32 (N, L), also the sum of the squares of each long index of the gradient, which is not scaled
        there, and the skip flag if one is not finite; ``partial_squares`` (splits, N, L) then goes with ``partial``.
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
        """factors (N, L) float32 = what multiplies the long indices of g: s, the step size and sqrt(scale) / l.

        Writes ``scaled_norm`` too. ``direction`` is float32, ``squares`` what ``project`` has written, ``norms`` (N, L)
        float32 scratch memory. ``prepare`` was given sqrt(scale) as the scale.
        """

    def scaled_gradient_update(self, batch: Batch, control: Tensor, factors: Tensor) -> None:
        """The weights, from the gradients and the factors (N, L); int8 ones' scales too."""

    def random_basis(self, drawn: Tensor, basis: RandomBasis, magnitudes: Tensor) -> None:
        """drawn (S, rank) bfloat16 = the entries. ``magnitudes``: as in ``Batch``."""

    def in_one_pass(self, batch: Batch) -> bool:
        """Whether ``galore_update`` takes this batch, and is the faster way. It takes no int8 weights."""

    def galore_update(self, batch: Batch, control: Tensor) -> None:
        """project, lowrank_adam and back_project_update in one launch."""

    def rotate_moments(
        self, source: AdamState, target: AdamState, rotation: Tensor, beta1: float, beta2: float
    ) -> None:
        """The moments of ``target`` from those of ``source``: see ``galore_kernels.ops.rotate_moments``."""
