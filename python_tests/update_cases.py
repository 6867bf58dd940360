"""Inputs of the update operations' tests: weights, gradients, warm states, and comparison to the bit."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import numpy as np
import oracle
import torch
from torch import Tensor

from galore_kernels import ops
from galore_kernels.ops import AdamOptions, AdamState
from galore_kernels.quantizers import dynamic_map

#: Every backend; those of devices are stood in for where there is none (``stand_ins.py``).
BACKENDS = ["cpu", "cuda", "triton", "reference"]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]

#: Adam's scalars, each set with the reason why it is tried.
HYPERPARAMETERS: dict[str, dict[str, Any]] = {
    "usual": {},
    "decay": {"weight_decay": 0.1},  # its order and its factor lr
    "large eps": {"eps": 0.3},  # as large as sqrt(v), so that its place shows
    "no eps": {"eps": 0.0},
    "no momentum": {"beta1": 0.0},  # the bias correction's 0^t
    "no memory": {"beta1": 0.0, "beta2": 0.0},  # the update is the gradient's sign
    "other betas": {"beta1": 0.7, "beta2": 0.95},  # neither is near its default, nor to the other
    "maximize": {"maximize": True, "weight_decay": 0.1},  # ascends, and still decays
    "power-of-two scale": {"grad_scale": 1024.0},  # GradScaler's, exact
    "odd scale": {"grad_scale": 3.0, "weight_decay": 0.1, "maximize": True},  # 1/3 is rounded
}


def options(lr: float = 1e-2, *, lr_dtype: torch.dtype = torch.float32, **scalars: Any) -> AdamOptions:
    """AdamOptions from plain numbers."""
    grad_scale = scalars.pop("grad_scale", None)
    scale = None if grad_scale is None else torch.tensor(float(grad_scale))
    return AdamOptions(torch.tensor(lr, dtype=lr_dtype), grad_scale=scale, **scalars)


def oracle_scalars(o: AdamOptions, step: int) -> oracle.Adam:
    """The same for the oracle; ``step`` counts from 1."""
    return oracle.Adam(
        step=step,
        lr=float(o.lr),
        beta1=o.beta1,
        beta2=o.beta2,
        eps=o.eps,
        weight_decay=o.weight_decay,
        maximize=o.maximize,
        grad_scale=1.0 if o.grad_scale is None else float(o.grad_scale),
    )


def f64(x: Tensor) -> oracle.Array:
    """Float64 NumPy copy."""
    return x.detach().double().numpy().copy()


def warm_state(shape: tuple[int, ...], *, eight_bit: bool, seed: int = 1, step: int = 3) -> AdamState:
    """A state as after ``step`` updates with gradients of size about 1 in every element."""
    rng = torch.Generator().manual_seed(seed)
    m = 0.3 * torch.randn(shape, generator=rng)
    v = 0.003 * (0.2 + torch.rand(shape, generator=rng))
    state = AdamState.zeros(shape, eight_bit=eight_bit)
    state.step.fill_(step)
    if not eight_bit:
        return replace(state, exp_avg=m, exp_avg_sq=v)
    m_codes, m_absmax = ops.quantize_blockwise(m, True, backend="reference")
    v_codes, v_absmax = ops.quantize_blockwise(v, False, backend="reference")
    return replace(state, exp_avg=m_codes, exp_avg_absmax=m_absmax, exp_avg_sq=v_codes, exp_avg_sq_absmax=v_absmax)


def moments(state: AdamState) -> tuple[oracle.Array, oracle.Array]:
    """Both moments in float64, decoded by the oracle if they are 8-bit."""
    if state.exp_avg_absmax is None or state.exp_avg_sq_absmax is None:
        return f64(state.exp_avg), f64(state.exp_avg_sq)
    m = oracle.dequantize(state.exp_avg.numpy(), state.exp_avg_absmax.numpy(), dynamic_map(True).numpy())
    v = oracle.dequantize(state.exp_avg_sq.numpy(), state.exp_avg_sq_absmax.numpy(), dynamic_map(False).numpy())
    return m, v


def tensors(state: AdamState) -> dict[str, Tensor]:
    """The state's tensors by name."""
    named = {field.name: getattr(state, field.name) for field in fields(state)}
    return {name: tensor for name, tensor in named.items() if tensor is not None}


def clone(state: AdamState) -> AdamState:
    """A state of its own memory."""
    return replace(state, **{name: tensor.clone() for name, tensor in tensors(state).items()})


def bits(x: Tensor) -> Tensor:
    """The tensor's bits as integers, so that NaN equals itself and -0.0 differs from 0.0."""
    return x.detach().view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def assert_same_bits(got: Tensor, expected: Tensor, what: str) -> None:
    """Fails unless dtype, shape and every bit agree."""
    assert (got.dtype, got.shape) == (expected.dtype, expected.shape), what
    wrong = int((bits(got) != bits(expected)).sum())
    assert wrong == 0, f"{what}: {wrong} of {got.numel()} elements differ"


def assert_same_state(got: AdamState, expected: AdamState) -> None:
    """Fails unless every tensor of both states agrees to the bit."""
    assert tensors(got).keys() == tensors(expected).keys()
    for name, tensor in tensors(expected).items():
        assert_same_bits(tensors(got)[name], tensor, name)


def assert_almost_same(param: Tensor, state: AdamState, expected: Tensor, expected_state: AdamState, what: str) -> None:
    """Fails unless they agree but for the order in which a matrix product was summed; of 8-bit states and bf16."""
    for name, tensor in tensors(expected_state).items():
        if tensor.dtype == torch.uint8:
            assert_codes_almost_equal(tensors(state)[name].cpu(), tensor.cpu(), 0.999, f"{what}: {name}")
    apart = (param.float() - expected.float()).abs()
    wrong = int((apart > 2 * torch.finfo(param.dtype).eps * expected.float().abs().clamp_min(1e-3)).sum())
    assert wrong == 0, f"{what}: {wrong} of {param.numel()} weights differ by more than two ulps"


def assert_close(got: Tensor | oracle.Array, expected: oracle.Array, bound: oracle.Array | float, what: str) -> None:
    """Fails unless |got - expected| <= bound everywhere."""
    values = f64(got) if isinstance(got, Tensor) else got
    assert values.shape == expected.shape, what
    excess = np.abs(values - expected) - bound
    worst = float(excess.max(initial=0.0))
    assert not np.isnan(values).any(), f"{what}: NaN"
    assert worst <= 0, f"{what}: {int((excess > 0).sum())} of {values.size} beyond the bound, worst by {worst:.3g}"


def assert_codes_almost_equal(got: Tensor, expected: Tensor | oracle.Array, share: float, what: str) -> None:
    """Fails unless ``share`` of the codes agree and the others are neighbours."""
    other = expected.numpy() if isinstance(expected, Tensor) else expected
    distance = np.abs(got.numpy().astype(np.int16) - other.astype(np.int16))
    equal = float((distance == 0).mean()) if distance.size else 1.0
    assert distance.max(initial=0) <= 1, f"{what}: codes {int(distance.max())} apart"
    # One neighbour is allowed in samples too small to hold a thousandth of a code.
    assert (distance != 0).sum() <= max(1.0, (1 - share) * distance.size), f"{what}: only {equal:.4%} of codes equal"
