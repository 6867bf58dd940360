"""The updates of every optimizer: one native call for all tensors of a group."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partialmethod
from typing import Any

import torch
from torch import Tensor

from galore_kernels import _native
from galore_kernels.backends.batch import DTYPE_CODES, SIDE_CODES, make_batch
from galore_kernels.backends.cpu.adafactor import adafactor_scalars, gradient_shape
from galore_kernels.backends.cpu.arguments import address, found_inf, inverse_grad_scale, typed
from galore_kernels.backends.single import SingleUpdates
from galore_kernels.ops.adafactor_update import AdafactorOptions
from galore_kernels.ops.adam import AdamOptions
from galore_kernels.ops.group import UpdateGroup
from galore_kernels.ops.random_basis import RandomBasis, magnitudes


@cache
def bf16_magnitudes(family: str) -> Tensor:
    """A family's table of magnitudes, as the native module reads it."""
    return magnitudes(family).to(torch.bfloat16)


class Group:
    """The update of a group: see ``galore_kernels.ops.group``."""

    def __init__(self, group: UpdateGroup, long_basis: Tensor | None = None) -> None:
        self._group, self._long_basis = group, long_basis  # whose tensors stay where the batch says they are
        drawn = group.bases[0] if group.bases else None
        self._magnitudes = bf16_magnitudes(drawn.family) if isinstance(drawn, RandomBasis) else None
        batch = make_batch(group, self._magnitudes)
        self._batch = _native.CpuBatch(
            [(*row, 0) for row in batch.addresses],
            *batch.shape,
            batch.moments,
            batch.rank,
            SIDE_CODES[batch.side],
            DTYPE_CODES[batch.weight_dtype],
            DTYPE_CODES[batch.basis_dtype],
            address(self._magnitudes),
            batch.stochastic,
            *(typed(long_basis) if long_basis is not None else (0, 0)),
            long_basis.shape[1] if long_basis is not None else 0,
            gradient_shape(group, batch.moments, batch.rank),
        )

    def __call__(self, grads: Sequence[Tensor], options: AdamOptions | AdafactorOptions) -> None:
        if found_inf(options):
            return
        gradients = [grad.data_ptr() for grad in grads], DTYPE_CODES[grads[0].dtype]
        operation, apollo, threads = self._group.operation, self._group.apollo, torch.get_num_threads()
        scratch = torch.empty(self._batch.scratch_bytes(threads), dtype=torch.uint8)
        rest = scratch.data_ptr(), threads
        if isinstance(options, AdafactorOptions):
            own, is_projected = adafactor_scalars(options), operation == "lowrank_adafactor_update"
            _native.cpu_adafactor_update(self._batch, *gradients, own, self._group.scale, is_projected, *rest)
            return
        scalars = _native.CpuScalars(
            float(options.lr),
            options.beta1,
            options.beta2,
            options.eps,
            options.weight_decay,
            inverse_grad_scale(options),
            options.maximize,
        )
        if operation == "adam8bit_update":
            _native.cpu_adam_update(self._batch, *gradients, scalars, threads)
        elif apollo is not None:
            tensor, limit = apollo.scaling == "tensor", apollo.norm_growth_limit or 0.0
            how = tensor, apollo.scale, apollo.scale_front, limit
            _native.cpu_apollo_update(self._batch, *gradients, scalars, *how, *rest)
        else:
            run = _native.cpu_galore_update if operation == "galore_update" else _native.cpu_lowrank_update
            run(self._batch, *gradients, scalars, self._group.scale, *rest)


class Single(SingleUpdates):
    """The operations on one tensor."""

    def update(self, group: UpdateGroup, grad: Tensor, options: Any, long_basis: Tensor | None = None) -> None:
        Group(group, long_basis)((grad,), options)

    adafactor_update = partialmethod(SingleUpdates._at_full_rank, "adafactor_update")
    galore_adafactor_update = partialmethod(SingleUpdates._through_subspace, "galore_adafactor_update")
    lowrank_adafactor_update = partialmethod(SingleUpdates._through_subspace, "lowrank_adafactor_update")
