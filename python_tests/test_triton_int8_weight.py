"""The Triton kernels with int8 weights: codes and scales to the bit, groups, random bits. See test_triton_kernels.

On a machine with a GPU they run there, else in Triton's interpreter.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor
from triton_device import BACKEND, DEVICE, galore_update, group_update
from update_cases import assert_same_bits, assert_same_state, clone, options, warm_state

from galore_kernels import ops
from galore_kernels.backends import pipeline
from galore_kernels.backends.reference import adam
from galore_kernels.backends.reference.galore_update import back_project, project
from galore_kernels.backends.triton import configuration
from galore_kernels.backends.triton.launch import launch
from galore_kernels.ops import AdamOptions, AdamState
from galore_kernels.ops.group import UpdateGroup
from galore_kernels.quantizers import dequantize_weight, quantize_basis, requantize_weight, weight_scale_shape

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(BACKEND.refuses(DEVICE) is not None, reason=str(BACKEND.refuses(DEVICE)))

SIDES = ["left", "right"]
FLOATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
BASES = [*FLOATS, "int8", "int4"]

#: Of many tiles: parts of a product meet, as do rows, groups and the short ends of each.
SMALL = {
    "project": {"rows": 16, "columns": 32, "depth": 32},
    "back_project_update_int8": {"rows": 16, "depth": 16},
    "lowrank_adam": {"blocks": 2},
}


@dataclass
class Problem:
    """The arguments of an update; ``weight_scale`` and the state of each backend are its own copies."""

    codes: Tensor
    weight_scale: Tensor
    grad: Tensor
    basis: Tensor
    basis_scale: Tensor | None
    state: AdamState
    options: AdamOptions
    side: str

    def by_reference(self, operation: str = "galore_update") -> tuple[Tensor, Tensor, AdamState]:
        """Codes, scales and state that the reference comes to."""
        codes, weight_scale, state = self.codes.clone(), self.weight_scale.clone(), clone(self.state)
        getattr(ops, operation)(
            codes,
            self.grad,
            self.basis,
            state,
            self.options,
            side=self.side,
            scale=0.25,
            basis_scale=self.basis_scale,
            weight_scale=weight_scale,
            backend="reference",
        )
        return codes, weight_scale, state

    def by_triton(self, operation: str = "galore_update") -> tuple[Tensor, Tensor, AdamState]:
        """The same of the Triton backend."""
        weight_scale = self.weight_scale.clone()
        codes, state = galore_update(
            self.codes,
            self.grad,
            self.basis,
            self.state,
            self.options,
            self.side,
            0.25,
            self.basis_scale,
            operation,
            weight_scale,
        )
        return codes, weight_scale, state


def problem(
    rows: int, cols: int, rank: int, side: str, basis_format: str, *, dense: bool = False, seed: int = 0
) -> Problem:
    """An update in which no sum is rounded, so that the weight is the same to the bit before it becomes codes.

    Gradients are small integers, the basis' elements and scales such integers over a power of two, and each row of the
    basis has one element that isn't zero, in one column after another. With ``dense`` it has no zeros, and only R is
    the same whatever the order of its sums. Some groups will outgrow their scales, every third row uses about half of
    its codes, and the first is of zeros, without scales.
    """
    rng = torch.Generator().manual_seed(seed)
    long, short = (rows, cols) if side == "right" else (cols, rows)
    matrix = torch.randint(1, 8, (short, rank), generator=rng) * (
        torch.randint(0, 2, (short, rank), generator=rng) - 0.5
    )
    if not dense:
        matrix *= torch.arange(short)[:, None] % rank == torch.arange(rank)
    basis, basis_scale = matrix, None
    if basis_format in FLOATS:
        basis = matrix.to(FLOATS[basis_format])
    else:
        basis, _ = quantize_basis(matrix, basis_format)
        basis_scale = torch.randint(1, 16, (rank,), generator=rng) / 64
    codes = torch.randint(-127, 128, (rows, cols), generator=rng).to(torch.int8)
    codes[1::3] //= 2
    weight_scale = 0.02 * torch.rand(weight_scale_shape((rows, cols)), generator=rng) + 0.01
    codes[0], weight_scale[0] = 0, 0
    return Problem(
        codes=codes,
        weight_scale=weight_scale,
        grad=torch.randint(-4, 5, (rows, cols), generator=rng).bfloat16(),
        basis=basis,
        basis_scale=basis_scale,
        state=warm_state((long, rank), eight_bit=True, seed=seed),
        options=options(lr=0.05, weight_decay=0.1, rounding_seed=2**40 + seed),
        side=side,
    )


def assert_same(got: tuple[Tensor, Tensor, AdamState], expected: tuple[Tensor, Tensor, AdamState]) -> None:
    """Codes, scales and state to the bit."""
    assert_same_state(got[2], expected[2])
    assert_same_bits(got[1], expected[1], "scales")
    assert_same_bits(got[0], expected[0], "codes")


#: (shape, rank, parts of the short dimension, basis)
CASES = [
    # Rows end within a group, and begin with eight elements that share random bits.
    *(((37, 600), 19, 1, basis_format) for basis_format in BASES),
    # Everything is aligned, every group whole.
    *(((48, 512), 32, 2, basis_format) for basis_format in ("bf16", "int4")),
    # A group of one element; eight elements that share random bits lie in two rows.
    *(((21, 257), 5, 3, basis_format) for basis_format in ("fp32", "int8")),
    # Less than any tile.
    ((5, 3), 1, 1, "bf16"),
]


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize(("shape", "rank", "splits", "basis_format"), CASES)
def test_updates_are_the_references(
    shape: tuple[int, int], rank: int, splits: int, basis_format: str, side: str
) -> None:
    p = problem(*shape, rank, side, basis_format)
    expected = p.by_reference()
    kept = expected[1] == p.weight_scale
    assert kept.any() or shape == (5, 3)
    assert not kept.all()
    assert (expected[0] != p.codes).float().mean() > 0.1
    with configuration.override(**SMALL, splits=splits):
        assert_same(p.by_triton(), expected)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("basis_format", ["bf16", "int8"])
def test_the_usual_tile(basis_format: str, side: str) -> None:
    p = problem(130, 264, 12, side, basis_format)
    assert_same(p.by_triton(), p.by_reference())


@pytest.mark.parametrize("side", SIDES)
def test_lowrank_updates_are_the_references(side: str) -> None:
    p = problem(40, 300, 23, side, "int8")
    p.grad = torch.randn(p.state.exp_avg.shape, generator=torch.Generator().manual_seed(7))
    assert_same(p.by_triton("lowrank_update"), p.by_reference("lowrank_update"))


@pytest.mark.parametrize("side", SIDES)
def test_sums_in_another_order_change_few_codes(side: str) -> None:
    # Each of two sums of r products errs by at most r u times the sum of their magnitudes (Higham, section 3.1), and by
    # the roundings after it: product, difference and decay. A code is another where one of 65536 random numbers lies
    # between the two that it is compared with: as likely as these are apart, in codes. Their distance is that of the
    # weights over the scale and, where scales are new, once more that of the group's largest weights.
    rank, u = 40, 2.0**-24
    p = problem(96, 600, rank, side, "fp32", dense=True)
    expected, scales, state = p.by_reference()
    with configuration.override(back_project_update_int8={"depth": 16}):
        got, got_scales, got_state = p.by_triton()
    assert_same_state(got_state, state)
    m, v = adam.adam_moments(project(p.grad, p.basis, None, None, side), p.state, p.options)
    products = back_project(adam.adam_direction(m, v, p.options).abs(), p.basis.abs(), None, None, side, torch.int8)
    products *= 0.25 * adam.step_size(p.options, int(state.step))
    weight = dequantize_weight(expected, scales, torch.float32).abs() + scales.repeat_interleave(256, 1)[:, :600]
    apart = 2 * u * (rank * products + 3 * (weight + products))
    in_codes = apart / scales.repeat_interleave(256, 1)[:, :600]
    distance = (got.int() - expected.int()).abs()
    assert distance.max() <= 1
    assert (distance != 0).float().mean() <= 2 * in_codes.amax(dim=1).mean() < 5e-3
    assert ((got_scales - scales).abs() <= 2 * in_codes.max() / 112 * scales).all()
    assert not torch.equal(got_scales, scales)  # the sums were in another order


@pytest.mark.parametrize("shape", [(33, 512), (33, 600), (33, 257)])  # as above: whole groups, and both kinds of ends
def test_what_is_not_moved_keeps_codes_and_scales(shape: tuple[int, int]) -> None:
    p = problem(*shape, 8, "right", "bf16")
    p.codes[:, ::256] = 127
    p.codes[1::3, ::256] = -64  # just enough
    p.grad.zero_()
    p.state = AdamState.zeros(tuple(p.state.exp_avg.shape), eight_bit=True)
    p.options = replace(p.options, weight_decay=0.0)
    codes, weight_scale, state = p.by_triton()
    assert_same_bits(weight_scale, p.weight_scale, "scales")
    assert_same_bits(codes[1:], p.codes[1:], "codes")
    assert not codes[0].any()  # codes without a scale are zeros
    assert state.step == 1


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("workspace", [None, 1])  # all at once; one at a time
def test_a_group_is_its_members(monkeypatch: pytest.MonkeyPatch, workspace: int | None, side: str) -> None:
    if workspace is not None:
        monkeypatch.setattr(pipeline, "WORKSPACE_BYTES", workspace)
    problems = [problem(24, 300, 9, side, "int8", seed=seed) for seed in range(3)]
    problems[1].grad[5, 5] = torch.nan
    expected = [p.by_triton() for p in problems]
    assert_same_bits(expected[1][0], problems[1].codes, "codes that are skipped")
    assert_same_bits(expected[1][1], problems[1].weight_scale, "scales that are skipped")
    scales = tuple(p.weight_scale for p in problems)
    group = UpdateGroup(
        "galore_update",
        tuple(p.codes for p in problems),
        tuple(p.state for p in problems),
        tuple(p.basis for p in problems),
        side,
        0.25,
        rounding_seeds=tuple(p.options.rounding_seed or 0 for p in problems),
        basis_scales=tuple(p.basis_scale for p in problems if p.basis_scale is not None),
        weight_scales=scales,
    )
    got = group_update(group, [p.grad for p in problems], problems[0].options)
    for (codes, state), weight_scale, one in zip(got, scales, expected, strict=True):
        assert_same((codes, weight_scale, state), one)
    assert [int(state.skipped) for _, state in got] == [0, 1, 0]


def requantized(weight: Tensor, scale: Tensor, random16: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales of (16, 256) weights, one group in a row, by the kernels' rule."""
    from conversion_kernel import requantize_kernel

    codes, new = torch.empty((16, 256), dtype=torch.int8, device=DEVICE), scale.to(DEVICE, copy=True)
    launch(
        requantize_kernel,
        1,
        DEVICE,
        weight.to(DEVICE),
        new,
        random16.to(DEVICE, torch.int32),
        codes,
        ROWS=16,
        COLUMNS=256,
        warps=4,
    )
    return codes.cpu(), new.cpu()


def test_the_rule_of_scales_and_codes() -> None:
    rng = torch.Generator().manual_seed(0)
    ulp = 2.0**-17  # of 64 to 127
    largest_and_scale = [
        *((x * 0.25, 0.25) for x in (127, 127 - ulp, 127 + ulp, 64, 64 - ulp / 2, 64 + ulp)),  # around what is kept
        *((x * 0.3, 0.3) for x in (100, 63.9, 127.1, 1, 1e4, 0)),  # a quotient that is rounded; far off; nothing left
        (0.1, 0.0),  # its first elements
        (0.0, 0.0),
        (4e-44, 1e-45),  # its scale would be 0
        (3.4e38, 3e36),
    ]
    largest, scale = torch.tensor(largest_and_scale).unbind(1)
    weight = (2 * torch.rand((16, 256), generator=rng) - 1) * largest[:, None]
    weight[:, 0], weight[:, 1], weight[:, 2] = largest, -largest, -0.0
    weight[:, 3] = weight[:, 4] = 17 * torch.minimum(scale, largest / 64)  # a code where the scale is kept
    weight[:, 5] = weight[:, 6] = -(2.0**-30) * largest
    random16 = torch.randint(0, 65536, (16, 256), generator=rng)
    random16[:, 0:8:2], random16[:, 1:8:2] = 0, 65535  # the least and the largest
    expected, expected_scale = requantize_weight(weight, scale[:, None], random16)
    codes, new = requantized(weight, scale, random16)
    assert_same_bits(new[:, None], expected_scale, "scales")
    assert_same_bits(codes, expected, "codes")
    assert (new == scale).tolist() == [True, True, False, True, False, True, True, *[False] * 6, True, False, True]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_group_that_is_not_finite_has_no_sound_scale(bad: float) -> None:
    weight, scale = torch.ones((16, 256)), torch.full((16,), 0.01)
    weight[3, 200] = bad
    codes, new = requantized(weight, scale, torch.zeros((16, 256)))
    assert codes[3, 200] == 0
    assert (~new.isfinite()).nonzero().tolist() == [[3]]
    others = torch.arange(16) != 3
    assert_same_bits(new[others], scale[others], "scales")
    assert (codes[others] == 100).all()
