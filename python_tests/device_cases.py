"""Inputs of the tests that need a device: matrices made on the CPU and copied there, alone and in groups."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import oracle
import tolerances
import torch
from torch import Tensor
from update_cases import assert_same_bits, assert_same_state, f64, moments, options, oracle_scalars, tensors, warm_state

from galore_kernels.backends.batch import Batch, make_batch, with_gradients
from galore_kernels.ops import AdamOptions, AdamState, galore_update, registry
from galore_kernels.ops.group import UpdateGroup
from galore_kernels.quantizers import dequantize_basis, quantize_basis

BF16 = torch.bfloat16
SCALE = 0.25


class Case:
    """A matrix with its gradient, basis and warm state, on the CPU; ``on`` copies it elsewhere."""

    def __init__(
        self,
        long: int,
        short: int,
        rank: int,
        side: str,
        seed: int,
        dtype: torch.dtype = BF16,
        basis_format: str | None = None,
    ) -> None:
        rng = torch.Generator().manual_seed(seed)
        shape = (long, short) if side == "right" else (short, long)
        self.side, self.shape = side, shape
        self.param = torch.randn(shape, generator=rng).to(dtype)
        self.grad = torch.randn(shape, generator=rng).to(dtype)
        basis, scale = torch.randn(short, rank, generator=rng) / short**0.5, None
        if basis_format is None:
            basis = basis.to(dtype)
        else:
            basis, scale = quantize_basis(basis, basis_format)
        self.basis: Tensor = basis
        self.basis_scale: Tensor | None = scale
        self.state = warm_state((long, rank), eight_bit=True, seed=seed)

    def on(self, device: torch.device) -> Case:
        copy = object.__new__(Case)
        copy.side, copy.shape = self.side, self.shape
        copy.param, copy.grad, copy.basis = (x.to(device, copy=True) for x in (self.param, self.grad, self.basis))
        copy.basis_scale = None if self.basis_scale is None else self.basis_scale.to(device, copy=True)
        copy.state = on_the(device, self.state)
        return copy

    def update(self, o: AdamOptions, backend: str) -> None:
        galore_update(
            self.param,
            self.grad,
            self.basis,
            self.state,
            o,
            side=self.side,
            scale=SCALE,
            basis_scale=self.basis_scale,
            backend=backend,
        )

    def exact(self, o: AdamOptions) -> tuple[oracle.Array, oracle.Array]:
        """The new weight in float64, nothing rounded on the way, and how far from it a weight may lie.

        That is two ulps of the weight, and what rounding the direction to 16 bits (which the operation is to do) moves
        it by: a weight near zero may be smaller than the terms of the sum that changes it.
        """
        a = oracle_scalars(o, int(self.state.step) + 1)
        basis = f64(self.basis if self.basis_scale is None else dequantize_basis(self.basis, self.basis_scale))
        lowrank = oracle.project(f64(self.grad), basis, None, self.side) / a.grad_scale
        m, v = oracle.adam_moments(lowrank, *moments(self.state), replace(a, grad_scale=1.0))
        direction = oracle.adam_direction(m, v, a)
        change = oracle.back_project(direction, basis, None, self.side)
        terms = oracle.back_project(np.abs(direction), np.abs(basis), None, self.side)
        weight = oracle.descend(f64(self.param), SCALE * change, a)
        larger = np.maximum(np.abs(weight), np.abs(f64(self.param)))
        return weight, 2 * tolerances.ulp(larger, BF16) + 2.0**-9 * SCALE * a.lr * terms


def on_the(device: torch.device, state: AdamState) -> AdamState:
    return replace(state, **{key: tensor.to(device, copy=True) for key, tensor in tensors(state).items()})


def options_on(device: torch.device, **scalars: Any) -> AdamOptions:
    o = options(**scalars)
    scale = None if o.grad_scale is None else o.grad_scale.to(device)
    return replace(o, lr=o.lr.to(device), grad_scale=scale)


def assert_same(got: Case, expected: Case, what: str = "") -> None:
    assert_same_bits(got.param.cpu(), expected.param.cpu(), f"param {what}")
    cpu = torch.device("cpu")
    assert_same_state(on_the(cpu, got.state), on_the(cpu, expected.state))


def group_of(cases: Sequence[Case]) -> UpdateGroup:
    return UpdateGroup(
        "galore_update",
        tuple(case.param for case in cases),
        tuple(case.state for case in cases),
        tuple(case.basis for case in cases),
        cases[0].side,
        SCALE,
        basis_scales=tuple(case.basis_scale for case in cases if case.basis_scale is not None),
    )


def update_together(cases: Sequence[Case], o: AdamOptions, backend: str) -> Batch:
    """One grouped update; what the backend was given."""
    group = registry.select("galore_update", backend, cases[0].param.device).group
    assert group is not None
    group(group_of(cases))([case.grad for case in cases], o)
    return with_gradients(make_batch(group_of(cases)), [case.grad for case in cases])


def enough_for_one_pass(long: int, device: torch.device) -> int:
    """So many matrices that their panels of 128 long rows fill the device."""
    return math.ceil(2 * torch.cuda.get_device_properties(device).multi_processor_count / math.ceil(long / 128))
