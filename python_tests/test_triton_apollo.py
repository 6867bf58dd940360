"""APOLLO's stages in Triton: bases drawn in the kernel, sums of squares, factors, the limiter, groups.

On a machine with a GPU they run there, else in Triton's interpreter.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from triton_device import BACKEND, DEVICE, group_update, moved_options, moved_state
from update_cases import assert_same_bits, assert_same_state, clone, options, warm_state

from galore_kernels import ops
from galore_kernels.backends import pipeline
from galore_kernels.backends.triton import configuration
from galore_kernels.ops import AdamOptions, AdamState
from galore_kernels.ops.apollo_update import SCALINGS, ApolloOptions
from galore_kernels.ops.group import UpdateGroup
from galore_kernels.ops.random_basis import FAMILIES, RandomBasis, random_basis
from galore_kernels.quantizers import weight_scale_shape

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(BACKEND.refuses(DEVICE) is not None, reason=str(BACKEND.refuses(DEVICE)))

SIDES = ["left", "right"]
FP32, BF16, FP16, INT8 = torch.float32, torch.bfloat16, torch.float16, torch.int8

#: Of several tiles: parts of a product meet, as do rows, columns and the short ends of each.
SMALL: dict[str, Any] = {
    "project": {"rows": 32, "columns": 16, "depth": 32},
    "long_norms": {"blocks": 2},
    "scaled_gradient_update": {"blocks": 16},
}

Result = tuple[Tensor, Tensor | None, Tensor, AdamState]


@dataclass
class Problem:
    """The arguments of an update, none of which a backend changes: each works on copies."""

    param: Tensor
    weight_scale: Tensor | None
    grad: Tensor
    basis: Tensor | RandomBasis
    state: AdamState
    scaled_norm: Tensor
    options: AdamOptions
    apollo: ApolloOptions
    side: str

    def by_reference(self) -> Result:
        """Weight, scales, norm and state that the reference comes to."""
        param, norm, state = self.param.clone(), self.scaled_norm.clone(), clone(self.state)
        weight_scale = None if self.weight_scale is None else self.weight_scale.clone()
        ops.apollo_update(
            param,
            self.grad,
            self.basis,
            state,
            norm,
            self.options,
            self.apollo,
            side=self.side,
            weight_scale=weight_scale,
            backend="reference",
        )
        return param, weight_scale, norm, state

    def by_triton(self) -> Result:
        """The same of the Triton backend."""
        param, norm, state = self.param.to(DEVICE, copy=True), self.scaled_norm.to(DEVICE, copy=True), self.state
        weight_scale = None if self.weight_scale is None else self.weight_scale.to(DEVICE, copy=True)
        basis = self.basis.to(DEVICE) if isinstance(self.basis, Tensor) else self.basis
        moved = moved_state(state)
        BACKEND.kernels["apollo_update"](
            param,
            self.grad.to(DEVICE),
            basis,
            moved,
            norm,
            moved_options(self.options),
            self.apollo,
            self.side,
            weight_scale,
        )
        cpu = torch.device("cpu")
        return param.cpu(), None if weight_scale is None else weight_scale.cpu(), norm.cpu(), moved_state(moved, cpu)


def problem(
    rows: int,
    cols: int,
    rank: int,
    side: str,
    dtype: torch.dtype = FP32,
    *,
    family: str = "rademacher",
    seed: int = 0,
    rounding_seed: int | None = None,
    grad_dtype: torch.dtype | None = None,
    **apollo: Any,
) -> Problem:
    """An update whose R and sums of squares are the same whatever the order of their sums, unless it is Gaussian.

    Gradients are small integers, and a Rademacher basis is of +1 and -1; the root of the rank is not part of the sums.
    """
    rng = torch.Generator().manual_seed(seed)
    long = rows if side == "right" else cols
    param, weight_scale = torch.randn((rows, cols), generator=rng), None
    if dtype == INT8:
        param = torch.randint(-127, 128, (rows, cols), generator=rng)
        weight_scale = 0.02 * torch.rand(weight_scale_shape((rows, cols)), generator=rng) + 0.01
        rounding_seed = 2**40 + seed
    grad = torch.randint(-4, 5, (rows, cols), generator=rng)
    return Problem(
        param=param.to(dtype),
        weight_scale=weight_scale,
        grad=grad.to(grad_dtype or (BF16 if dtype == INT8 else dtype)),
        basis=RandomBasis(rank, 2**62 + 3 * seed, family),
        state=warm_state((long, rank), eight_bit=True, seed=seed),
        scaled_norm=torch.tensor(40.0),
        options=options(weight_decay=0.1, rounding_seed=rounding_seed),
        apollo=ApolloOptions(**apollo),
        side=side,
    )


def assert_same(got: Result, expected: Result) -> None:
    """Weight, scales, norm and state to the bit."""
    assert_same_state(got[3], expected[3])
    assert_same_bits(got[2], expected[2], "scaled_norm")
    if got[1] is not None and expected[1] is not None:
        assert_same_bits(got[1], expected[1], "weight_scale")
    assert_same_bits(got[0], expected[0], "param")


def assert_almost_same(got: Result, expected: Result, p: Problem) -> None:
    """The same but for s: of the whole matrix' the norms of long indices are rounded to float32 before they are summed.

    Then the change may err by 2 u more, and a weight be rounded another way, or its code drawn another.
    """
    assert_same_state(got[3], expected[3])
    assert abs(got[2] - expected[2]) <= 2.0**-22 * expected[2]
    assert (got[0] != expected[0]).float().mean() < (0.9 if p.param.dtype == FP32 else 0.02)
    if p.weight_scale is None:
        wide, old = expected[0].double(), p.param.double()
        ulp = torch.finfo(p.param.dtype).eps * wide.abs()
        assert ((got[0].double() - wide).abs() <= 2.0**-21 * (wide - old).abs() + ulp).all()


# --- bases


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("short", "rank"),
    [
        (1, 1),
        (70, 5),  # a part of a block in each row, and rows of two tiles
        (33, 16),  # whole blocks; a row more than a tile has
        (9, 33),  # whole blocks and a part of one
        (2, 257),  # a column more than a tile has
    ],
)
def test_bases_are_the_references(short: int, rank: int, family: str) -> None:
    for seed in (0, 2**31 + 1, 2**63 - 1):  # none of its words; one; all
        basis = RandomBasis(rank, seed, family)
        with configuration.override(random_basis={"blocks": 2}):
            drawn = BACKEND.kernels["random_basis"](short, basis, DEVICE).cpu()
        assert_same_bits(drawn, random_basis(short, basis, backend="reference"), f"seed {seed}")


def test_there_may_be_no_row() -> None:
    assert BACKEND.kernels["random_basis"](0, RandomBasis(3, 1), DEVICE).shape == (0, 3)


@pytest.mark.parametrize(("side", "rank", "dtype"), [("left", 16, FP32), ("right", 4, BF16), ("right", 1, FP16)])
def test_what_is_drawn_is_what_could_be_stored(side: str, rank: int, dtype: torch.dtype) -> None:
    # At these ranks the division by the root is exact, and the same numbers are multiplied.
    p = problem(40, 72, rank, side, dtype, family="gaussian")
    assert isinstance(p.basis, RandomBasis)
    drawn = random_basis(72 if side == "right" else 40, p.basis, backend="reference")
    stored = replace(p, basis=(drawn.float() / rank**0.5).to(BF16 if dtype == FP32 else dtype))
    assert_same(p.by_triton(), stored.by_triton())


# --- updates

#: (shape, rank, weight's dtype, tiles); the root is exact where the short dimension has parts.
CASES = [
    ((48, 64), 16, FP32, {**SMALL, "splits": 2}),  # whole tiles, aligned
    ((40, 72), 33, BF16, SMALL),  # aligned, with tails
    ((37, 51), 5, FP16, {}),  # neither
    ((37, 51), 4, BF16, {"project": {"depth": 16}, "splits": 5}),  # the short side may have fewer steps than parts
    ((5, 3), 1, FP32, {}),
    ((21, 257), 5, INT8, {}),  # a group of one element; eight elements that share random bits lie in two rows
    ((20, 320), 16, INT8, {"scaled_gradient_update": {"blocks": 16}, "splits": 2}),
]


@pytest.mark.parametrize(("side", "scaling"), [("left", "channel"), ("right", "channel"), ("right", "tensor")])
@pytest.mark.parametrize(("shape", "rank", "dtype", "tiles"), CASES)
def test_updates_are_the_references(
    shape: tuple[int, int], rank: int, dtype: torch.dtype, tiles: dict[str, Any], side: str, scaling: str
) -> None:
    p = problem(*shape, rank, side, dtype, scaling=scaling, scale=2.0)
    with configuration.override(**tiles):
        got = p.by_triton()
    expected = p.by_reference()
    assert expected[3].step == 4
    assert (expected[0] != p.param).float().mean() > 0.05
    if scaling == "channel":
        assert_same(got, expected)
    else:
        assert_almost_same(got, expected, p)


@pytest.mark.parametrize(("side", "rank", "scaling"), [("left", 33, "channel"), ("right", 5, "tensor")])
def test_gaussian_bases(side: str, rank: int, scaling: str) -> None:
    # R errs by S u times its terms; where it cancels, s_j changes by as much in proportion.
    p = problem(48, 64, rank, side, family="gaussian", scaling=scaling)
    got, expected = p.by_triton(), p.by_reference()
    change = (expected[0] - p.param).abs()
    assert change.max() > 1e-3
    assert (got[0] - expected[0]).abs().max() <= 64 * 2.0**-22 * change.max()
    assert abs(got[2] / expected[2] - 1) <= 64 * 2.0**-22


@pytest.mark.parametrize(("side", "dtype", "grad_dtype"), [("left", FP32, BF16), ("right", BF16, FP32)])
def test_a_gradient_of_another_dtype_than_the_weight(side: str, dtype: torch.dtype, grad_dtype: torch.dtype) -> None:
    p = problem(40, 72, 8, side, dtype, grad_dtype=grad_dtype)
    assert_same(p.by_triton(), p.by_reference())


@pytest.mark.parametrize(("side", "cols"), [("left", 72), ("right", 61)])  # whole blocks of random bits, and parts
def test_stochastic_rounding(side: str, cols: int) -> None:
    p = problem(40, cols, 16, side, BF16, rounding_seed=2**40 + 3)
    with configuration.override(scaled_gradient_update={"blocks": 16}):
        got = p.by_triton()
    assert_same(got, p.by_reference())
    nearest = replace(p, options=replace(p.options, rounding_seed=None)).by_reference()
    assert (got[0] != nearest[0]).float().mean() > 0.1


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize(("rows", "rank"), [(300, 3), (20, 257)])  # one past what a step sums over, and past a tile
def test_many_long_indices_and_columns(rows: int, rank: int, scaling: str) -> None:
    p = problem(rows, 24, rank, "right", scaling=scaling)
    with configuration.override(gradient_factors={"blocks": 1}):
        assert_almost_same(p.by_triton(), p.by_reference(), p)


def test_64bit_offsets_within_a_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton import language as tl

    from galore_kernels.backends.triton import project, scaled_gradient_update

    p = problem(40, 72, 16, "right")
    expected = p.by_triton()
    for module in (project, scaled_gradient_update):
        monkeypatch.setattr(module, "offset_dtype", lambda tile, pitch: tl.int64)
    assert_same(p.by_triton(), expected)


@pytest.mark.parametrize(("shape", "side"), [((0, 24), "left"), ((0, 24), "right"), ((0, 0), "left")])
def test_empty_weights_still_take_their_step(shape: tuple[int, int], side: str) -> None:
    p = problem(*shape, 3, side)
    assert_same(p.by_triton(), p.by_reference())


# --- norms and their growth


@pytest.mark.parametrize(
    ("apollo", "scalars"),
    [
        ({"scale": 128.0, "scaling": "tensor"}, {}),  # APOLLO-Mini's
        ({"scale": 4.0}, {}),  # the root is applied after the limiter
        ({"scale": 4.0, "scale_front": True}, {}),  # and here before
        ({"norm_growth_limit": None}, {}),
        ({"norm_growth_limit": 1.2}, {}),
        ({}, {"grad_scale": 1024.0}),  # no part of the norm, nor of the sums of squares
        ({"scale": 4.0}, {"grad_scale": 3.0, "maximize": True}),
        ({}, {"beta1": 0.0, "beta2": 0.0, "eps": 0.0}),  # the direction is R's signs
    ],
)
def test_norms_of_several_steps(apollo: dict[str, Any], scalars: dict[str, Any]) -> None:
    # From no norm: the first step is not limited. The second is, where momentum grows. The third has no gradient.
    p = problem(24, 40, 4, "right", **apollo)
    p.options, p.scaled_norm = options(weight_decay=0.1, **scalars), torch.tensor(0.0)
    p.state = AdamState.zeros(tuple(p.state.exp_avg.shape), eight_bit=False)
    unscaled, limited = p.grad, []
    for factor in (1.0, 1.0, 0.0):
        p.grad = unscaled * factor
        got, expected = p.by_triton(), p.by_reference()
        assert_almost_same(got, expected, p)
        free = replace(p, apollo=replace(p.apollo, norm_growth_limit=None)).by_reference()
        limited.append(bool(expected[2] < 0.95 * free[2]))
        p.param, _, p.scaled_norm, p.state = expected
    assert limited == [False, p.apollo.norm_growth_limit is not None and p.options.beta1 > 0.0, False]


@pytest.mark.parametrize("scaling", SCALINGS)
def test_without_a_gradient_no_norm_is_known(scaling: str) -> None:
    p = problem(24, 40, 4, "left", scaling=scaling)
    p.grad.zero_()
    p.state = AdamState.zeros(tuple(p.state.exp_avg.shape), eight_bit=True)
    param, _, norm, state = p.by_triton()
    assert norm == 0
    assert state.step == 1
    assert_same_bits(param, p.param * torch.tensor(1.0 - float(p.options.lr) * 0.1), "param")


# --- what is skipped


def assert_skipped(p: Problem, *, counted: bool = True) -> None:
    """Nothing changes but, if ``counted``, ``skipped``."""
    got = p.by_triton()
    state = clone(p.state)
    state.skipped.add_(1 if counted else 0)
    assert_same(got, (p.param, p.weight_scale, p.scaled_norm, state))


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("side", SIDES)
def test_gradients_that_are_skipped(side: str, splits: int) -> None:
    with configuration.override(splits=splits, project={"depth": 32}):
        p = problem(40, 40, 20, side)
        p.grad[39, 5] = -torch.inf
        assert_skipped(p)
        p = problem(40, 40, 1, side)
        p.grad[3, 3] = 1.8447e19  # R is just too large for a second moment; the sum of squares is finite
        assert_skipped(p)
        # R is not, but the sum of squares: both are in a long index, and multiplied by 0.
        p = problem(40, 40, 20, side)
        p.basis = torch.eye(40)[:, :20].contiguous()
        p.grad[39, 39] = 1.9e19
        assert_skipped(p)


def test_sums_of_squares_are_finite_part_by_part() -> None:
    # Each part's is, and their sum is not.
    p = problem(24, 64, 20, "right")
    p.basis = torch.eye(64)[:, :20].contiguous()
    p.grad[3, 30] = p.grad[3, 40] = 1.5e19
    with configuration.override(splits=2, project={"depth": 32}):
        assert_skipped(p)


@pytest.mark.parametrize("splits", [1, 2])
def test_sums_of_squares_may_be_as_large_as_a_float(splits: int) -> None:
    p = problem(24, 40, 4, "right")
    p.grad *= 2.0**50  # squares beyond the largest representable gradient
    with configuration.override(splits=splits, project={"depth": 16}):
        _, _, norm, state = p.by_triton()
    assert (int(state.step), int(state.skipped)) == (4, 0)
    assert norm.isfinite()


def test_what_the_caller_found_is_not_counted() -> None:
    p = problem(24, 40, 4, "right", BF16)
    p.options = replace(p.options, found_inf=torch.ones(()))
    assert_skipped(p, counted=False)


# --- groups


@pytest.mark.parametrize(
    ("workspace", "side", "dtype", "scaling"),  # all at once; one at a time
    [(None, "left", BF16, "tensor"), (None, "right", INT8, "channel"), (1, "left", BF16, "channel")],
)
def test_a_group_is_its_members(
    monkeypatch: pytest.MonkeyPatch, workspace: int | None, side: str, dtype: torch.dtype, scaling: str
) -> None:
    if workspace is not None:
        monkeypatch.setattr(pipeline, "WORKSPACE_BYTES", workspace)
    problems = [
        problem(24, 40, 5, side, dtype, seed=seed, rounding_seed=2**40 + seed, scaling=scaling) for seed in range(3)
    ]
    problems[1].grad[5, 5] = torch.nan
    for p, norm in zip(problems, (0.0, 3.0, 1e3), strict=True):  # none of the two that are not skipped is limited
        p.scaled_norm.fill_(norm)
    expected = [p.by_triton() for p in problems]
    norms = tuple(p.scaled_norm.clone() for p in problems)
    scales = tuple(p.weight_scale.clone() for p in problems if p.weight_scale is not None)
    group = UpdateGroup(
        "apollo_update",
        tuple(p.param for p in problems),
        tuple(p.state for p in problems),
        tuple(p.basis for p in problems),
        side,
        rounding_seeds=tuple(p.options.rounding_seed or 0 for p in problems),
        weight_scales=scales,
        scaled_norms=norms,
        apollo=problems[0].apollo,
    )
    got = group_update(group, [p.grad for p in problems], problems[0].options)
    for i, (param, state) in enumerate(got):
        assert_same((param, scales[i] if scales else None, norms[i], state), expected[i])
        assert state.skipped == (i == 1)
    assert len({float(norm) for norm in norms}) == 3
