"""csrc/core/adam.h, csrc/cpu/adam_update.h: bitwise against a restatement in numpy float32."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from native_calls import (
    DTYPE_CODES,
    FloatArray,
    Scalars,
    State,
    adam_update,
    bits,
    dequantized,
    lowrank_adam,
    quantize,
    random_state,
)
from torch import Tensor

from galore_kernels import _native

LARGEST_GRADIENT = 1.8446743e19  # the largest float32 whose square is finite

SIZES = pytest.mark.parametrize("n", [1, 7, 255, 256, 257, 20000])  # around one block; more than one task of blocks
MOMENTS = pytest.mark.parametrize("eight_bit", [False, True], ids=["fp32 moments", "8-bit moments"])


def numpy_adam(
    grad: FloatArray, m: FloatArray, v: FloatArray, scalars: Scalars
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """m, v, u with every float32 operation rounded by itself."""
    f32 = np.float32
    g: FloatArray = grad * f32(scalars.inv_grad_scale)
    if scalars.maximize:
        g = -g
    m = f32(scalars.beta1) * m + f32(1 - scalars.beta1) * g
    v = f32(scalars.beta2) * v + f32(1 - scalars.beta2) * (g * g)
    denominator = np.sqrt(v) + f32(scalars.eps)
    u = np.divide(m, denominator, out=np.zeros_like(m), where=denominator != 0)
    return m, v, u


def numpy_weight(w: FloatArray, x: FloatArray, scalars: Scalars, scale: float = 1.0) -> FloatArray:
    t = scalars.step + 1
    step_size = scalars.lr * math.sqrt(1 - scalars.beta2**t) / (1 - scalars.beta1**t) * scale
    return (w - np.float32(step_size) * x) * np.float32(1 - scalars.lr * scalars.weight_decay)


def check_state(state: State, m: FloatArray, v: FloatArray) -> None:
    """The stored moments are exactly m and v, or exactly their codes."""
    if state.m_absmax is None or state.v_absmax is None:
        np.testing.assert_array_equal(bits(state.m), m.view(np.uint32))
        np.testing.assert_array_equal(bits(state.v), v.view(np.uint32))
        return
    for codes, absmax, exact, signed in ((state.m, state.m_absmax, m, True), (state.v, state.v_absmax, v, False)):
        expected_codes, expected_absmax = quantize(torch.from_numpy(exact), signed=signed)
        assert torch.equal(absmax, expected_absmax)
        assert torch.equal(codes, expected_codes)


def random_gradient(n: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(n)
    decades = torch.empty(n).uniform_(-3, 0, generator=generator)
    return (torch.randn(n, generator=generator) * 10**decades).to(dtype)


def check_update(
    n: int, scalars: Scalars, *, eight_bit: bool, param_dtype: torch.dtype, grad_dtype: torch.dtype
) -> None:
    state = random_state(n, eight_bit=eight_bit, generator=torch.Generator().manual_seed(n + 1))
    grad = random_gradient(n, grad_dtype)
    param = random_gradient(n + 2)[:n].to(param_dtype)
    m, v, u = numpy_adam(grad.float().numpy(), *dequantized(state), scalars)
    expected = torch.from_numpy(numpy_weight(param.float().numpy(), u, scalars)).to(param_dtype)
    adam_update(param, grad, state, scalars)
    assert torch.equal(param, expected)
    check_state(state, m, v)


@SIZES
@MOMENTS
def test_every_size(n: int, eight_bit: bool) -> None:
    check_update(n, Scalars(), eight_bit=eight_bit, param_dtype=torch.float32, grad_dtype=torch.float32)


@MOMENTS
@pytest.mark.parametrize("param_dtype", list(DTYPE_CODES), ids=str)
@pytest.mark.parametrize("grad_dtype", list(DTYPE_CODES), ids=str)
def test_every_pair_of_dtypes(param_dtype: torch.dtype, grad_dtype: torch.dtype, eight_bit: bool) -> None:
    check_update(1003, Scalars(), eight_bit=eight_bit, param_dtype=param_dtype, grad_dtype=grad_dtype)


@MOMENTS
@pytest.mark.parametrize(
    "scalars",
    [
        Scalars(step=0),  # the strongest bias correction
        Scalars(step=100_000),  # none left
        Scalars(weight_decay=0.0),
        Scalars(weight_decay=10.0, lr=0.3),  # a negative factor: nothing may assume it to be below 1 and positive
        Scalars(beta1=0.0, beta2=0.0),  # no memory
        Scalars(beta1=0.5, beta2=0.9999),
        Scalars(eps=0.1),  # of the size of sqrt(v): its place shows
        Scalars(eps=0.0),
        Scalars(maximize=True),
        Scalars(inv_grad_scale=1 / 65536),
        Scalars(inv_grad_scale=1 / 3, maximize=True),  # not a power of two: the rounding of the product shows
        Scalars(lr=0.0),
    ],
    ids=str,
)
def test_every_scalar(scalars: Scalars, eight_bit: bool) -> None:
    check_update(1003, scalars, eight_bit=eight_bit, param_dtype=torch.float32, grad_dtype=torch.float32)


@MOMENTS
def test_extreme_gradients(eight_bit: bool) -> None:
    """From denormal to the largest allowed, in one tensor; the second moment covers 1e-45 .. 3.4e38."""
    grad = torch.tensor([1e-45, 1e-30, 1e-20, 1.0, 1e10, LARGEST_GRADIENT, -LARGEST_GRADIENT, 0.0]).repeat(100)
    state = random_state(800, eight_bit=eight_bit, generator=torch.Generator().manual_seed(0))
    m, v, u = numpy_adam(grad.numpy(), *dequantized(state), Scalars())
    param = torch.ones(800)
    expected = numpy_weight(param.numpy(), u, Scalars())
    adam_update(param, grad, state, Scalars())
    np.testing.assert_array_equal(param.numpy(), expected)
    assert param.isfinite().all()
    check_state(state, m, v)


def test_zero_denominator_moves_nothing() -> None:
    """eps 0 and no gradient yet: 0 / 0 counts as 0, not NaN."""
    state = State(torch.zeros(300), torch.zeros(300), None, None)
    param = torch.ones(300)
    adam_update(param, torch.zeros(300), state, Scalars(eps=0.0, weight_decay=0.0))
    assert param.eq(1).all()


def test_direction_comes_from_the_moments_before_they_are_rounded() -> None:
    """An element far below its block's largest: its code is off by tens of percent, its update must not be."""
    grad = torch.full((256,), 3.3e-4)
    grad[0] = 1.0
    state = State(torch.full((256,), 127, dtype=torch.uint8), torch.zeros(256, dtype=torch.uint8), *torch.zeros(2, 1))
    param = torch.zeros(256)
    adam_update(param, grad, state, Scalars(step=0, lr=1.0, eps=0.0, weight_decay=0.0))
    torch.testing.assert_close(param, -torch.ones(256), rtol=1e-6, atol=0)


@SIZES
@MOMENTS
def test_lowrank_adam_leaves_the_direction_in_place(n: int, eight_bit: bool) -> None:
    scalars = Scalars(maximize=True)
    state = random_state(n, eight_bit=eight_bit, generator=torch.Generator().manual_seed(n + 1))
    lowrank = random_gradient(n)
    m, v, u = numpy_adam(lowrank.numpy(), *dequantized(state), scalars)
    lowrank_adam(lowrank, state, scalars)
    np.testing.assert_array_equal(bits(lowrank), u.view(np.uint32))
    check_state(state, m, v)


def test_lowrank_adam_does_not_scale_what_project_has_scaled() -> None:
    states = [random_state(300, eight_bit=True, generator=torch.Generator().manual_seed(0)) for _ in range(2)]
    directions = [random_gradient(300) for _ in range(2)]
    lowrank_adam(directions[0], states[0], Scalars(inv_grad_scale=1.0))
    lowrank_adam(directions[1], states[1], Scalars(inv_grad_scale=0.125))
    assert torch.equal(directions[0], directions[1])


@pytest.mark.parametrize("dtype", list(DTYPE_CODES), ids=str)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("position", [0, 255, 256, 20001])  # first, either side of a block's edge, last (a tail)
def test_non_finite_gradients_are_found(position: int, bad: float, dtype: torch.dtype) -> None:
    grad = random_gradient(20002, dtype)
    assert representable(grad)
    grad[position] = bad
    assert not representable(grad)


def representable(grad: Tensor, inv_grad_scale: float = 1.0, threads: int = 1) -> bool:
    return _native.all_representable(
        grad.data_ptr(), DTYPE_CODES[grad.dtype], grad.numel(), inv_grad_scale=inv_grad_scale, threads=threads
    )


def test_representable_up_to_the_last_float() -> None:
    limit = torch.tensor(LARGEST_GRADIENT)
    assert limit.square().isfinite()
    above = torch.nextafter(limit, torch.tensor(torch.inf))
    assert above.square().isinf()
    assert representable(-limit.repeat(3))
    assert not representable(torch.stack([limit, -above]))
    assert representable(above, inv_grad_scale=0.5)  # what counts is the scaled gradient
    assert not representable(limit, inv_grad_scale=2.0)
    assert representable(torch.empty(0))
