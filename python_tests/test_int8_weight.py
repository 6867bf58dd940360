"""The projected updates of int8 weights: codes, and one scale for each group of 256 elements of a row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Any

import numpy as np
import oracle
import pytest
import tolerances
import torch
from test_galore_update import SIDES, Problem, make_problem
from test_ops_library import NAMESPACE, Call, make_call
from test_quantize_weight import per_element
from torch import Tensor
from torch.library import opcheck
from update_cases import (
    HYPERPARAMETERS,
    assert_close,
    assert_codes_almost_equal,
    assert_same_bits,
    assert_same_state,
    clone,
    f64,
)

from galore_kernels.ops import AdamState
from galore_kernels.quantizers import (
    BASIS_FORMATS,
    dequantize_weight,
    quantize_basis,
    quantize_weight,
)

SEED = 2**40 + 3  # both words of the key


@dataclass
class Int8Problem:
    """A projected update of an int8 weight; ``float32`` is the same of the weight that its codes stand for."""

    float32: Problem
    codes: Tensor
    weight_scale: Tensor

    def solved(self, backend: str, **changes: Any) -> tuple[Tensor, Tensor, AdamState]:
        """Codes, scales and state after the operation, on copies."""
        call = self.call(**changes)
        call.run(backend)
        return call.param, call.projection["weight_scale"], call.state

    def call(self, *, op: str = "galore_update", grad: Tensor | None = None) -> Call:
        p = self.float32
        return Call(
            op=op,
            param=self.codes.clone(),
            grad=p.grad if grad is None else grad,
            basis=p.basis,
            state=clone(p.state),
            options=p.options,
            long_basis=p.long_basis,
            basis_scale=p.basis_scale,
            projection={"side": p.side, "scale": p.scale, "weight_scale": self.weight_scale.clone()},
        )

    def exact(self) -> tuple[tolerances.GaloreStep, oracle.Array]:
        """The oracle's step of the weight before it is rounded, and the bound of float32's errors."""
        p = self.float32
        quantized = p.basis_scale is not None
        exact = p.exact(factor_dtype=torch.bfloat16 if quantized else p.basis.dtype)
        return exact, exact.weight_bound + tolerances.U32 * np.abs(f64(p.param))  # the product with the scale


def int8_problem(
    rows: int, cols: int, rank: int, side: str, *, basis_format: str | None = None, **keywords: Any
) -> Int8Problem:
    """``make_problem`` with its weight, and perhaps its basis, quantized."""
    p = make_problem(rows, cols, rank, side, rounding_seed=SEED, **keywords)
    if basis_format is not None:
        # Columns of different lengths: their scales differ by far more than any rounding.
        codes, scale = quantize_basis(p.basis.float() * (1 + torch.arange(rank) % 4), basis_format)
        if keywords.get("exact_sums"):
            scale = 2.0 ** (-2 - torch.arange(rank) % 5)
        p = replace(p, basis=codes, basis_scale=scale)
    return of_weight(p, p.param)


def of_weight(p: Problem, weight: Tensor) -> Int8Problem:
    codes, weight_scale = quantize_weight(weight)
    return Int8Problem(replace(p, param=dequantize_weight(codes, weight_scale, torch.float32)), codes, weight_scale)


def check_against_float64(p: Int8Problem, backend: str, what: str) -> None:
    exact, bound = p.exact()
    codes, scale, state = p.solved(backend)
    step = int(p.float32.state.step) + 1
    assert state.step.item() == step
    bits16 = oracle.random_bits16(SEED, step, codes.numel()).reshape(codes.shape)
    expected_codes, expected_scale = oracle.requantize_weight(exact.weight, f64(p.weight_scale), bits16)
    kept = expected_scale == f64(p.weight_scale)
    widest = np.stack([bound[:, i : i + 256].max(axis=1) for i in range(0, bound.shape[1], 256)], axis=1)
    scale_bound = np.where(kept, 0.0, widest / 112 + tolerances.U32 * expected_scale)
    assert_close(scale, expected_scale, scale_bound, f"weight_scale, {what}")
    assert_codes_almost_equal(codes, expected_codes, tolerances.EQUAL_INT8_CODES, f"codes, {what}")


SHAPES = [
    (1, 1, 1),  # the smallest
    (5, 255, 3),  # around one group
    (5, 256, 3),
    (5, 257, 3),  # rows begin inside a block of eight random numbers
    (70, 530, 17),  # several tiles of rows and panels of columns, and a short last group
    (300, 40, 4),  # many rows
    (9, 600, 300),  # a rank of which few columns of the direction fit the native backend's panel
]

FACTORS = [  # dtype of gradient and basis, or the quantized basis' format
    (torch.float32, None),
    (torch.bfloat16, None),
    (torch.float16, None),
    *((torch.bfloat16, basis_format) for basis_format in BASIS_FORMATS),
]


@pytest.mark.parametrize(("dtype", "basis_format"), FACTORS)
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_follows_the_paper(
    backend: str, shape: tuple[int, int, int], side: str, dtype: torch.dtype, basis_format: str | None
) -> None:
    for eight_bit in (False, True):
        dtypes = (torch.float32, dtype, dtype)
        p = int8_problem(*shape, side, basis_format=basis_format, dtypes=dtypes, eight_bit=eight_bit, weight_decay=0.1)
        check_against_float64(p, backend, f"8-bit: {eight_bit}")


@pytest.mark.parametrize("case", HYPERPARAMETERS)
def test_every_hyperparameter_follows_the_paper(backend: str, case: str) -> None:
    for side in SIDES:
        check_against_float64(int8_problem(37, 270, 5, side, **HYPERPARAMETERS[case]), backend, side)


def test_both_sides_projected(backend: str) -> None:
    for side in SIDES:
        check_against_float64(int8_problem(37, 270, 5, side, long_rank=7, weight_decay=0.1), backend, side)


@pytest.mark.parametrize("factor", [0.45, 0.55])  # of 127: below 64, and not
def test_scales_of_shrinking_weights(backend: str, factor: float) -> None:
    p = int8_problem(9, 300, 3, "right", lr=1.0, weight_decay=1 - factor)
    p.float32.scale = 1e-6  # decay alone
    scale = p.solved(backend)[1]
    assert torch.equal(scale, p.weight_scale) == (factor > 0.5)
    check_against_float64(p, backend, f"times {factor}")


@pytest.mark.parametrize("basis_format", [None, *BASIS_FORMATS])
@pytest.mark.parametrize("side", SIDES)
def test_codes_and_scales_are_the_references_to_the_bit(fast_backend: str, side: str, basis_format: str | None) -> None:
    # At rank 1 the product is one product, and bfloat16's are exact: no sum's order can move the weight.
    for shape in ((37, 600), (300, 257)):
        for eight_bit in (True, False):
            dtypes = (torch.float32, torch.bfloat16, torch.bfloat16)
            p = int8_problem(
                *shape,
                1,
                side,
                basis_format=basis_format,
                dtypes=dtypes,
                eight_bit=eight_bit,
                exact_sums=True,
                weight_decay=0.1,
            )
            codes, scale, state = p.solved(fast_backend)
            expected_codes, expected_scale, expected_state = p.solved("reference")
            assert_same_state(state, expected_state)
            assert_same_bits(scale, expected_scale, "weight_scale")
            assert_same_bits(codes, expected_codes, "codes")


@pytest.mark.parametrize("side", SIDES)
def test_lowrank_update_is_galore_update_after_its_projection(backend: str, side: str) -> None:
    p = int8_problem(37, 270, 5, side, eight_bit=True, exact_sums=True)
    lowrank = torch.from_numpy(oracle.project(f64(p.float32.grad), f64(p.float32.basis), None, side)).float()
    codes, scale, state = p.solved(backend, op="lowrank_update", grad=lowrank)
    expected_codes, expected_scale, expected_state = p.solved(backend)
    assert_same_bits(codes, expected_codes, "codes")
    assert_same_bits(scale, expected_scale, "weight_scale")
    assert_same_state(state, expected_state)


@pytest.mark.parametrize("side", SIDES)
def test_threads_change_nothing(fast_backend: str, side: str) -> None:
    p = int8_problem(300, 1300, 33, side, dtypes=(torch.float32, torch.bfloat16, torch.bfloat16), eight_bit=True)
    expected_codes, expected_scale, _ = p.solved(fast_backend)
    for threads in (2, 7):  # two; more than there are cores
        torch.set_num_threads(threads)
        codes, scale, _ = p.solved(fast_backend)
        assert_same_bits(codes, expected_codes, "codes")
        assert_same_bits(scale, expected_scale, "weight_scale")


# --- what must not change


def unchanged(p: Int8Problem, backend: str, **changes: Any) -> AdamState:
    codes, scale, state = p.solved(backend, **changes)
    assert_same_bits(codes, p.codes, "codes")
    assert_same_bits(scale, p.weight_scale, "weight_scale")
    return state


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e25])
def test_an_unrepresentable_gradient_changes_only_the_count(backend: str, value: float, side: str) -> None:
    p = int8_problem(37, 270, 5, side, eight_bit=True, weight_decay=0.1)
    p.float32.grad[20] = value
    state = unchanged(p, backend)
    assert state.skipped.item() == 1
    assert_same_state(replace(state, skipped=p.float32.state.skipped), p.float32.state)


def test_found_inf_changes_nothing(backend: str) -> None:
    p = int8_problem(37, 270, 5, "left", weight_decay=0.1)
    p.float32.options = replace(p.float32.options, found_inf=torch.tensor(1.0))
    assert_same_state(unchanged(p, backend), p.float32.state)


@pytest.mark.parametrize("side", SIDES)
def test_weights_that_are_not_moved_keep_codes_and_scales(backend: str, side: str) -> None:
    p = int8_problem(37, 600, 5, side)
    p.float32.scale = 0.0
    assert unchanged(p, backend).step.item() == p.float32.state.step.item() + 1


def test_a_group_of_zeros_gets_a_scale_when_it_moves(backend: str) -> None:
    for moves in (False, True):
        p = int8_problem(9, 300, 3, "right")
        weight = p.float32.param.clone()
        weight[:, :256] = 0
        p = of_weight(replace(p.float32, scale=0.25 if moves else 0.0), weight)
        assert not p.weight_scale[:, 0].any()
        codes, scale, _ = p.solved(backend)
        assert bool((scale[:, 0] > 0).all()) == moves
        assert (codes[:, :256].abs().amax(dim=1) == (112 if moves else 0)).all()
        if moves:  # else the old scale is at the edge of being kept
            check_against_float64(p, backend, "moves")


def test_a_group_that_is_not_finite_does_not_come_back_looking_sound(backend: str) -> None:
    p = int8_problem(9, 600, 3, "right", weight_decay=0.1)
    p.weight_scale[4, 1] = torch.nan
    codes, scale, _ = p.solved(backend)
    assert scale.isnan().nonzero().tolist() == [[4, 1]]
    assert not codes[4, 256:512].any()


# --- rounding


def test_rounding_is_unbiased_and_of_the_right_distribution(backend: str) -> None:
    # A row's weights all make one move, of 1.5 % to 90 % of a code: how many of them go up is binomial.
    rows, cols = 60, 1024
    fraction = (torch.arange(rows) + 1.0) / (rows + 7)
    # The direction is R's sign, here 1, and each row of the product its row of the basis.
    p = make_problem(rows, cols, 1, "left", beta1=0.0, beta2=0.0, eps=0.0, lr=1.0, rounding_seed=SEED)
    p = replace(p, grad=torch.full((rows, cols), -1.0), basis=-fraction[:, None], scale=1.0)
    weight = torch.full((rows, cols), 50.0)
    weight[:, ::256] = 127.0 - 2.0  # below the largest code after the move; left out
    codes, ones = weight.to(torch.int8), torch.ones(rows, cols // 256)
    codes, scale, _ = Int8Problem(replace(p, param=weight), codes, ones).solved(backend)
    assert (scale == 1).all()
    moved = codes[weight == 50].view(rows, -1)
    assert set(moved.flatten().tolist()) == {50, 51}
    trials = moved.shape[1]
    z = ((moved == 51).sum(dim=1) - trials * fraction) / (trials * fraction * (1 - fraction)).sqrt()
    # Sum of the z, and chi-square with as many degrees of freedom as rows (Wilson and Hilferty's approximation).
    limit = -NormalDist().inv_cdf(tolerances.SIGNIFICANCE / 2)
    assert abs(z.sum().item()) / rows**0.5 < limit
    spread = 2 / (9 * rows)
    assert abs(((z**2).mean().item()) ** (1 / 3) - (1 - spread)) / spread**0.5 < limit


@pytest.mark.parametrize("side", SIDES)
def test_two_hundred_updates_stay_within_what_the_rounding_explains(backend: str, side: str) -> None:
    # Steps of about 5 % of a code that go one way: rounded to nearest they would all be lost, ten codes in the end.
    rows, cols, updates = 8, 300, 200
    p = make_problem(rows, cols, 2, side, lr=3e-4, weight_decay=0.1, rounding_seed=SEED)
    state = AdamState.zeros(tuple(p.state.exp_avg.shape), eight_bit=False)
    p = replace(p, scale=1.0, state=state, basis=p.basis.sign())
    int8 = of_weight(p, torch.randn(rows, cols) / 4)
    quantized = int8.call(op="lowrank_update")
    scale = quantized.projection["weight_scale"]
    exact = replace(
        int8.call(op="lowrank_update"),
        param=int8.float32.param.clone(),
        options=replace(p.options, rounding_seed=None),
        projection={"side": side, "scale": p.scale},
    )
    drift = torch.randn(state.exp_avg.shape)
    moves, no_bits = np.zeros((rows, cols)), np.zeros((rows, cols))
    largest_scale, rule, new_scales = scale.clone(), f64(scale), torch.ones_like(scale)
    for _ in range(updates):
        grad = drift + torch.randn(drift.shape) / 4
        weight_before, rule_before = f64(exact.param), rule
        for call in (quantized, exact):
            replace(call, grad=grad).run(backend)
        moves += np.abs(f64(exact.param) - weight_before)
        rule = oracle.requantize_weight(f64(exact.param), rule, no_bits)[1]
        new_scales += torch.from_numpy(rule != rule_before)  # and one: the roundings may carry a weight past an edge
        largest_scale = torch.maximum(largest_scale, scale)
    error = f64(dequantize_weight(quantized.param, scale, torch.float32)) - f64(exact.param)
    bound = tolerances.int8_trajectory(moves, per_element(largest_scale, cols), per_element(new_scales, cols))
    assert 5 < (moves / per_element(largest_scale, cols)).mean() < 20
    relative = error / bound
    assert (relative**2).mean() < 1
    assert abs(relative.mean()) * relative.size**0.5 < -NormalDist().inv_cdf(tolerances.SIGNIFICANCE / 2)


# --- the operator


def int8_call(op: str) -> Call:
    call = make_call(op)
    codes, weight_scale = quantize_weight(call.param)
    call = replace(call, param=codes, options=replace(call.options, rounding_seed=3))
    call.projection |= {"weight_scale": weight_scale}
    return call


@pytest.mark.parametrize("op", ["galore_update", "lowrank_update"])
def test_opcheck_accepts_int8_weights(backend: str, op: str) -> None:
    positional, keywords = int8_call(op).schema_arguments(backend)
    opcheck(getattr(NAMESPACE, op).default, positional, keywords)


def test_a_compiled_update_changes_codes_and_scales_as_an_eager_one() -> None:
    torch._dynamo.reset()
    compiled, eager = int8_call("galore_update"), int8_call("galore_update")
    for name in ("param", "grad", "basis"):
        setattr(eager, name, getattr(compiled, name).clone())
    eager.projection |= {"weight_scale": compiled.projection["weight_scale"].clone()}
    before = compiled.param.clone()
    torch.compile(lambda call: call.run(), fullgraph=True, backend="aot_eager")(compiled)
    eager.run()
    assert not torch.equal(compiled.param, before)
    assert_same_bits(compiled.param, eager.param, "codes")
    assert_same_bits(compiled.projection["weight_scale"], eager.projection["weight_scale"], "weight_scale")


def with_scale(change: Callable[[Tensor], Tensor | None]) -> Callable[[Call], Call]:
    return lambda c: replace(c, projection={**c.projection, "weight_scale": change(c.projection["weight_scale"])})


#: What is wrong -> the words of the message, and the change that makes it so.
BAD_CALLS: dict[str, tuple[str, Callable[[Call], Call]]] = {
    "no seed": ("rounding_seed", lambda c: replace(c, options=replace(c.options, rounding_seed=None))),
    "no scale": ("param must be", with_scale(lambda scale: None)),
    "too many scales": ("weight_scale must be", with_scale(lambda scale: scale.repeat(1, 2))),
    "a scale for each row of one dimension": ("weight_scale must be", with_scale(lambda scale: scale[:, 0])),
    "scales in bfloat16": ("weight_scale must be", with_scale(lambda scale: scale.bfloat16())),
    "scales that are not contiguous": (
        "weight_scale must be",
        with_scale(lambda scale: scale.repeat(1, 2)[:, ::2]),
    ),
    "scales elsewhere": ("weight_scale must be", with_scale(lambda scale: scale.to("meta"))),
    "codes that are not contiguous": ("param must be", lambda c: replace(c, param=c.param.T.contiguous().T)),
    "codes of another dtype": ("param must be", lambda c: replace(c, param=c.param.view(torch.uint8))),
    "a weight that has no codes": ("param must be", lambda c: replace(c, param=c.param.bfloat16())),
    "codes of three dimensions": ("param must be", lambda c: replace(c, param=c.param[None])),
}


@pytest.mark.parametrize("what", BAD_CALLS)
def test_what_does_not_fit_is_named_and_changes_nothing(backend: str, what: str) -> None:
    message, change = BAD_CALLS[what]
    for op in ("galore_update", "lowrank_update"):
        good = int8_call(op)
        codes, state = good.param.clone(), clone(good.state)
        with pytest.raises(ValueError, match=message):
            change(good).run(backend)
        assert_same_bits(good.param, codes, "codes")
        assert_same_state(good.state, state)
