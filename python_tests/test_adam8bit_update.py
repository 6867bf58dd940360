"""The full-rank Adam step: against float64, between backends to the bit, and at the edges."""

from __future__ import annotations

from dataclasses import replace

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

from galore_kernels.ops import AdamOptions, AdamState, adam8bit_update
from galore_kernels.quantizers import dynamic_map

SIZES = [
    (0,),  # nothing to do, and still a step
    (1,),  # the smallest
    (255,),  # around one quantization block
    (256,),
    (257,),
    (3, 5, 7),  # any number of dimensions
    (64 * 256 + 1,),  # the native backend hands out 64 blocks at a time; the tail is one element
]


def updated(param: Tensor, grad: Tensor, state: AdamState, o: AdamOptions, backend: str) -> tuple[Tensor, AdamState]:
    """The operation on copies."""
    param, state = param.clone(memory_format=torch.contiguous_format), clone(state)
    adam8bit_update(param, grad, state, o, backend=backend)
    return param, state


# --- against float64


@pytest.mark.parametrize("case", HYPERPARAMETERS)
def test_float32_moments_follow_the_papers(backend: str, case: str) -> None:
    o = options(**HYPERPARAMETERS[case])
    param = torch.randn(7, 37)
    state = AdamState.zeros((7, 37), eight_bit=False)
    w, m, v = f64(param), np.zeros((7, 37)), np.zeros((7, 37))
    largest, steps = 0.0, 5
    for step in range(1, steps + 1):
        grad = torch.randn(7, 37) * (float(o.grad_scale) if o.grad_scale is not None else 1.0)
        adam8bit_update(param, grad, state, o, backend=backend)
        a = oracle_scalars(o, step)
        w, m, v = oracle.adam(w, f64(grad), m, v, a)
        largest = max(largest, float(np.abs(f64(grad)).max()) / a.grad_scale)
        assert_close(state.exp_avg, m, tolerances.first_moment(largest, step), f"exp_avg after step {step}")
        assert_close(state.exp_avg_sq, v, tolerances.second_moment_relative(step) * v, f"exp_avg_sq after step {step}")
        bound = tolerances.adam_weight(w, a.lr, step, torch.float32)
        assert_close(param, w, bound, f"param after step {step}")
    assert state.step.item() == steps
    assert state.skipped.item() == 0


@pytest.mark.parametrize("case", HYPERPARAMETERS)
def test_8bit_moments_follow_the_papers(backend: str, case: str) -> None:
    # The oracle starts each step from the codes that the operation left, so errors don't add up over steps.
    o = options(**HYPERPARAMETERS[case])
    n = 10 * 256 + 77
    param, state = torch.randn(n), AdamState.zeros((n,), eight_bit=True)
    for step in range(1, 6):
        grad = torch.randn(n)
        w, (m, v) = f64(param), moments(state)
        adam8bit_update(param, grad, state, o, backend=backend)
        w, m, v = oracle.adam(w, f64(grad), m, v, oracle_scalars(o, step))
        assert_close(param, w, tolerances.adam_weight(w, float(o.lr), 1, torch.float32), f"param after step {step}")
        for name, exact, signed in (("exp_avg", m, True), ("exp_avg_sq", v, False)):
            codes, absmax = oracle.quantize(exact.astype(np.float32), dynamic_map(signed).numpy())
            assert_codes_almost_equal(getattr(state, name), codes, tolerances.EQUAL_CODES, f"{name} at step {step}")
            bound = tolerances.second_moment_relative(1) * absmax
            assert_close(getattr(state, f"{name}_absmax"), absmax.astype(np.float64), bound, f"{name}_absmax")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16bit_weights_are_rounded_once(backend: str, dtype: torch.dtype) -> None:
    # With decay, so that rounding before the decay as well (as others do) would show: it misses by up to 1.5 ulp.
    o = options(lr=0.3, weight_decay=0.3)
    param, grad = torch.randn(4000).to(dtype), torch.randn(4000).to(dtype)
    state = warm_state((4000,), eight_bit=False)
    exact = oracle.adam(f64(param), f64(grad), *moments(state), oracle_scalars(o, 4))[0]
    got, _ = updated(param, grad, state, o, backend)
    float32_error = tolerances.adam_weight(exact, 0.3, 1, torch.float32)
    assert_close(got, exact, tolerances.rounding_of(exact, dtype) + float32_error, "param")


def test_lr_is_used_in_its_own_precision(backend: str) -> None:
    # lr and decay are applied to w = 1 alone: 1 - lr * wd shows which lr it was, as do the float32 neighbours of 0.1.
    param, grad = torch.ones(8), torch.zeros(8)
    state = AdamState.zeros((8,), eight_bit=False)
    for dtype in (torch.float32, torch.float64):
        o = options(lr=0.1, lr_dtype=dtype, weight_decay=1000.0)
        got, _ = updated(param, grad, state, o, backend)
        expected = np.float32(1.0 - float(torch.tensor(0.1, dtype=dtype)) * 1000.0)
        assert got.unique().tolist() == [float(expected)]


# --- backends against the reference, to the bit


@pytest.mark.parametrize("eight_bit", [True, False])
@pytest.mark.parametrize("grad_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_backends_agree_to_the_bit(
    fast_backend: str, dtype: torch.dtype, grad_dtype: torch.dtype, eight_bit: bool
) -> None:
    for shape in SIZES:
        for case, scalars in HYPERPARAMETERS.items():
            o = options(**scalars)
            param, grad = torch.randn(shape).to(dtype), torch.randn(shape).to(grad_dtype)
            state = warm_state(shape, eight_bit=eight_bit)
            for _ in range(2):
                expected, expected_state = updated(param, grad, state, o, "reference")
                got, got_state = updated(param, grad, state, o, fast_backend)
                assert_same_bits(got, expected, f"param {shape}, {case}")
                assert_same_state(got_state, expected_state)
                param, state = got, got_state
            assert state.step.item() == 5


def test_auto_is_the_native_backend_on_the_cpu() -> None:
    param, grad, state, o = torch.randn(300), torch.randn(300), warm_state((300,), eight_bit=True), options()
    got, got_state = updated(param, grad, state, o, "auto")
    expected, expected_state = updated(param, grad, state, o, "cpu")
    assert_same_bits(got, expected, "param")
    assert_same_state(got_state, expected_state)


@pytest.mark.parametrize("threads", [2, 7])  # two; more than there are cores, and as many as tasks
def test_threads_change_nothing(backend: str, threads: int) -> None:
    n = 6 * 64 * 256 + 13  # six tasks of 64 blocks and a short one
    param, grad, state = torch.randn(n).bfloat16(), torch.randn(n), warm_state((n,), eight_bit=True)
    o = options(rounding_seed=5, weight_decay=0.1)
    expected, expected_state = updated(param, grad, state, o, backend)
    torch.set_num_threads(threads)
    got, got_state = updated(param, grad, state, o, backend)
    assert_same_bits(got, expected, "param")
    assert_same_state(got_state, expected_state)


# --- stochastic rounding


def test_oracle_philox_gives_the_published_vectors() -> None:
    # Random123's known answers for philox4x32-10: all zero, all one, and digits of pi.
    low = 0xFFFFFFFF
    assert oracle.philox4x32((0, 0, 0, 0), (0, 0)) == (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    assert oracle.philox4x32((low,) * 4, (low, low)) == (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)
    counter = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    expected = (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)
    assert oracle.philox4x32(counter, (0xA4093822, 0x299F31D0)) == expected


SEEDS = [
    0,
    12345,
    2**32 + 7,  # its high word is a key of its own
    2**63 - 1,  # the largest
]


@pytest.mark.parametrize("eight_bit", [True, False])
@pytest.mark.parametrize("seed", SEEDS)
def test_stochastic_rounding_takes_the_specified_bits(backend: str, seed: int, eight_bit: bool) -> None:
    # A float32 weight of equal value gives the number before its rounding. Two steps, for the bits depend on it.
    n = 2 * 256 + 5  # a tail that ends inside a group of eight elements
    param, grad = torch.randn(n).bfloat16(), torch.randn(n)
    state = warm_state((n,), eight_bit=eight_bit)
    for step in (4, 5):
        o = options(weight_decay=0.1)
        exact, _ = updated(param.float(), grad, state, o, backend)
        got, state = updated(param, grad, state, replace(o, rounding_seed=seed), backend)
        expected = oracle.stochastic_bfloat16_bits(exact.numpy(), oracle.random_bits16(seed, step, n))
        assert np.array_equal(got.view(torch.int16).numpy().view(np.uint16), expected)
        param = got


def stochastic_results(backend: str, draws: int) -> tuple[Tensor, Tensor]:
    """The float32 result of an update, elements spread over the interval of two bfloat16, and ``draws`` roundings."""
    n = 4096
    param = torch.cat([torch.ones(n // 2), -torch.ones(n // 2)]).bfloat16()
    # Without momentum the direction is g / (|g| + eps): eps = 1 spreads it over (0, 0.5), and lr over half an ulp.
    grad = torch.linspace(0.001, 1.0, n)
    o = options(lr=2.0**-7, beta1=0.0, beta2=0.0, eps=1.0)
    state = AdamState.zeros((n,), eight_bit=False)
    exact, _ = updated(param.float(), grad, state, o, backend)
    drawn = [updated(param, grad, state, replace(o, rounding_seed=seed), backend)[0] for seed in range(draws)]
    return exact, torch.stack(drawn).float()


def test_stochastic_rounding_takes_one_of_two_neighbours_in_proportion(backend: str) -> None:
    draws = 200
    exact, drawn = stochastic_results(backend, draws)
    x, rounded = f64(exact), f64(drawn)
    ulp = tolerances.ulp(x, torch.bfloat16)
    towards_zero = np.trunc(x / ulp) * ulp
    away = towards_zero + np.sign(x) * ulp
    assert np.all((rounded == towards_zero) | (rounded == away))
    probability = np.abs(x - towards_zero) / ulp
    uncertain = (probability > 0.02) & (probability < 0.98)  # enough draws either way for the normal approximation
    assert uncertain.sum() > 3000
    counts = (rounded == away).sum(axis=0)[uncertain]
    p = probability[uncertain]
    z = (counts - draws * p) / np.sqrt(draws * p * (1 - p))
    # The sum of z^2 has mean n and standard deviation sqrt(2 n), nearly; 3.9 of them leave SIGNIFICANCE on both sides.
    assert abs(np.sum(z**2) - len(z)) < 3.9 * np.sqrt(2 * len(z))
    assert pytest.approx(1e-4) == tolerances.SIGNIFICANCE


def test_stochastic_rounding_keeps_the_mean_where_nearest_loses_it(backend: str) -> None:
    draws = 200
    exact, drawn = stochastic_results(backend, draws)
    x = f64(exact)
    ulp = tolerances.ulp(x, torch.bfloat16)
    fraction = np.abs(x / ulp - np.trunc(x / ulp))
    deviation = float(np.sqrt(np.sum(ulp**2 * fraction * (1 - fraction)) / draws))
    bias = float(np.sum(f64(drawn).mean(axis=0) - x))
    assert abs(bias) < 3.9 * deviation
    # Rounding to nearest is biased by much more than that in the same place.
    assert abs(np.sum(f64(exact.bfloat16()) - x)) > 100 * deviation


def test_stochastic_rounding_leaves_infinite_and_nan_weights(backend: str) -> None:
    param = torch.tensor([torch.inf, -torch.inf, torch.nan, 3.3895e38]).bfloat16()
    o = options(lr=0.0, rounding_seed=1)
    got, _ = updated(param, torch.zeros(4), AdamState.zeros((4,), eight_bit=True), o, backend)
    assert got[:2].tolist() == [torch.inf, -torch.inf]
    assert got[2].isnan()
    assert got[3] == param[3]


# --- strides


def strided_views() -> dict[str, tuple[Tensor, Tensor]]:
    """Name -> (buffer, view of it of shape (12, 40))."""
    return {
        "transposed": ((b := torch.randn(40, 12)), b.T),
        "every other column": ((b := torch.randn(12, 80)), b[:, ::2]),
        "inner part": ((b := torch.randn(14, 50)), b[1:13, 5:45]),
        "contiguous at an odd offset": ((b := torch.randn(12 * 40 + 3)), b[3:].view(12, 40)),
        "every other element": ((b := torch.randn(2 * 12 * 40)), b[::2].view(12, 40)),
    }


@pytest.mark.parametrize("eight_bit", [True, False])
@pytest.mark.parametrize("name", strided_views())
def test_strided_weights_are_updated_in_place_and_neighbours_left(backend: str, name: str, eight_bit: bool) -> None:
    buffer, view = strided_views()[name]
    state, grad, o = warm_state((12, 40), eight_bit=eight_bit), torch.randn(12, 40), options(weight_decay=0.1)
    expected, expected_state = updated(view.clone(), grad, state, o, backend)
    outside = torch.ones_like(buffer, dtype=torch.bool)
    outside.as_strided(view.shape, view.stride(), view.storage_offset()).fill_(False)
    before, address = buffer.clone(), view.data_ptr()
    adam8bit_update(view, grad, state, o, backend=backend)
    assert view.data_ptr() == address
    assert_same_bits(view, expected, "param")
    assert_same_state(state, expected_state)
    assert_same_bits(buffer[outside], before[outside], "what is not the parameter")


@pytest.mark.parametrize("name", [*strided_views(), "expanded"])  # sum().backward() gives an expanded gradient
def test_strided_gradients(backend: str, name: str) -> None:
    grad = torch.randn(12, 1).expand(12, 40) if name == "expanded" else strided_views()[name][1]
    param, state, o = torch.randn(12, 40), warm_state((12, 40), eight_bit=True), options()
    expected, expected_state = updated(param, grad.contiguous(), state, o, backend)
    got, got_state = updated(param, grad, state, o, backend)
    assert_same_bits(got, expected, "param")
    assert_same_state(got_state, expected_state)


def test_four_dimensions_in_channels_last(backend: str) -> None:
    shape = (4, 6, 5, 3)
    param, grad = torch.randn(shape), torch.randn(shape)
    state, o = warm_state(shape, eight_bit=True), options()
    expected, expected_state = updated(param, grad, state, o, backend)
    last = param.to(memory_format=torch.channels_last)
    adam8bit_update(last, grad.to(memory_format=torch.channels_last), state, o, backend=backend)
    assert_same_bits(last.contiguous(), expected, "param")
    assert_same_state(state, expected_state)


@pytest.mark.parametrize("eight_bit", [True, False])
def test_a_flat_state_serves_a_matrix(backend: str, eight_bit: bool) -> None:
    # The state's elements are counted, its shape is not looked at, whatever the strides of weight and gradient.
    param, grad, o = torch.randn(16, 24), torch.randn(24, 16).T, options()
    state = warm_state((16 * 24,), eight_bit=eight_bit)
    expected, expected_state = updated(param.flatten(), grad.flatten(), state, o, backend)
    got, got_state = updated(param.T.contiguous().T, grad, state, o, backend)
    assert_same_bits(got.flatten(), expected, "param")
    assert_same_state(got_state, expected_state)


# --- gradients that have no second moment, and found_inf

OVERFLOWING = [
    torch.nan,
    torch.inf,
    -torch.inf,
    1e25,  # finite, its square is not
    1.8446746e19,  # the first float32 whose square is not finite
]


@pytest.mark.parametrize("eight_bit", [True, False])
@pytest.mark.parametrize("value", OVERFLOWING)
@pytest.mark.parametrize("position", [0, 300, 512])  # the first, one in the middle, the only one of the last block
def test_an_unrepresentable_gradient_changes_only_the_count(
    backend: str, value: float, position: int, eight_bit: bool
) -> None:
    param, grad = torch.randn(513), torch.randn(513)
    grad[position] = value
    state = warm_state((513,), eight_bit=eight_bit)
    state.skipped.fill_(2)
    got, got_state = updated(param, grad, state, options(weight_decay=0.1), backend)
    assert_same_bits(got, param, "param")
    assert got_state.skipped.item() == 3
    assert_same_state(replace(got_state, skipped=state.skipped), state)


def test_the_gradient_scale_decides_what_is_representable(backend: str) -> None:
    param, state = torch.zeros(4), AdamState.zeros((4,), eight_bit=False)
    for grad, scale, skipped in (
        (1e25, 1e10, 0),  # 1e15
        (1e10, 1e-12, 1),  # 1e22
        (1.0, 0.0, 1),  # infinite
        (0.0, 0.0, 1),  # 0 / 0
        (1.0, torch.nan, 1),
    ):
        o = options(grad_scale=scale)
        got, got_state = updated(param, torch.full((4,), grad), state, o, backend)
        assert got_state.skipped.item() == skipped, (grad, scale)
        assert got.isfinite().all()
        assert bool(got.any()) == (skipped == 0)


@pytest.mark.parametrize("eight_bit", [True, False])
@pytest.mark.parametrize(
    "value",
    [
        1.8446743e19,  # the largest that has a square
        -1.8446743e19,
        1e-30,  # its square is zero in float32; the direction is 0.1 g / eps
        1e-36,  # beta's share of it is nearly denormal
    ],
)
def test_extreme_gradients_are_followed(backend: str, value: float, eight_bit: bool) -> None:
    param, state = torch.zeros(300), AdamState.zeros((300,), eight_bit=eight_bit)
    grad, o = torch.full((300,), value), options()
    w, _, _ = oracle.adam(f64(param), f64(grad), f64(param), f64(param), oracle_scalars(o, 1))
    got, got_state = updated(param, grad, state, o, backend)
    assert_close(got, w, tolerances.adam_weight(w, 1.0, 1, torch.float32) * np.abs(w), "param")
    assert (got_state.step.item(), got_state.skipped.item()) == (1, 0)
    m, v = moments(got_state)
    end = 1 + float(dynamic_map(True)[0]) if eight_bit and value < 0 else 0.0  # the signed map has no -1
    assert_close(m, 0.1 * f64(grad), (1e-6 + end) * np.abs(f64(grad)), "exp_avg")
    assert np.isfinite(v).all()


@pytest.mark.parametrize("eight_bit", [True, False])
def test_no_gradient_and_no_eps_leave_the_weight(backend: str, eight_bit: bool) -> None:
    # 0 / 0 in the formula.
    param, state = torch.randn(300), AdamState.zeros((300,), eight_bit=eight_bit)
    got, got_state = updated(param, torch.zeros(300), state, options(eps=0.0), backend)
    assert_same_bits(got, param, "param")
    assert got_state.step.item() == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_found_inf_changes_nothing_at_all(backend: str, dtype: torch.dtype) -> None:
    param, state = torch.randn(300), warm_state((300,), eight_bit=True)
    for grad in (torch.randn(300), torch.full((300,), torch.nan)):  # a NaN isn't counted either
        o = replace(options(weight_decay=0.1), found_inf=torch.tensor(1.0, dtype=dtype))
        got, got_state = updated(param, grad, state, o, backend)
        assert_same_bits(got, param, "param")
        assert_same_state(got_state, state)


def test_found_inf_of_zero_is_no_obstacle(backend: str) -> None:
    param, grad, state = torch.randn(300), torch.randn(300), warm_state((300,), eight_bit=True)
    expected, expected_state = updated(param, grad, state, options(), backend)
    # GradScaler's found_inf and scale have one element, not always no dimension.
    o = replace(options(), found_inf=torch.zeros(1), grad_scale=torch.ones(1))
    got, got_state = updated(param, grad, state, o, backend)
    assert_same_bits(got, expected, "param")
    assert_same_state(got_state, expected_state)


# --- the known defect of 8-bit Adam: second moments that round to zero


def largest_update_over_lr(gradients: list[Tensor], *, positive_stays_positive: bool) -> float:
    """The largest |change| / lr of any weight in any step of 8-bit Adam, in float64 but for the codes."""
    n = gradients[0].numel()
    maps = dynamic_map(True).numpy(), dynamic_map(False).numpy()
    m, v, largest = np.zeros(n), np.zeros(n), 0.0
    for step, grad in enumerate(gradients, start=1):
        w, m, v = oracle.adam(np.zeros(n), f64(grad), m, v, oracle.Adam(step=step, lr=1.0))
        largest = max(largest, float(np.abs(w).max()))
        m = oracle.dequantize(*oracle.quantize(m, maps[0]), maps[0])
        v = oracle.dequantize(*oracle.quantize(v, maps[1], positive_stays_positive=positive_stays_positive), maps[1])
    return largest


def gradients_of_two_scales(then: float) -> list[Tensor]:
    """Half of each block has gradients 1e4 times the other half's; after ten steps all are scaled by ``then``."""
    scales = torch.where(torch.arange(512) % 2 == 0, 1.0, 1e-4)
    rng = torch.Generator().manual_seed(3)
    return [scales * torch.randn(512, generator=rng) * (1.0 if step < 10 else then) for step in range(20)]


@pytest.mark.parametrize("then", [1.0, 1e-3, 0.0])  # gradients go on, become small, vanish
def test_second_moments_that_rounded_to_zero_made_updates_hundreds_of_lr_large(backend: str, then: float) -> None:
    gradients = gradients_of_two_scales(then)
    lr = 2.0**-10  # a power of two, and weights that stay near zero: what the weights moved by is exact
    param, state = torch.zeros(512), AdamState.zeros((512,), eight_bit=True)
    largest = 0.0
    for grad in gradients:
        param.zero_()
        adam8bit_update(param, grad, state, options(lr=lr), backend=backend)
        largest = max(largest, float(param.abs().max()) / lr)
    assert largest <= tolerances.LARGEST_8BIT_DIRECTION
    # The same computation with the nearest code, be it zero, and with ours: that rule alone makes the difference.
    assert largest_update_over_lr(gradients, positive_stays_positive=False) > 100
    ours = largest_update_over_lr(gradients, positive_stays_positive=True)
    assert largest == pytest.approx(ours, rel=0.05)  # float64 moments may take other codes than float32 ones


# --- the state before the first step


@pytest.mark.parametrize("shape", [(0,), (1,), (16, 17), (4, 5, 6)])
def test_the_zero_state_is_zero(shape: tuple[int, ...]) -> None:
    for eight_bit in (True, False):
        state = AdamState.zeros(shape, eight_bit=eight_bit)
        m, v = moments(state)
        assert m.shape == v.shape == shape
        assert not m.any()
        assert not v.any()
        assert (state.step.item(), state.skipped.item()) == (0.0, 0)
        assert (state.exp_avg_absmax is not None) == eight_bit
