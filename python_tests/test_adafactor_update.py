"""Adafactor's steps, at full rank and projected: against float64, galore_torch and the reference, and at the edges."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import oracle
import pytest
import tolerances
import torch
from torch import Tensor
from torch.library import opcheck
from update_cases import assert_close, assert_same_bits, f64

from galore_kernels import ops
from galore_kernels.backends.reference.adafactor import adafactor_step, root_mean_square
from galore_kernels.ops import AdafactorOptions, AdafactorState
from galore_kernels.ops.adafactor_update import MOMENTS
from galore_kernels.quantizers import BASIS_FORMATS, dequantize_weight, quantize_basis, quantize_weight

SIDES = ["left", "right"]

FULL_RANK_SHAPES = [
    (),  # a single number
    (1,),
    (7,),  # not factored
    (1, 1),
    (5, 1),  # rows of one element
    (1, 5),
    (37, 53),  # multiples of no vector width
    (4, 3, 5, 6),  # a convolution: the last two dimensions are factored
]

PROJECTED_SHAPES = [
    (1, 1, 1),
    (7, 1, 1),  # one column
    (37, 53, 5),
    (40, 600, 17),  # a short dimension longer than the native backend sums at a time
    (70, 130, 33),  # a rank one past two vectors
]

DTYPE_PAIRS = [  # of weight and gradient
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.float32),
]

FIXED: dict[str, Any] = {"lr": 0.03, "relative_step": False, "scale_parameter": False}

#: The scalars, each with the reason why it is tried.
CASES: dict[str, dict[str, Any]] = {
    "Adafactor's own": {},
    "GaLore's": FIXED,
    "decay": {**FIXED, "weight_decay": 0.3},  # before the update, by lr
    "decay by the step size": {"weight_decay": 5.0},
    "a decay of all": {**FIXED, "lr": 0.5, "weight_decay": 2.0},  # of which the native stages can't divide
    "a given lr by the weight's size": {"lr": 0.03, "relative_step": False},
    "large eps1": {**FIXED, "eps1": 0.5},  # as large as the squares
    "no eps1": {**FIXED, "eps1": 0.0},
    "large eps2": {"eps2": 10.0},  # more than the weight's size
    "clipped": {**FIXED, "clip_threshold": 0.3},
    "not clipped": {**FIXED, "clip_threshold": float("inf")},
    "another decay rate": {**FIXED, "decay_rate": -0.5},
    "momentum": {**FIXED, "beta1": 0.9, "weight_decay": 0.3},
    "momentum by the step size": {"beta1": 0.6},
    "warm-up": {"warmup_init": True},
    "maximize": {**FIXED, "maximize": True, "weight_decay": 0.3, "beta1": 0.5},
    "odd scale": {**FIXED, "grad_scale": 3.0, "eps1": 0.1, "maximize": True},  # 1/3 is rounded
}


def options(**scalars: Any) -> AdafactorOptions:
    for name in ("lr", "grad_scale"):
        if scalars.get(name) is not None:
            scalars[name] = torch.tensor(scalars[name], dtype=torch.float64)
    return AdafactorOptions(**scalars)


def warm_state(shape: tuple[int, ...], *, first_moment: bool, step: int = 3) -> AdafactorState:
    """As after ``step`` updates with gradients of size about 1."""
    state = AdafactorState.zeros(shape, first_moment=first_moment)
    for name in MOMENTS:
        moment = getattr(state, name)
        if moment is not None:
            moment.copy_(0.01 * torch.randn(moment.shape) if name == "exp_avg" else 0.5 + torch.rand(moment.shape))
    row, col = state.exp_avg_sq_row, state.exp_avg_sq_col
    if row is not None and col is not None:  # both are means of the same squares
        col *= row.mean(-1, keepdim=True) / col.mean(-1, keepdim=True)
    state.step.fill_(step)
    return state


def tensors(state: AdafactorState) -> dict[str, Tensor]:
    named = {field.name: getattr(state, field.name) for field in fields(state)}
    return {name: tensor for name, tensor in named.items() if tensor is not None}


def clone(state: AdafactorState) -> AdafactorState:
    return AdafactorState.of({name: tensor.clone() for name, tensor in tensors(state).items()})


def assert_same_state(got: AdafactorState, expected: AdafactorState) -> None:
    assert tensors(got).keys() == tensors(expected).keys()
    for name, tensor in tensors(expected).items():
        assert_same_bits(tensors(got)[name], tensor, name)


@dataclass
class Problem:
    """Everything that one call takes; at full rank without a basis."""

    param: Tensor
    grad: Tensor
    state: AdafactorState
    options: AdafactorOptions
    basis: Tensor | None = None
    long_basis: Tensor | None = None
    basis_scale: Tensor | None = None
    weight_scale: Tensor | None = None
    side: str = "right"
    scale: float = 0.25

    def run(self, backend: str) -> None:
        """The operation, in place."""
        if self.basis is None:
            ops.adafactor_update(self.param, self.grad, self.state, self.options, backend=backend)
            return
        ops.galore_adafactor_update(
            self.param,
            self.grad,
            self.basis,
            self.state,
            self.options,
            side=self.side,
            scale=self.scale,
            long_basis=self.long_basis,
            basis_scale=self.basis_scale,
            weight_scale=self.weight_scale,
            backend=backend,
        )

    def solved(self, backend: str) -> Problem:
        """The operation on copies."""
        scale = None if self.weight_scale is None else self.weight_scale.clone()
        copy = replace(self, param=self.param.clone(), state=clone(self.state), weight_scale=scale)
        copy.run(backend)
        return copy

    def exact(self) -> tolerances.AdafactorStep:
        """The oracle's answer and the bounds of float32's errors."""
        o = self.options
        absent = f64(torch.zeros(0))
        m, v, row, col = (absent if t is None else f64(t) for t in (getattr(self.state, name) for name in MOMENTS))
        return tolerances.adafactor_step(
            f64(self.param),
            f64(self.grad),
            oracle.AdafactorMoments(m, v, row, col),
            oracle.Adafactor(
                step=int(self.state.step) + 1,
                lr=None if o.lr is None else float(o.lr),
                eps1=o.eps1,
                eps2=o.eps2,
                clip=o.clip_threshold,
                decay_rate=o.decay_rate,
                beta1=o.beta1,
                weight_decay=o.weight_decay,
                scale_parameter=o.scale_parameter,
                warmup_init=o.warmup_init,
                maximize=o.maximize,
                grad_scale=1.0 if o.grad_scale is None else float(o.grad_scale),
            ),
            weight_dtype=self.param.dtype,
            basis=None if self.basis is None else f64(self.basis),
            long_basis=None if self.long_basis is None else f64(self.long_basis),
            side=self.side,
            scale=self.scale,
            factor_dtype=torch.float32 if self.basis is None else self.basis.dtype,
        )


def full_rank(
    shape: tuple[int, ...], *, dtypes: tuple[torch.dtype, torch.dtype] = DTYPE_PAIRS[0], step: int = 3, **scalars: Any
) -> Problem:
    o = options(**scalars)
    state = warm_state(shape, first_moment=o.beta1 is not None, step=step)
    return Problem(torch.randn(shape).to(dtypes[0]), torch.randn(shape).to(dtypes[1]), state, o)


def projected(
    rows: int,
    cols: int,
    rank: int,
    side: str,
    *,
    dtypes: tuple[torch.dtype, torch.dtype] = DTYPE_PAIRS[0],
    long_rank: int | None = None,
    step: int = 3,
    **scalars: Any,
) -> Problem:
    p = full_rank((rows, cols), dtypes=dtypes, **scalars)
    long, short = (rows, cols) if side == "right" else (cols, rows)
    p.side, p.basis = side, (torch.randn(short, rank) / short**0.5).to(dtypes[0])
    if long_rank is not None:
        p.long_basis = (torch.randn(long, long_rank) / long**0.5).to(dtypes[0])
    first = p.options.beta1 is not None
    p.state = warm_state((long if long_rank is None else long_rank, rank), first_moment=first, step=step)
    return p


def check_against_float64(p: Problem, backend: str) -> None:
    exact, got = p.exact(), p.solved(backend)
    assert_close(got.param, exact.weight, exact.weight_bound, "param")
    assert got.state.step.item() == p.state.step.item() + 1
    assert got.state.skipped.item() == 0
    for name, key in zip(MOMENTS, ("m", "v", "row", "col"), strict=True):
        moment = getattr(got.state, name)
        if moment is not None:
            assert_close(moment, getattr(exact.moments, key), getattr(exact.moment_bounds, key), name)


# --- against float64


@pytest.mark.parametrize("dtypes", DTYPE_PAIRS)
@pytest.mark.parametrize("shape", FULL_RANK_SHAPES)
def test_every_full_rank_shape_follows_the_paper(
    backend: str, shape: tuple[int, ...], dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    for beta1 in (None, 0.9):
        check_against_float64(full_rank(shape, dtypes=dtypes, beta1=beta1, **FIXED, weight_decay=0.1), backend)


@pytest.mark.parametrize("dtypes", DTYPE_PAIRS)
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("shape", PROJECTED_SHAPES)
def test_every_projected_shape_follows_the_paper(
    backend: str, shape: tuple[int, int, int], side: str, dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    for beta1 in (None, 0.9):
        check_against_float64(projected(*shape, side, dtypes=dtypes, beta1=beta1, **FIXED, weight_decay=0.1), backend)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("shape", [(7,), (37, 53)])
def test_every_option_follows_the_paper_at_full_rank(backend: str, shape: tuple[int, ...], case: str) -> None:
    for step in (0, 3, 20000):  # the first, whose beta2 is 0; one whose relative step is 1e-2; one past that
        check_against_float64(full_rank(shape, step=step, **CASES[case]), backend)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("side", SIDES)
def test_every_option_follows_the_paper_projected(backend: str, side: str, case: str) -> None:
    for step in (0, 3, 20000):
        check_against_float64(projected(37, 53, 5, side, step=step, **CASES[case]), backend)


@pytest.mark.parametrize("side", SIDES)
def test_both_sides_projected_follow_the_paper(backend: str, side: str) -> None:
    for dtypes in DTYPE_PAIRS[:2]:
        check_against_float64(projected(37, 53, 5, side, dtypes=dtypes, long_rank=4, **FIXED, beta1=0.5), backend)


# --- against galore_torch and transformers, whose Adafactors are the same at full rank


@pytest.mark.parametrize("package", ["galore_torch", "transformers"])
@pytest.mark.parametrize("shape", [(7,), (40, 64), (64, 40), (4, 3, 5, 6)])
def test_many_steps_follow_the_packages(backend: str, shape: tuple[int, ...], package: str) -> None:
    module = pytest.importorskip(package)
    for case in ({}, {**FIXED, "weight_decay": 0.1}, {"beta1": 0.9, "weight_decay": 0.1}):
        arguments: dict[str, Any] = {k: v for k, v in case.items() if v is not None}
        ours = torch.randn(shape)
        start, theirs = ours.clone(), torch.nn.Parameter(ours.clone())
        rival_class = module.GaLoreAdafactor if package == "galore_torch" else module.Adafactor
        rival, o = rival_class([theirs], **arguments), options(**case)
        state = AdafactorState.zeros(shape, first_moment=o.beta1 is not None)
        for _ in range(25):
            theirs.grad = torch.randn(shape)
            rival.step()
            ops.adafactor_update(ours, theirs.grad, state, o, backend=backend)
        moved = (theirs.detach() - start).norm()
        assert (ours - theirs.detach()).norm() <= tolerances.GALORE_TORCH_PARITY * moved
        for name, moment in tensors(state).items():
            if name in MOMENTS:
                torch.testing.assert_close(moment, rival.state[theirs][name], rtol=1e-5, atol=1e-6)


# --- the projected forms, and backends against the reference


@pytest.mark.parametrize("side", SIDES)
def test_a_gradient_that_is_projected_already_takes_the_same_step(backend: str, side: str) -> None:
    p = projected(37, 53, 5, side, beta1=0.9, grad_scale=2.0, maximize=True, weight_decay=0.1)
    assert p.basis is not None
    expected, param, state = p.solved("reference"), p.param.clone(), clone(p.state)
    lowrank = (p.grad if side == "right" else p.grad.T) @ p.basis
    ops.lowrank_adafactor_update(param, lowrank, p.basis, state, p.options, side=side, scale=0.25, backend=backend)
    torch.testing.assert_close(param, expected.param, rtol=1e-6, atol=1e-6)
    for name, tensor in tensors(expected.state).items():
        torch.testing.assert_close(tensors(state)[name], tensor, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("basis_format", BASIS_FORMATS)
@pytest.mark.parametrize("side", SIDES)
def test_quantized_bases_agree_with_the_reference(side: str, basis_format: str) -> None:
    p = projected(70, 130, 16, side, **FIXED, weight_decay=0.1)
    assert p.basis is not None
    p.basis, p.basis_scale = quantize_basis(torch.linalg.qr(p.basis).Q, basis_format)
    got, expected = p.solved("cpu"), p.solved("reference")
    assert float((expected.param - p.param).abs().max()) > 1e-3
    torch.testing.assert_close(got.param, expected.param, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("side", SIDES)
def test_int8_weights_take_the_reference_s_codes(side: str) -> None:
    for scalars in (FIXED, {}):  # given; by the weight's size
        p = projected(70, 300, 8, side, rounding_seed=11, **{**scalars, "weight_decay": 0.1})
        codes, scale = quantize_weight(p.param)
        p = replace(p, param=codes, weight_scale=scale, scale=4.0)
        got, expected = p.solved("cpu"), p.solved("reference")
        assert got.weight_scale is not None
        assert expected.weight_scale is not None
        assert (got.param == expected.param).float().mean() >= tolerances.EQUAL_INT8_CODES
        assert (got.param.int() - expected.param.int()).abs().max() <= 1
        assert (expected.param != codes).float().mean() > 0.1
        torch.testing.assert_close(got.weight_scale, expected.weight_scale, rtol=1e-5, atol=0)


def test_the_size_of_an_int8_weight_is_that_of_its_values() -> None:
    codes, scale = quantize_weight(torch.randn(4000, 300) * torch.rand(4000, 1))  # more than are summed at a time
    state, g = warm_state((300, 4), first_moment=False), torch.randn(300, 4)
    of_codes = adafactor_step(g, codes, scale, state, options())
    of_values = adafactor_step(g, dequantize_weight(codes, scale, torch.float32), None, state, options())
    assert float(of_codes.coefficient) == pytest.approx(float(of_values.coefficient), rel=1e-12)
    assert float(of_codes.coefficient) != pytest.approx(1e-2, rel=0.1)


@pytest.mark.parametrize("shape", [(70, 300), (4100,)])
def test_stochastic_rounding_takes_the_reference_s_bits(shape: tuple[int, ...]) -> None:
    problems = [full_rank(shape, dtypes=DTYPE_PAIRS[1], **FIXED, rounding_seed=11)]
    if len(shape) == 2:
        problems.append(projected(*shape, 8, "left", dtypes=DTYPE_PAIRS[1], **{**FIXED, "lr": 0.3}, rounding_seed=11))
    for p in problems:
        got, expected = p.solved("cpu").param, p.solved("reference").param
        assert (got == expected).float().mean() > 0.999
        other = replace(p, options=replace(p.options, rounding_seed=12)).solved("cpu")
        assert (got == other.param).float().mean() < 0.9


@pytest.mark.parametrize("side", [*SIDES, None])
def test_threads_and_strides_change_nothing(side: str | None) -> None:
    make: Any = (lambda: full_rank((37, 53), **FIXED)) if side is None else lambda: projected(37, 53, 5, side, **FIXED)
    p = make()
    expected = p.solved("cpu")
    wide = torch.full((37, 106), 3.0)
    wide[:, ::2] = p.param
    strided = replace(p, param=wide[:, ::2], grad=p.grad.T.contiguous().T, state=clone(p.state))
    strided.run("cpu")
    assert_same_bits(strided.param.contiguous(), expected.param, "param")
    assert (wide[:, 1::2] == 3.0).all()
    torch.set_num_threads(3)
    assert_same_bits(p.solved("cpu").param, expected.param, "param")


def test_a_large_tensor_s_size_is_summed_precisely() -> None:
    # 2^20 elements are summed at a time; torch's float32 norm of 2^26 normal numbers is 0.5 % off.
    x = 3 * torch.randn(2**20 + 5)
    exact = (f64(x) ** 2).mean() ** 0.5
    assert float(root_mean_square([x])) == pytest.approx(exact, rel=1e-12)
    assert float(root_mean_square([x[:7], x[7:]])) == pytest.approx(exact, rel=1e-12)


# --- edges


@pytest.mark.parametrize("shape", [(7,), (37, 53)])
@pytest.mark.parametrize("eps1", [0.0, 1e-30])
def test_a_gradient_of_zeros_moves_nothing(backend: str, shape: tuple[int, ...], eps1: float) -> None:
    p = full_rank(shape, eps1=eps1, step=0)
    p.state = AdafactorState.zeros(shape, first_moment=False)
    p.grad.zero_()
    got = p.solved(backend)
    assert_same_bits(got.param, p.param, "param")
    assert (got.state.step.item(), got.state.skipped.item()) == (1.0, 0)


def test_rows_of_zeros_stay_where_they_are_without_eps(backend: str) -> None:
    p = full_rank((37, 53), eps1=0.0, step=0)
    p.state = AdafactorState.zeros((37, 53), first_moment=False)
    p.grad[5], p.grad[:, 7] = 0.0, 0.0
    got = p.solved(backend)
    moved = got.param != p.param
    assert not moved[5].any()
    assert not moved[:, 7].any()
    assert moved.sum() == 36 * 52


def test_an_empty_tensor_takes_its_step(backend: str) -> None:
    for shape in [(0,), (0, 5), (5, 0)]:
        got = full_rank(shape).solved(backend)
        assert (got.state.step.item(), got.state.skipped.item()) == (4.0, 0)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e22])
def test_a_gradient_that_is_not_representable_changes_nothing(backend: str, value: float) -> None:
    for p in (full_rank((37, 53), beta1=0.9), full_rank((7,)), *(projected(37, 53, 5, side) for side in SIDES)):
        p.grad[(5, 7)[: p.grad.dim()]] = value
        got = p.solved(backend)
        assert_same_bits(got.param, p.param, "param")
        assert got.state.skipped.item() == 1
        assert_same_state(replace(got.state, skipped=p.state.skipped), p.state)


def test_squares_whose_sum_overflows_change_nothing(backend: str) -> None:
    p = full_rank((37, 53))
    p.grad[5] = 1.5e19  # its square is representable, the sum of two is not
    got = p.solved(backend)
    assert_same_bits(got.param, p.param, "param")
    assert got.state.skipped.item() == 1


@pytest.mark.parametrize("value", [1.0, 0.5, float("nan")])
def test_found_inf_changes_nothing_at_all(backend: str, value: float) -> None:
    for p in (full_rank((37, 53)), projected(37, 53, 5, "right")):
        p.grad[0, 0] = float("nan")
        got = replace(p, options=replace(p.options, found_inf=torch.tensor(value))).solved(backend)
        assert_same_bits(got.param, p.param, "param")
        assert_same_state(got.state, p.state)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"lr": 0.1}, "lr"),
        ({"relative_step": False}, "lr"),
        ({**FIXED, "warmup_init": True}, "warmup_init"),
        ({"beta1": 1.0}, "exp_avg|beta1"),
        ({"clip_threshold": 0.0}, "clip_threshold"),
        ({"clip_threshold": float("nan")}, "clip_threshold"),
        ({"decay_rate": 0.1}, "decay_rate"),
        ({"eps1": -1.0}, "eps1"),
        ({"eps2": float("inf")}, "eps2"),
        ({"weight_decay": -0.1}, "weight_decay"),
        ({"rounding_seed": 1}, "rounding_seed"),
        ({"found_inf": torch.zeros(2)}, "found_inf"),
    ],
)
def test_bad_options_are_refused_by_name(change: dict[str, Any], named: str) -> None:
    for p in (full_rank((37, 53)), projected(37, 53, 5, "right")):
        kept, param = clone(p.state), p.param.clone()
        with pytest.raises(ValueError, match=named):
            replace(p, options=options(**change)).run("auto")
        assert_same_state(p.state, kept)
        assert_same_bits(p.param, param, "param")


@pytest.mark.parametrize("name", ["exp_avg_sq_row", "exp_avg_sq_col", "exp_avg", "exp_avg_sq", "step", "skipped"])
def test_states_of_other_tensors_are_refused_by_name(name: str) -> None:
    for p in (full_rank((37, 53)), projected(37, 53, 5, "left")):
        p.state = replace(p.state, **{name: torch.zeros(4)})
        with pytest.raises(ValueError, match=name):
            p.run("auto")


def test_a_device_backend_says_that_it_does_not_offer_it() -> None:
    with pytest.raises(RuntimeError, match="triton: it does not implement adafactor_update"):
        full_rank((7,)).run("triton")


# --- torch.library


def schema_arguments(p: Problem, backend: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    state = [getattr(p.state, field.name) for field in fields(p.state)]
    named = {field.name: getattr(p.options, field.name) for field in fields(p.options) if field.name != "lr"}
    if p.basis is None:
        return (p.param, p.grad, *state, p.options.lr), {**named, "backend": backend}
    bases = (p.basis, p.long_basis, p.basis_scale)
    projection = {"side": p.side, "scale": p.scale, "weight_scale": p.weight_scale}
    return (p.param, p.grad, *bases, *state, p.options.lr), {**projection, **named, "backend": backend}


def test_opcheck_accepts_them(backend: str) -> None:
    namespace = torch.ops.galore_kernels
    for p in (full_rank((7,), **FIXED), full_rank((4, 6), beta1=0.9)):
        args, kwargs = schema_arguments(p, backend)
        opcheck(namespace.adafactor_update.default, args, kwargs)
    p = projected(12, 40, 3, "left", beta1=0.9)
    args, kwargs = schema_arguments(p, backend)
    opcheck(namespace.galore_adafactor_update.default, args, kwargs)
    lowrank = torch.randn(40, 3)
    opcheck(namespace.lowrank_adafactor_update.default, (p.param, lowrank, *args[2:]), kwargs)
