"""The APOLLO step: against float64 and apollo_torch, between backends, and at the edges."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any

import oracle
import pytest
import tolerances
import torch
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
    moments,
    options,
    oracle_scalars,
    tensors,
    warm_state,
)

from galore_kernels.ops import AdamOptions, AdamState, ApolloOptions, RandomBasis, apollo_update, random_basis
from galore_kernels.ops.random_basis import FAMILIES, magnitudes
from galore_kernels.quantizers import quantize_weight

SIDES = ["left", "right"]

SHAPES = [
    (1, 1, 1),  # the smallest
    (7, 1, 1),  # one column
    (37, 53, 5),  # multiples of no vector width, tile or block
    (64, 64, 8),  # whole blocks of random bits
    (64, 64, 4),  # moments of 256 elements
    (40, 600, 17),  # a short dimension longer than the native backend sums at a time, a rank one past two blocks
    (70, 130, 33),  # a rank one past two vectors
    (130, 70, 1),  # APOLLO-Mini
]

DTYPE_PAIRS = [  # of weight and gradient
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.float32, torch.bfloat16),  # a master weight
    (torch.bfloat16, torch.float32),  # gradients accumulated in float32
]

OPTIONS = {
    "APOLLO": ApolloOptions(),
    "Mini": ApolloOptions(scale=128.0, scaling="tensor"),
    "scale": ApolloOptions(scale=2.0),  # its root is not a power of two
    "scale in front": ApolloOptions(scale=2.0, scale_front=True),
    "no limit": ApolloOptions(scale=2.0, norm_growth_limit=None),
    "another limit": ApolloOptions(norm_growth_limit=1.5, scaling="tensor"),
}


@dataclass
class Problem:
    """Everything that one call takes."""

    param: Tensor
    grad: Tensor
    basis: Tensor | RandomBasis
    state: AdamState
    scaled_norm: Tensor
    options: AdamOptions
    apollo: ApolloOptions
    side: str
    weight_scale: Tensor | None = None

    def solved(self, backend: str) -> Solution:
        """The operation on copies."""
        param = self.param.clone(memory_format=torch.contiguous_format)
        scale = None if self.weight_scale is None else self.weight_scale.clone()
        solution = Solution(param, clone(self.state), self.scaled_norm.clone(), scale)
        apollo_update(
            param,
            self.grad,
            self.basis,
            solution.state,
            solution.scaled_norm,
            self.options,
            self.apollo,
            side=self.side,
            weight_scale=scale,
            backend=backend,
        )
        return solution

    def exact(self) -> tolerances.ApolloStep:
        """The oracle's answer and the bounds of float32's errors."""
        short = self.param.shape[1 if self.side == "right" else 0]
        if isinstance(self.basis, RandomBasis):
            table = magnitudes(self.basis.family).numpy()
            basis = oracle.random_basis(short, self.basis.rank, self.basis.seed, table) / self.basis.rank**0.5
        else:
            basis = f64(self.basis)
        o = self.apollo
        return tolerances.apollo_step(
            f64(self.param),
            f64(self.grad),
            basis,
            *moments(self.state),
            float(self.scaled_norm),
            oracle_scalars(self.options, int(self.state.step) + 1),
            oracle.Apollo(o.scale, o.scaling == "tensor", o.scale_front, o.norm_growth_limit or 0.0),
            side=self.side,
            weight_dtype=self.param.dtype,
        )


@dataclass
class Solution:
    """What a call has changed."""

    param: Tensor
    state: AdamState
    scaled_norm: Tensor
    weight_scale: Tensor | None


def make_problem(
    rows: int,
    cols: int,
    rank: int,
    side: str,
    *,
    dtypes: tuple[torch.dtype, torch.dtype] = DTYPE_PAIRS[0],
    basis: str = "gaussian",
    eight_bit: bool = False,
    norm: float = 0.5,
    apollo: ApolloOptions = OPTIONS["APOLLO"],
    **scalars: Any,
) -> Problem:
    """A random problem in a warm state. ``norm``: the last step's, where a small one makes the limiter act."""
    long, short = (rows, cols) if side == "right" else (cols, rows)
    given = (torch.randn(short, rank) / rank**0.5).to(dtypes[1])
    return Problem(
        param=torch.randn(rows, cols).to(dtypes[0]),
        grad=torch.randn(rows, cols).to(dtypes[1]),
        basis=given if basis == "given" else RandomBasis(rank, 7 + rank, basis),
        state=warm_state((long, rank), eight_bit=eight_bit),
        scaled_norm=torch.tensor(norm),
        options=options(**scalars),
        apollo=apollo,
        side=side,
    )


def check_against_float64(p: Problem, backend: str, what: str) -> None:
    exact, got = p.exact(), p.solved(backend)
    assert_close(got.param, exact.weight, exact.weight_bound, f"param, {what}")
    assert abs(float(got.scaled_norm) - exact.norm) <= exact.norm_bound, what
    assert got.state.step.item() == p.state.step.item() + 1
    assert got.state.skipped.item() == 0
    if got.state.exp_avg_absmax is None:
        assert_close(got.state.exp_avg, exact.m, exact.m_bound, f"exp_avg, {what}")
        assert_close(got.state.exp_avg_sq, exact.v, exact.v_bound, f"exp_avg_sq, {what}")


# --- the random basis


@pytest.mark.parametrize("family", FAMILIES)
def test_the_random_basis_is_its_definition_on_every_backend(backend: str, family: str) -> None:
    for short, rank in [(1, 1), (37, 5), (64, 8), (70, 33), (5, 300)]:  # around blocks of eight, past a task's columns
        for seed in (0, 2**63 - 1):
            drawn = random_basis(short, RandomBasis(rank, seed, family), backend=backend)
            expected = oracle.random_basis(short, rank, seed, magnitudes(family).numpy())
            assert drawn.dtype == torch.bfloat16
            assert torch.equal(drawn.double(), torch.from_numpy(expected))


def test_the_gaussian_family_is_gaussian() -> None:
    drawn = random_basis(1000, RandomBasis(1000, 3)).double().flatten()
    # Of a million standard normal numbers: 4.9 standard errors of each of these, a chance of 1e-6.
    assert abs(drawn.mean()) < 4.9e-3
    assert abs(drawn.square().mean() - 1) < 4.9e-3 * 2**0.5
    assert abs(drawn.pow(4).mean() - 3) < 4.9e-3 * 96**0.5
    cdf = torch.distributions.Normal(0.0, 1.0).cdf(drawn.sort().values)
    # Kolmogorov and Smirnov: 2.7 / sqrt(N) has a chance of 1e-6; half a step of the 4096 values, rounded to bf16.
    assert (cdf - torch.linspace(0, 1, len(cdf), dtype=torch.float64)).abs().max() < 2.7e-3 + 2**-9


def test_other_seeds_draw_other_bases() -> None:
    first, second = (random_basis(64, RandomBasis(64, seed)).float().flatten() for seed in (1, 2))
    assert abs(torch.corrcoef(torch.stack([first, second]))[0, 1]) < 4.9 / 64


def test_the_families_differ() -> None:
    assert set(random_basis(9, RandomBasis(9, 1, "rademacher")).flatten().tolist()) == {-1.0, 1.0}
    assert magnitudes("gaussian").square().mean() == pytest.approx(1.0, abs=1e-4)


def test_opcheck_accepts_the_random_basis(backend: str) -> None:
    like = torch.empty(0, dtype=torch.bfloat16)
    arguments = {"seed": 3, "family": "gaussian", "backend": backend}
    opcheck(torch.ops.galore_kernels.random_basis.default, (like, 12, 3), arguments)


@pytest.mark.parametrize("basis", ["gaussian", "given"])
def test_opcheck_accepts_the_update(backend: str, basis: str) -> None:
    p = make_problem(12, 40, 3, "right", basis=basis, eight_bit=True)
    drawn = p.basis if isinstance(p.basis, RandomBasis) else None
    given = p.basis if isinstance(p.basis, Tensor) else None
    scalars = {name: getattr(p.options, name) for name in AdamOptions.__dataclass_fields__}
    positional = (p.param, p.grad, given, *tensors(p.state).values(), scalars.pop("lr"), p.scaled_norm)
    options = {name: getattr(p.apollo, name) for name in ApolloOptions.__dataclass_fields__}
    options |= {"rank": drawn.rank if drawn else 0, "basis_seed": drawn and drawn.seed}
    options |= {"basis_family": drawn.family if drawn else "", "side": "right", "backend": backend}
    opcheck(torch.ops.galore_kernels.apollo_update.default, positional, {**options, **scalars})


# --- against float64


@pytest.mark.parametrize("dtypes", DTYPE_PAIRS)
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_follows_the_paper(
    backend: str, shape: tuple[int, int, int], side: str, dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    for basis, eight_bit in itertools.product(["gaussian", "given"], [False, True]):
        p = make_problem(*shape, side, dtypes=dtypes, basis=basis, eight_bit=eight_bit, weight_decay=0.1)
        check_against_float64(p, backend, f"{basis}, 8-bit: {eight_bit}")


@pytest.mark.parametrize("case", HYPERPARAMETERS)
@pytest.mark.parametrize("side", SIDES)
def test_every_hyperparameter_follows_the_paper(backend: str, side: str, case: str) -> None:
    for eight_bit in (False, True):
        p = make_problem(37, 53, 5, side, eight_bit=eight_bit, **HYPERPARAMETERS[case])
        check_against_float64(p, backend, f"8-bit: {eight_bit}")


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("side", SIDES)
def test_every_option_follows_the_paper(backend: str, side: str, name: str) -> None:
    # Unknown; as good as; limiting; without effect.
    for norm, family in [(0.0, "gaussian"), (1e-9, "gaussian"), (0.5, "rademacher"), (1e6, "gaussian")]:
        p = make_problem(37, 53, 5, side, apollo=OPTIONS[name], norm=norm, basis=family, weight_decay=0.1)
        check_against_float64(p, backend, f"norm {norm}")


@pytest.mark.parametrize("side", SIDES)
def test_the_limiter_bounds_the_growth_of_the_norm(backend: str, side: str) -> None:
    p = make_problem(37, 53, 5, side, norm=0.5)
    assert float(p.solved(backend).scaled_norm) == pytest.approx(0.5 * 1.01, rel=1e-6)
    free = replace(p, apollo=OPTIONS["no limit"]).solved(backend)
    assert float(free.scaled_norm) > 1.0


def test_a_gradient_of_zeros_does_not_limit_the_next(backend: str) -> None:
    p = make_problem(37, 53, 5, "right")
    zero = replace(p, grad=torch.zeros_like(p.grad)).solved(backend)
    assert zero.scaled_norm.item() == 0.0
    after = replace(p, state=zero.state, scaled_norm=zero.scaled_norm).solved(backend)
    assert float(after.scaled_norm) > 1.0


# --- against apollo_torch


@pytest.mark.parametrize("scaling", ["channel", "tensor"])
@pytest.mark.parametrize("shape", [(40, 64), (64, 40), (48, 48)])
def test_many_steps_follow_apollo_torch(backend: str, shape: tuple[int, int], scaling: str) -> None:
    apollo_torch = pytest.importorskip("apollo_torch")
    side = "left" if shape[0] < shape[1] else "right"
    for scale_front in (False, True):
        ours = torch.randn(shape)
        start = ours.clone()
        theirs = torch.nn.Parameter(ours.clone())
        group = {"params": [theirs], "rank": 8, "update_proj_gap": 10, "scale": 4.0, "proj_type": "std"}
        rival = apollo_torch.APOLLOAdamW(
            [{**group, "proj": "random", "scale_type": scaling}], lr=1e-2, weight_decay=0.1, scale_front=scale_front
        )
        state, norm = AdamState.zeros((max(shape), 8), eight_bit=False), torch.zeros(())
        for step in range(25):
            grad = torch.randn(shape) * (1 + step / 4)  # grows by more than 1 % a step
            theirs.grad = grad.clone()
            rival.step()
            basis = rival.state[theirs]["projector"].ortho_matrix
            apollo_update(
                ours,
                grad,
                (basis.T if side == "right" else basis).contiguous(),
                state,
                norm,
                options(1e-2, eps=1e-6, weight_decay=0.1),
                ApolloOptions(4.0, scaling, scale_front),
                side=side,
                backend=backend,
            )
        moved = (theirs.detach() - start).norm()
        assert (ours - theirs.detach()).norm() <= tolerances.GALORE_TORCH_PARITY * 2 * moved
        assert float(norm) == pytest.approx(float(rival.state[theirs]["scaled_grad"]), rel=1e-5)


# --- backends against the reference


@pytest.mark.parametrize("dtypes", DTYPE_PAIRS)
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("shape", SHAPES)
def test_backends_agree_with_the_reference(
    fast_backend: str, shape: tuple[int, int, int], side: str, dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    p = make_problem(*shape, side, dtypes=dtypes, eight_bit=True, weight_decay=0.1)
    got, expected, exact = p.solved(fast_backend), p.solved("reference"), p.exact()
    assert_close(got.param, f64(expected.param), 2 * exact.weight_bound, "param")
    for name in ("exp_avg", "exp_avg_sq"):
        codes = getattr(expected.state, name)
        assert_codes_almost_equal(getattr(got.state, name), codes, tolerances.EQUAL_CODES, name)
    assert abs(float(got.scaled_norm - expected.scaled_norm)) <= 2 * exact.norm_bound


@pytest.mark.parametrize("side", SIDES)
def test_stochastic_rounding_takes_the_reference_s_bits(fast_backend: str, side: str) -> None:
    p = make_problem(70, 300, 8, side, dtypes=DTYPE_PAIRS[1], norm=0.0, lr=0.3, rounding_seed=11)
    got, expected = p.solved(fast_backend).param, p.solved("reference").param
    # A weight's last float32 bit decides its rounding with a chance of about 2^-15.
    assert (got == expected).float().mean() > 0.999
    assert (got == replace(p, options=options(0.3, rounding_seed=12)).solved(fast_backend).param).float().mean() < 0.9


@pytest.mark.parametrize("side", SIDES)
def test_int8_weights_take_the_reference_s_codes(fast_backend: str, side: str) -> None:
    p = make_problem(70, 300, 8, side, rounding_seed=11, lr=0.1, weight_decay=0.1)
    codes, scale = quantize_weight(p.param)
    p = replace(p, param=codes, weight_scale=scale)
    got, expected = p.solved(fast_backend), p.solved("reference")
    assert got.weight_scale is not None
    assert expected.weight_scale is not None
    assert (got.param == expected.param).float().mean() >= tolerances.EQUAL_INT8_CODES
    assert (got.param.int() - expected.param.int()).abs().max() <= 1
    assert (expected.param != codes).float().mean() > 0.1
    torch.testing.assert_close(got.weight_scale, expected.weight_scale, rtol=1e-5, atol=0)


@pytest.mark.parametrize("side", SIDES)
def test_threads_change_nothing(fast_backend: str, side: str) -> None:
    p = make_problem(300, 500, 33, side, dtypes=DTYPE_PAIRS[1], eight_bit=True, rounding_seed=3)
    expected = p.solved(fast_backend)
    for threads in (2, 7):  # two; more than there are cores
        torch.set_num_threads(threads)
        got = p.solved(fast_backend)
        assert_same_bits(got.param, expected.param, "param")
        assert_same_state(got.state, expected.state)
        assert_same_bits(got.scaled_norm, expected.scaled_norm, "scaled_norm")


@pytest.mark.parametrize("side", SIDES)
def test_strides_change_nothing(fast_backend: str, side: str) -> None:
    p = make_problem(37, 53, 5, side)
    expected = p.solved(fast_backend)
    wide = torch.full((37, 106), 3.0)
    wide[:, ::2] = p.param
    view, state, norm = wide[:, ::2], clone(p.state), p.scaled_norm.clone()
    grad = p.grad.T.contiguous().T
    apollo_update(view, grad, p.basis, state, norm, p.options, p.apollo, side=side, backend=fast_backend)
    assert_same_bits(view.contiguous(), expected.param, "param")
    assert (wide[:, 1::2] == 3.0).all()


# --- what changes nothing


@pytest.mark.parametrize("eight_bit", [True, False])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e19])
def test_a_gradient_that_is_not_representable_changes_nothing(backend: str, value: float, eight_bit: bool) -> None:
    for side in SIDES:
        p = make_problem(37, 53, 5, side, eight_bit=eight_bit)
        p.grad[5, 7] = value
        got = p.solved(backend)
        assert_same_bits(got.param, p.param, "param")
        assert_same_bits(got.scaled_norm, p.scaled_norm, "scaled_norm")
        assert got.state.skipped.item() == 1
        assert_same_state(replace(got.state, skipped=p.state.skipped), p.state)


def test_gradients_of_extreme_size(backend: str) -> None:
    for factor in (1e-15, 1e15):  # norms that count as unknown; as large as a sum of squares may become
        p = make_problem(37, 53, 5, "left", norm=0.0)
        p.state = AdamState.zeros(tuple(p.state.exp_avg.shape), eight_bit=False)
        p.grad *= factor
        check_against_float64(p, backend, f"times {factor}")


def test_found_inf_changes_nothing_at_all(backend: str) -> None:
    p = make_problem(37, 53, 5, "right")
    p.grad[0, 0] = float("nan")
    got = replace(p, options=replace(p.options, found_inf=torch.ones(()))).solved(backend)
    assert_same_bits(got.param, p.param, "param")
    assert_same_state(got.state, p.state)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"apollo": ApolloOptions(scaling="chanel")}, "scaling"),
        ({"apollo": ApolloOptions(scale=0.0)}, "scale"),
        ({"apollo": ApolloOptions(norm_growth_limit=0.9)}, "norm_growth_limit"),
        ({"side": "rigth"}, "side"),
        ({"basis": RandomBasis(6, 1)}, "exp_avg"),
        ({"basis": RandomBasis(0, 1)}, "rank"),
        ({"basis": RandomBasis(5, -1)}, "basis_seed"),
        ({"basis": RandomBasis(5, 1, "cauchy")}, "basis_family"),
        ({"basis": torch.zeros(52, 5)}, "basis"),
        ({"grad": torch.zeros(37, 52)}, "grad"),
        ({"scaled_norm": torch.zeros(1)}, "scaled_norm"),
        ({"param": torch.zeros(37 * 53)}, "param"),
    ],
)
def test_bad_arguments_are_refused_by_name(change: dict[str, Any], named: str) -> None:
    p = replace(make_problem(37, 53, 5, "right"), **change)
    kept = clone(p.state)
    with pytest.raises(ValueError, match=named):
        apollo_update(p.param, p.grad, p.basis, p.state, p.scaled_norm, p.options, p.apollo, side=p.side)
    assert_same_state(p.state, kept)
