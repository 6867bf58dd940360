"""The Triton kernels with quantized bases: codes of both formats, their scales, parts, groups. See test_triton_kernels.

On a machine with a GPU they run there, else in Triton's interpreter.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from triton_device import BACKEND, DEVICE, galore_update, group_update
from update_cases import DTYPES, assert_same_bits, assert_same_state, bits, clone, options, warm_state

from galore_kernels import ops
from galore_kernels.backends import pipeline
from galore_kernels.backends.triton import configuration
from galore_kernels.backends.triton.launch import launch
from galore_kernels.ops import AdamOptions, AdamState
from galore_kernels.ops.group import UpdateGroup
from galore_kernels.quantizers import basis_codes, quantize_basis

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(BACKEND.refuses(DEVICE) is not None, reason=str(BACKEND.refuses(DEVICE)))

SIDES = ["left", "right"]
FORMATS = ["int8", "int4"]

#: Of many tiles: parts of a product meet, as do rows, columns and the short ends of each.
SMALL = {"rows": 16, "columns": 32, "depth": 16}


def problem(
    rows: int, cols: int, rank: int, side: str, basis_format: str, dtype: torch.dtype, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor, AdamState, AdamOptions]:
    """Weight, gradient, codes, scales, state and options, in which R is the same whatever the order of its sums.

    Gradients are small integers and scales are integers over 64: no part of a sum is rounded. No scale is like the
    next, and all are far from 1.
    """
    rng = torch.Generator().manual_seed(seed)
    long, short = (rows, cols) if side == "right" else (cols, rows)
    codes, _ = quantize_basis(torch.randn((short, rank), generator=rng), basis_format)
    return (
        torch.randn((rows, cols), generator=rng).to(dtype),
        torch.randint(-4, 5, (rows, cols), generator=rng).to(dtype),
        codes,
        torch.randint(1, 16, (rank,), generator=rng) / 64,
        warm_state((long, rank), eight_bit=True, seed=seed),
        options(weight_decay=0.1),
    )


def assert_updated(got: tuple[Tensor, AdamState], expected: Tensor, expected_state: AdamState, rank: int) -> None:
    """The state to the bit. The change is a sum of ``rank`` products in another order, then rounded to the dtype."""
    assert_same_state(got[1], expected_state)
    rounding = {torch.float32: 0.0, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}[expected.dtype]
    tolerance = (rounding + rank * 2.0**-24) * float(expected.float().abs().max())
    assert (got[0].float() - expected.float()).abs().max() <= tolerance


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("basis_format", FORMATS)
@pytest.mark.parametrize(
    ("shape", "rank", "splits"),
    [
        ((48, 64), 32, 2),  # rows of codes are aligned in both formats
        ((40, 72), 31, 1),  # packed ones are, with half a byte to spare; the direction's are not
        ((37, 51), 19, 5),  # nothing is; the short side may have fewer steps than parts
        ((24, 40), 1, 1),  # half a byte
    ],
)
def test_updates_are_the_references(
    shape: tuple[int, int], rank: int, splits: int, basis_format: str, side: str, dtype: torch.dtype
) -> None:
    param, grad, codes, scales, state, o = problem(*shape, rank, side, basis_format, dtype)
    expected, expected_state = param.clone(), clone(state)
    ops.galore_update(
        expected, grad, codes, expected_state, o, side=side, scale=0.25, basis_scale=scales, backend="reference"
    )
    tiles = {"project": SMALL, "back_project_update": SMALL, "lowrank_adam": {"blocks": 2}}
    with configuration.override(**tiles, splits=splits):
        got = galore_update(param, grad, codes, state, o, side, 0.25, scales)
    assert_updated(got, expected, expected_state, rank)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("basis_format", FORMATS)
def test_a_gradient_of_another_dtype_than_the_weight(basis_format: str, side: str) -> None:
    # The codes take the gradient's dtype in one product, the weight's in the other.
    param, grad, codes, scales, state, o = problem(40, 72, 24, side, basis_format, torch.float32)
    expected, expected_state = param.clone(), clone(state)
    ops.galore_update(
        expected, grad, codes, expected_state, o, side=side, scale=0.25, basis_scale=scales, backend="reference"
    )
    got = galore_update(param, grad.bfloat16(), codes, state, o, side, 0.25, scales)
    assert_updated(got, expected, expected_state, 24)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("basis_format", FORMATS)
def test_lowrank_updates_are_the_references(basis_format: str, side: str, dtype: torch.dtype) -> None:
    # The gradient has been projected; its scales are in it.
    param, _, codes, scales, state, o = problem(40, 72, 23, side, basis_format, dtype)
    lowrank = torch.randn(state.exp_avg.shape)
    expected, expected_state = param.clone(), clone(state)
    ops.lowrank_update(
        expected, lowrank, codes, expected_state, o, side=side, scale=0.25, basis_scale=scales, backend="reference"
    )
    got = galore_update(param, lowrank, codes, state, o, side, 0.25, scales, operation="lowrank_update")
    assert_updated(got, expected, expected_state, 23)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("basis_format", FORMATS)
def test_every_code_is_multiplied_as_it_is(basis_format: str, side: str) -> None:
    # A gradient that picks one row of the basis: R is that row of codes, times the scales.
    rank = 15
    param, grad, _, scales, state, o = problem(24, 40, rank, side, basis_format, torch.bfloat16)
    short = 40 if side == "right" else 24
    largest = 127 if basis_format == "int8" else 7
    wanted = torch.linspace(-largest, largest, rank).round().expand(short, rank).contiguous()
    codes, _ = quantize_basis(wanted, basis_format)
    state = AdamState.zeros(tuple(state.exp_avg.shape), eight_bit=False)
    grad.zero_()
    grad[0, 0] = 1.0
    _, got = galore_update(param, grad, codes, state, replace(o, beta1=0.0), side, 0.25, scales)
    assert_same_bits(got.exp_avg[0], basis_codes(codes, rank)[0] * scales, "R")


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("basis_format", FORMATS)
@pytest.mark.parametrize("workspace", [None, 1])  # all at once; one at a time
def test_a_group_is_its_members(
    monkeypatch: pytest.MonkeyPatch, workspace: int | None, basis_format: str, side: str
) -> None:
    if workspace is not None:
        monkeypatch.setattr(pipeline, "WORKSPACE_BYTES", workspace)
    problems = [problem(24, 40, 9, side, basis_format, torch.bfloat16, seed) for seed in range(3)]
    params, grads, codes, scales, states, o = zip(*problems, strict=True)
    grads[1][5, 5] = torch.nan
    group = UpdateGroup("galore_update", params, states, codes, side, 0.25, basis_scales=scales)
    for i, (got, got_state) in enumerate(group_update(group, list(grads), o[0])):
        expected, expected_state = galore_update(
            params[i], grads[i], codes[i], states[i], o[0], side, 0.25, basis_scale=scales[i]
        )
        assert_same_bits(got, expected, f"param {i}")
        assert_same_state(got_state, expected_state)
        assert got_state.skipped == (i == 1)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("basis_format", FORMATS)
def test_what_a_scale_makes_unrepresentable_is_skipped(basis_format: str, side: str) -> None:
    param, grad, codes, scales, state, o = problem(24, 40, 8, side, basis_format, torch.float32)
    scales[3] = 1e25
    got, got_state = galore_update(param, grad, codes, state, o, side, 0.25, scales)
    assert_same_bits(got, param, "param")
    assert_same_state(got_state, replace(clone(state), skipped=torch.ones_like(state.skipped)))


def test_three_upper_halves_are_the_number() -> None:
    # What stands beside codes in float32's products on a device: three bfloat16 and nothing left.
    from conversion_kernel import split_kernel

    x = torch.cat([torch.randn(2045) * 2.0 ** torch.randint(-60, 60, (2045,)), torch.tensor([0.0, -0.0, 1 - 2.0**-24])])
    parts: Any = torch.empty((3, 2048), device=DEVICE)
    launch(split_kernel, 1, DEVICE, x.to(DEVICE), parts, BLOCK=2048, warps=4)
    assert (bits(parts.cpu()) & 0xFFFF == 0).all()
    assert torch.equal(parts.cpu().double().sum(0), x.double())
