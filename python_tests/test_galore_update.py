"""The GaLore step: against float64 and galore_torch, between backends, and at the edges."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import oracle
import pytest
import tolerances
import torch
from torch import Tensor
from update_cases import (
    DTYPES,
    HYPERPARAMETERS,
    assert_close,
    assert_codes_almost_equal,
    assert_same_bits,
    assert_same_state,
    clone,
    f64,
    moments,
    options,
    oracle_scalars,
    warm_state,
)

from galore_kernels.ops import AdamOptions, AdamState, galore_update, lowrank_update
from galore_kernels.quantizers import dynamic_map

SIDES = ["left", "right"]

SHAPES = [
    (1, 1, 1),  # the smallest
    (1, 7, 1),  # one row: on the right side one long index, on the left one short index
    (7, 1, 1),  # one column
    (37, 53, 5),  # multiples of no vector width, tile or block
    (51, 64, 5),  # moments of 255 elements on the right side: around one quantization block
    (64, 64, 4),  # 256 on both
    (257, 40, 1),  # 257 on the right
    (24, 40, 24),  # full rank on the left side, of a wide matrix
    (40, 600, 17),  # a short dimension longer than the native backend sums at a time, a rank one past 16
    (70, 130, 33),  # a rank one past two vectors
    (16, 16, 20),  # a rank above both dimensions: the operation asks for no orthonormal basis
]

DTYPE_TRIPLES = [  # of weight, gradient and basis
    (torch.float32, torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16, torch.bfloat16),  # matrix units' own products
    (torch.float16, torch.float16, torch.float16),
    (torch.float32, torch.bfloat16, torch.bfloat16),  # a master weight
    (torch.bfloat16, torch.float32, torch.float32),  # gradients accumulated in float32
]


@dataclass
class Problem:
    """Everything that one call takes."""

    param: Tensor
    grad: Tensor
    basis: Tensor
    long_basis: Tensor | None
    state: AdamState
    options: AdamOptions
    side: str
    scale: float = 0.25
    basis_scale: Tensor | None = None

    def solved(self, backend: str) -> tuple[Tensor, AdamState]:
        """The operation on copies."""
        param, state = self.param.clone(memory_format=torch.contiguous_format), clone(self.state)
        galore_update(
            param,
            self.grad,
            self.basis,
            state,
            self.options,
            side=self.side,
            scale=self.scale,
            long_basis=self.long_basis,
            basis_scale=self.basis_scale,
            backend=backend,
        )
        return param, state

    def exact(
        self, *, rounded_direction: bool = True, factor_dtype: torch.dtype | None = None
    ) -> tolerances.GaloreStep:
        """The oracle's answer and the bounds of float32's errors.

        ``factor_dtype``: what the direction is rounded to, unless it is the basis' dtype, or the weight's for codes.
        """
        quantized = self.basis_scale is not None
        return tolerances.galore_step(
            f64(self.param),
            f64(self.grad),
            oracle.basis_codes(self.basis.numpy(), self.rank) if quantized else f64(self.basis),
            None if self.long_basis is None else f64(self.long_basis),
            *moments(self.state),
            oracle_scalars(self.options, int(self.state.step) + 1),
            side=self.side,
            scale=self.scale,
            weight_dtype=self.param.dtype,
            factor_dtype=factor_dtype or (self.param.dtype if quantized else self.basis.dtype),
            rounds_direction=rounded_direction,
            basis_scale=None if self.basis_scale is None else f64(self.basis_scale),
        )

    @property
    def rank(self) -> int:
        """Of the basis, in which two 4-bit codes share a byte."""
        return self.basis.shape[1] if self.basis_scale is None else len(self.basis_scale)


def make_problem(
    rows: int,
    cols: int,
    rank: int,
    side: str,
    *,
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype] = DTYPE_TRIPLES[0],
    long_rank: int | None = None,
    eight_bit: bool = False,
    exact_sums: bool = False,
    **scalars: Any,
) -> Problem:
    """A random problem in a warm state. With ``exact_sums`` R is the same whatever the order of its sums."""
    long, short = (rows, cols) if side == "right" else (cols, rows)
    weight_dtype, grad_dtype, basis_dtype = dtypes
    if exact_sums:  # small integers, and eighths
        grad = torch.randint(-4, 5, (rows, cols)).to(grad_dtype)
        basis = (torch.randint(-4, 5, (short, rank)) / 8).to(basis_dtype)
    else:
        grad = torch.randn(rows, cols).to(grad_dtype)
        basis = (torch.randn(short, rank) / short**0.5).to(basis_dtype)
    long_basis = None if long_rank is None else (torch.randn(long, long_rank) / long**0.5).to(basis_dtype)
    return Problem(
        param=torch.randn(rows, cols).to(weight_dtype),
        grad=grad,
        basis=basis,
        long_basis=long_basis,
        state=warm_state((long_rank or long, rank), eight_bit=eight_bit),
        options=options(**scalars),
        side=side,
    )


def check_against_float64(p: Problem, backend: str, what: str) -> None:
    exact = p.exact()
    param, state = p.solved(backend)
    assert_close(param, exact.weight, exact.weight_bound, f"param, {what}")
    assert state.step.item() == p.state.step.item() + 1
    assert state.skipped.item() == 0
    for name, value, bound in (("exp_avg", exact.m, exact.m_bound), ("exp_avg_sq", exact.v, exact.v_bound)):
        got, absmax = getattr(state, name), getattr(state, f"{name}_absmax")
        if absmax is None:
            assert_close(got, value, bound, f"{name}, {what}")
        else:
            codes, expected = oracle.quantize(value.astype(np.float32), dynamic_map(name == "exp_avg").numpy())
            assert_codes_almost_equal(got, codes, tolerances.EQUAL_CODES, f"{name}, {what}")
            assert_close(absmax, expected.astype(np.float64), bound.max(initial=0), f"{name}_absmax, {what}")


# --- against float64


@pytest.mark.parametrize("dtypes", DTYPE_TRIPLES)
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_follows_the_paper(
    backend: str, shape: tuple[int, int, int], side: str, dtypes: tuple[torch.dtype, torch.dtype, torch.dtype]
) -> None:
    for eight_bit in (False, True):
        p = make_problem(*shape, side, dtypes=dtypes, eight_bit=eight_bit, weight_decay=0.1)
        check_against_float64(p, backend, f"8-bit: {eight_bit}")


@pytest.mark.parametrize("case", HYPERPARAMETERS)
@pytest.mark.parametrize("side", SIDES)
def test_every_hyperparameter_follows_the_paper(backend: str, side: str, case: str) -> None:
    for eight_bit in (False, True):
        p = make_problem(37, 53, 5, side, eight_bit=eight_bit, **HYPERPARAMETERS[case])
        check_against_float64(p, backend, f"8-bit: {eight_bit}")


@pytest.mark.parametrize("scale", [1.0, -2.0, 0.0])  # without effect; descends the other way; moves by decay alone
def test_scale(backend: str, scale: float) -> None:
    p = replace(make_problem(37, 53, 5, "left", weight_decay=0.1), scale=scale)
    check_against_float64(p, backend, f"scale {scale}")


@pytest.mark.parametrize("dtypes", DTYPE_TRIPLES)
@pytest.mark.parametrize("side", SIDES)
def test_both_sides_projected(backend: str, side: str, dtypes: tuple[torch.dtype, torch.dtype, torch.dtype]) -> None:
    # Equal ranks are galore_torch's "full"; unequal ones show which is which; 1 x 1 is the smallest.
    for ranks, eight_bit in itertools.product([(5, 5), (3, 7), (1, 1)], [False, True]):
        p = make_problem(
            37, 53, ranks[0], side, dtypes=dtypes, long_rank=ranks[1], eight_bit=eight_bit, weight_decay=0.1
        )
        check_against_float64(p, backend, f"ranks {ranks}, 8-bit: {eight_bit}")


@pytest.mark.parametrize("dtypes", list(itertools.product(DTYPES, repeat=3)))
def test_every_combination_of_dtypes(backend: str, dtypes: tuple[torch.dtype, torch.dtype, torch.dtype]) -> None:
    for side in SIDES:
        check_against_float64(make_problem(19, 35, 6, side, dtypes=dtypes), backend, side)


@pytest.mark.parametrize("eight_bit", [True, False])
@pytest.mark.parametrize("side", SIDES)
def test_the_first_step(backend: str, side: str, eight_bit: bool) -> None:
    p = make_problem(37, 53, 5, side, eight_bit=eight_bit)
    p.state = AdamState.zeros(tuple(p.state.exp_avg.shape), eight_bit=eight_bit)
    check_against_float64(p, backend, "first step")


@pytest.mark.parametrize("side", SIDES)
def test_bfloat16_weights_are_within_one_ulp_of_float64(backend: str, side: str) -> None:
    # galore_torch in bfloat16 is off by up to 117. Here even the direction's rounding, which float64 leaves out, is
    # below half an ulp of the weight: 2^-9 of a change of a thousandth.
    p = make_problem(60, 90, 8, side, dtypes=DTYPE_TRIPLES[1], weight_decay=0.1)
    exact = p.exact(rounded_direction=False).weight
    got, _ = p.solved(backend)
    larger = np.maximum(np.abs(exact), np.abs(f64(p.param)))  # where the update nearly cancels the weight
    assert_close(got, exact, tolerances.ulp(larger, torch.bfloat16), "param")
    rounded_once = torch.from_numpy(exact).bfloat16()
    assert (got != rounded_once).float().mean() < 0.01


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("long_rank", [None, 6])
def test_the_direction_is_rounded_to_a_16bit_basis(backend: str, dtype: torch.dtype, long_rank: int | None) -> None:
    # The bound of the other tests lets single elements of the direction be rounded the other way. Most are not, and
    # nearly all weights would be off by far more than float32's errors if none were.
    for side in SIDES:
        p = make_problem(60, 90, 4, side, dtypes=(torch.float32, dtype, dtype), long_rank=long_rank, lr=4.0)
        p.param.zero_()
        got = f64(p.solved(backend)[0])
        exact, unrounded = p.exact(), p.exact(rounded_direction=False)
        close = 10 * tolerances.U32 * (np.abs(exact.weight) + 1)
        assert (np.abs(got - exact.weight) < close).mean() > 0.95
        assert (np.abs(got - unrounded.weight) < close).mean() < 0.3


# --- backends against the reference


@pytest.mark.parametrize("dtypes", DTYPE_TRIPLES)
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("shape", SHAPES)
def test_backends_agree_with_the_reference(
    fast_backend: str, shape: tuple[int, int, int], side: str, dtypes: tuple[torch.dtype, torch.dtype, torch.dtype]
) -> None:
    p = make_problem(*shape, side, dtypes=dtypes, eight_bit=True, weight_decay=0.1)
    got, got_state = p.solved(fast_backend)
    expected, expected_state = p.solved("reference")
    exact = p.exact()
    assert_close(got, f64(expected), 2 * exact.weight_bound, "param")
    for name in ("exp_avg", "exp_avg_sq"):
        codes = getattr(expected_state, name)
        assert_codes_almost_equal(getattr(got_state, name), codes, tolerances.EQUAL_CODES, name)
    assert got_state.step == expected_state.step


@pytest.mark.parametrize("case", HYPERPARAMETERS)
@pytest.mark.parametrize("side", SIDES)
def test_states_agree_to_the_bit_where_sums_are_exact(fast_backend: str, side: str, case: str) -> None:
    for dtypes in DTYPE_TRIPLES:
        for eight_bit in (True, False):
            p = make_problem(
                70, 130, 33, side, dtypes=dtypes, eight_bit=eight_bit, exact_sums=True, **HYPERPARAMETERS[case]
            )
            assert_same_state(p.solved(fast_backend)[1], p.solved("reference")[1])


@pytest.mark.parametrize("side", SIDES)
def test_threads_change_nothing(fast_backend: str, side: str) -> None:
    p = make_problem(300, 500, 33, side, dtypes=DTYPE_TRIPLES[1], eight_bit=True, rounding_seed=3)
    expected, expected_state = p.solved(fast_backend)
    for threads in (2, 7):  # two; more than there are cores
        torch.set_num_threads(threads)
        got, got_state = p.solved(fast_backend)
        assert_same_bits(got, expected, "param")
        assert_same_state(got_state, expected_state)


# --- lowrank_update


@pytest.mark.parametrize("case", HYPERPARAMETERS)
@pytest.mark.parametrize("side", SIDES)
def test_lowrank_update_is_galore_update_after_its_projection(backend: str, side: str, case: str) -> None:
    for dtypes in DTYPE_TRIPLES:
        p = make_problem(37, 53, 5, side, dtypes=dtypes, eight_bit=True, exact_sums=True, **HYPERPARAMETERS[case])
        lowrank = torch.from_numpy(oracle.project(f64(p.grad), f64(p.basis), None, side)).float()
        for strided in (lowrank, lowrank.T.contiguous().T):
            kept = strided.clone()
            param, state = p.param.clone(), clone(p.state)
            lowrank_update(param, strided, p.basis, state, p.options, side=side, scale=p.scale, backend=backend)
            expected, expected_state = p.solved(backend)
            assert_same_bits(param, expected, "param")
            assert_same_state(state, expected_state)
            assert_same_bits(strided, kept, "the gradient, which is not the operation's to change")


@pytest.mark.parametrize("side", SIDES)
def test_lowrank_update_with_both_sides_projected(backend: str, side: str) -> None:
    p = make_problem(37, 53, 5, side, long_rank=7)
    assert p.long_basis is not None
    exact = p.exact()
    lowrank = torch.from_numpy(oracle.project(f64(p.grad), f64(p.basis), f64(p.long_basis), side)).float()
    lowrank_update(
        p.param,
        lowrank,
        p.basis,
        p.state,
        p.options,
        side=side,
        scale=p.scale,
        long_basis=p.long_basis,
        backend=backend,
    )
    assert_close(p.param, exact.weight, exact.weight_bound, "param")
    assert_close(p.state.exp_avg, exact.m, exact.m_bound, "exp_avg")


@pytest.mark.parametrize("dtype", DTYPES)
def test_lowrank_gradients_of_any_dtype(backend: str, dtype: torch.dtype) -> None:
    p = make_problem(37, 53, 5, "right")
    lowrank = torch.randn(37, 5).to(dtype)
    as_float32 = p.param.clone(), clone(p.state)
    lowrank_update(p.param, lowrank, p.basis, p.state, p.options, side="right", scale=1.0, backend=backend)
    param, state = as_float32
    lowrank_update(param, lowrank.float(), p.basis, state, p.options, side="right", scale=1.0, backend=backend)
    assert_same_bits(p.param, param, "param")
    assert_same_state(p.state, state)


# --- stochastic rounding


@pytest.mark.parametrize("side", SIDES)
def test_stochastic_rounding_takes_the_bits_of_the_weights_own_order(backend: str, side: str) -> None:
    # Elements count row-major in the weight on both sides. Odd sizes: rows begin inside a group of eight elements.
    for shape in ((37, 53, 5), (70, 131, 3)):
        p = make_problem(*shape, side, dtypes=DTYPE_TRIPLES[1], eight_bit=True, weight_decay=0.1)
        exact, _ = replace(p, param=p.param.float()).solved(backend)
        got, _ = replace(p, options=replace(p.options, rounding_seed=2**40 + 3)).solved(backend)
        bits16 = oracle.random_bits16(2**40 + 3, 4, exact.numel()).reshape(exact.shape)
        expected = ((exact.numpy().view(np.uint32) + bits16) >> np.uint32(16)).astype(np.uint16)
        assert np.array_equal(got.view(torch.int16).numpy().view(np.uint16), expected)


# --- strides


def strided_views(rows: int, cols: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Name -> (buffer, view of it of shape (rows, cols)). Values are small integers: sums over them are exact."""

    def buffer(*shape: int) -> Tensor:
        return torch.randint(-4, 5, shape).float()

    return {
        "transposed": ((b := buffer(cols, rows)), b.T),
        "every other column": ((b := buffer(rows, 2 * cols)), b[:, ::2]),
        "inner part": ((b := buffer(rows + 2, cols + 3)), b[1:-1, 1:-2]),
        "contiguous at an odd offset": ((b := buffer(rows * cols + 3)), b[3:].view(rows, cols)),
    }


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", strided_views(2, 2))
def test_strided_weights_are_updated_in_place_and_neighbours_left(backend: str, name: str, side: str) -> None:
    p = make_problem(12, 40, 3, side, eight_bit=True, exact_sums=True, weight_decay=0.1)
    buffer, view = strided_views(12, 40)[name]
    expected, expected_state = replace(p, param=view.contiguous()).solved(backend)
    outside = torch.ones_like(buffer, dtype=torch.bool)
    outside.as_strided(view.shape, view.stride(), view.storage_offset()).fill_(False)
    before, address = buffer.clone(), view.data_ptr()
    galore_update(view, p.grad, p.basis, p.state, p.options, side=side, scale=p.scale, backend=backend)
    assert view.data_ptr() == address
    assert_same_bits(view, expected, "param")
    assert_same_state(p.state, expected_state)
    assert_same_bits(buffer[outside], before[outside], "what is not the parameter")


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", [*strided_views(2, 2), "expanded"])  # sum().backward() gives an expanded gradient
def test_strided_gradients(backend: str, name: str, side: str) -> None:
    grad = torch.ones(()).expand(12, 40) if name == "expanded" else strided_views(12, 40)[name][1]
    p = make_problem(12, 40, 3, side, eight_bit=True, exact_sums=True)
    expected, expected_state = replace(p, grad=grad.contiguous()).solved(backend)
    got, got_state = replace(p, grad=grad).solved(backend)
    assert_same_bits(got, expected, "param")
    assert_same_state(got_state, expected_state)


@pytest.mark.parametrize("side", SIDES)
def test_a_state_of_another_shape_with_as_many_elements(backend: str, side: str) -> None:
    p = make_problem(12, 40, 3, side, eight_bit=True)
    expected, expected_state = p.solved(backend)
    flat = replace(p.state, exp_avg=p.state.exp_avg.flatten(), exp_avg_sq=p.state.exp_avg_sq.flatten())
    got, got_state = replace(p, state=flat).solved(backend)
    assert_same_bits(got, expected, "param")
    assert_same_bits(got_state.exp_avg, expected_state.exp_avg.flatten(), "exp_avg")


# --- gradients that can't be followed


@pytest.mark.parametrize("long_rank", [None, 4])
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize(
    "value",
    [
        torch.nan,
        torch.inf,
        -torch.inf,
        1e25,  # R is finite, its square is not
        3e38,  # R itself overflows for some sums
    ],
)
@pytest.mark.parametrize("where", ["one element", "one row", "the last element"])
def test_an_unrepresentable_gradient_changes_only_the_count(
    backend: str, value: float, where: str, side: str, long_rank: int | None
) -> None:
    for eight_bit in (True, False):
        p = make_problem(37, 53, 5, side, eight_bit=eight_bit, long_rank=long_rank, weight_decay=0.1)
        {"one element": p.grad[3, 7], "one row": p.grad[20], "the last element": p.grad[36, 52]}[where].fill_(value)
        got, got_state = p.solved(backend)
        assert_same_bits(got, p.param, "param")
        assert got_state.skipped.item() == 1
        assert_same_state(replace(got_state, skipped=p.state.skipped), p.state)


@pytest.mark.parametrize("side", SIDES)
def test_a_gradient_projected_on_both_sides_counts_after_both(backend: str, side: str) -> None:
    # Representable after the first projection alone; after the second alone.
    for size, factor, skipped in ((1e17, 1e6, 1), (1e25, 1e-10, 0)):
        p = make_problem(37, 53, 5, side, long_rank=4)
        assert p.long_basis is not None
        p = replace(p, grad=p.grad * size, long_basis=p.long_basis * factor)
        got, got_state = p.solved(backend)
        assert got_state.skipped.item() == skipped
        assert got.isfinite().all()


def test_an_unrepresentable_lowrank_gradient_changes_only_the_count(backend: str) -> None:
    for value in (torch.nan, -torch.inf, 1.8446746e19):  # the last is the first float32 whose square is not finite
        p = make_problem(37, 53, 5, "left", eight_bit=True)
        lowrank, param, state = torch.randn(53, 5), p.param.clone(), clone(p.state)
        lowrank[52, 4] = value
        lowrank_update(param, lowrank, p.basis, state, p.options, side="left", scale=1.0, backend=backend)
        assert_same_bits(param, p.param, "param")
        assert state.skipped.item() == 1
        assert_same_state(replace(state, skipped=p.state.skipped), p.state)


def test_the_gradient_scale_decides_what_is_representable(backend: str) -> None:
    for factor, scale, skipped in ((1e25, 1e10, 0), (1e10, 1e-12, 1), (1.0, 0.0, 1)):
        p = make_problem(37, 53, 5, "right", grad_scale=scale)
        got, got_state = replace(p, grad=p.grad * factor).solved(backend)
        assert got_state.skipped.item() == skipped
        assert got_state.step.item() == 4 - skipped
        assert got.isfinite().all()


def test_found_inf_changes_nothing_at_all(backend: str) -> None:
    p = make_problem(37, 53, 5, "right", eight_bit=True, weight_decay=0.1)
    p.options = replace(p.options, found_inf=torch.tensor(1.0))
    for grad in (p.grad, torch.full_like(p.grad, torch.nan)):  # a NaN isn't counted either
        got, got_state = replace(p, grad=grad).solved(backend)
        assert_same_bits(got, p.param, "param")
        assert_same_state(got_state, p.state)


@pytest.mark.parametrize("eps", [1e-8, 0.0])  # 0 / eps, and 0 / 0
def test_a_zero_basis_moves_nothing_but_the_decay(backend: str, eps: float) -> None:
    # What a refresh gives for a zero gradient.
    p = make_problem(37, 53, 5, "left", weight_decay=0.1, eps=eps)
    p.state = AdamState.zeros((53, 5), eight_bit=True)
    p.basis.zero_()
    got, got_state = p.solved(backend)
    assert_same_bits(got, p.param * float(np.float32(1 - float(p.options.lr) * 0.1)), "param")
    assert got_state.step.item() == 1


@pytest.mark.parametrize("factor", [1e-30, 1e15])  # v underflows to 0 or comes near its largest
def test_extreme_gradients_are_followed(backend: str, factor: float) -> None:
    p = make_problem(37, 53, 5, "right", eight_bit=True)
    p.state, p.grad = AdamState.zeros((37, 5), eight_bit=True), p.grad * factor
    got, got_state = p.solved(backend)
    assert (got - p.param).abs().max() <= 4 * 0.25 * 1e-2 * p.basis.abs().sum(dim=1).max()
    assert got_state.skipped.item() == 0
    assert moments(got_state)[0].any()


# --- against galore_torch


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("proj_type", ["std", "reverse_std", "left", "right", "full"])
@pytest.mark.parametrize(
    ("shape", "rank"),
    [
        ((40, 24), 8),  # tall
        ((24, 40), 8),  # wide
        ((40, 24), 64),  # clamped to 24
    ],
)
def test_galore_torch_is_followed(
    backend: str, shape: tuple[int, int], rank: int, proj_type: str, weight_decay: float
) -> None:
    galore_torch = pytest.importorskip("galore_torch")
    # With proj_type full the first R is diagonal but for rounding noise, which an eps of 1e-8 would let move weights.
    lr, eps = 1e-2, 1e-4
    theirs = torch.nn.Parameter(torch.randn(shape))
    ours = theirs.detach().clone()
    group = {"params": [theirs], "rank": rank, "update_proj_gap": 200, "scale": 0.25, "proj_type": proj_type}
    optimizer = galore_torch.GaLoreAdamW(
        [group], lr=lr, eps=eps, weight_decay=weight_decay, no_deprecation_warning=True
    )
    state = None
    o = options(lr=lr, eps=eps, weight_decay=weight_decay)
    tall = shape[0] >= shape[1]
    side = {"std": "right" if tall else "left", "reverse_std": "left" if tall else "right"}.get(proj_type, proj_type)
    for _ in range(6):
        grad = torch.randn(shape)
        theirs.grad = grad.clone()
        optimizer.step()
        injected = optimizer.state[theirs]["projector"].ortho_matrix
        long_basis = None
        if side == "full":
            long_basis, basis = injected[0].contiguous(), injected[1].T.contiguous()
        else:
            basis = injected.T.contiguous() if side == "right" else injected.contiguous()
        if state is None:
            long = shape[1] if side == "left" else shape[0]
            long_rank = long if long_basis is None else long_basis.shape[1]
            assert basis.shape[1] == min(rank, *shape)
            state = AdamState.zeros((long_rank, basis.shape[1]), eight_bit=False)
        kept = "left" if side == "left" else "right"
        galore_update(ours, grad, basis, state, o, side=kept, scale=0.25, long_basis=long_basis, backend=backend)
    assert state is not None
    assert state.step.item() == 6
    bound = tolerances.GALORE_TORCH_PARITY * float(theirs.detach().abs().max())
    assert_close(ours, f64(theirs), bound, "param")
