"""Adafactor's projected steps on the backends of devices: their kernels around torch's operations on R.

On a GPU they run there, else the CPU executes the CUDA kernels, and Triton its interpreter.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import tolerances
import torch
from optimizer_cases import make_params, set_grads
from stand_ins import DEVICE_BACKENDS, serving, stand_in
from test_adafactor_update import (
    CASES,
    FIXED,
    SIDES,
    Problem,
    assert_same_state,
    check_against_float64,
    clone,
    full_rank,
    projected,
    tensors,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from update_cases import assert_same_bits

from galore_kernels import GaLoreFusedAdafactor, ops
from galore_kernels.backends import pipeline as pipeline_module
from galore_kernels.backends.reference.adafactor import norm_by_rows
from galore_kernels.backends.reference.adafactor_update import adafactor_update
from galore_kernels.ops import registry
from galore_kernels.quantizers import BASIS_FORMATS, quantize_basis, quantize_weight

F32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16

SHAPES = [  # rows, columns, rank
    (1, 1, 1),
    (37, 53, 5),  # multiples of nothing
    (40, 600, 17),  # a short dimension of several tiles on the left, long indices of several on the right
    (136, 200, 64),  # vectors everywhere
]


@pytest.fixture(params=DEVICE_BACKENDS)
def device_backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The name of each device's backend in turn, which serves CPU tensors during the test."""
    with serving(request.param) as name:
        yield name


# --- against float64


@pytest.mark.parametrize("dtype", [F32, BF16, FP16])
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_follows_the_paper(
    device_backend: str, shape: tuple[int, int, int], side: str, dtype: torch.dtype
) -> None:
    for beta1 in (None, 0.9):
        p = projected(*shape, side, dtypes=(dtype, dtype), beta1=beta1, **FIXED, weight_decay=0.1)
        check_against_float64(p, device_backend)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("side", SIDES)
def test_every_option_follows_the_paper(device_backend: str, side: str, case: str) -> None:
    for step in (0, 3, 20000):
        check_against_float64(projected(37, 53, 5, side, step=step, **CASES[case]), device_backend)


@pytest.mark.parametrize("side", SIDES)
def test_both_sides_projected_follow_the_paper(device_backend: str, side: str) -> None:
    for dtype in (F32, BF16):
        p = projected(37, 53, 5, side, dtypes=(dtype, dtype), long_rank=4, **FIXED, beta1=0.5, grad_scale=3.0)
        check_against_float64(p, device_backend)


# --- against the reference


def assert_nearly(got: Problem, expected: Problem, *, rtol: float = 1e-5, atol: float = 1e-6) -> None:
    torch.testing.assert_close(got.param, expected.param, rtol=rtol, atol=atol)
    for name, tensor in tensors(expected.state).items():
        torch.testing.assert_close(tensors(got.state)[name], tensor, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("long_rank", [None, 4])
@pytest.mark.parametrize("side", SIDES)
def test_a_gradient_that_is_projected_already(device_backend: str, side: str, long_rank: int | None) -> None:
    p = projected(37, 53, 5, side, long_rank=long_rank, beta1=0.9, grad_scale=2.0, maximize=True, weight_decay=0.1)
    assert p.basis is not None
    lowrank = torch.randn(p.state.exp_avg.shape) if p.state.exp_avg is not None else torch.zeros(0)
    results = []
    for backend in (device_backend, "reference"):
        q = replace(p, param=p.param.clone(), state=clone(p.state))
        ops.lowrank_adafactor_update(
            q.param,
            lowrank,
            p.basis,
            q.state,
            p.options,
            side=side,
            scale=p.scale,
            long_basis=p.long_basis,
            backend=backend,
        )
        results.append(q)
    assert float((results[1].param - p.param).abs().max()) > 1e-3
    assert_nearly(*results)


@pytest.mark.parametrize("basis_format", BASIS_FORMATS)
@pytest.mark.parametrize("side", SIDES)
def test_quantized_bases(device_backend: str, side: str, basis_format: str) -> None:
    for rank in (5, 16):  # an odd number of 4-bit codes; whole vectors
        p = projected(70, 130, rank, side, **FIXED, weight_decay=0.1)
        assert p.basis is not None
        p.basis, p.basis_scale = quantize_basis(torch.linalg.qr(p.basis).Q, basis_format)
        expected = p.solved("reference")
        assert float((expected.param - p.param).abs().max()) > 1e-3
        assert_nearly(p.solved(device_backend), expected)


@pytest.mark.parametrize("scalars", [FIXED, {}], ids=["given", "by the weight's size"])
@pytest.mark.parametrize("side", SIDES)
def test_int8_weights_take_the_reference_s_codes(device_backend: str, side: str, scalars: dict[str, Any]) -> None:
    p = projected(70, 300, 8, side, rounding_seed=11, **{**scalars, "weight_decay": 0.1})
    codes, scale = quantize_weight(p.param)
    p = replace(p, param=codes, weight_scale=scale, scale=4.0)
    got, expected = p.solved(device_backend), p.solved("reference")
    assert got.weight_scale is not None
    assert expected.weight_scale is not None
    differ = (got.param != expected.param).float().sum()
    assert differ <= (1 - tolerances.EQUAL_INT8_CODES) * codes.numel()
    assert (got.param.int() - expected.param.int()).abs().max() <= 1
    assert (expected.param != codes).float().mean() > 0.1
    torch.testing.assert_close(got.weight_scale, expected.weight_scale, rtol=1e-5, atol=0)


def test_stochastic_rounding_takes_the_reference_s_bits(device_backend: str) -> None:
    p = projected(70, 304, 8, "left", dtypes=(BF16, BF16), **{**FIXED, "lr": 0.3}, rounding_seed=11)
    got, expected = p.solved(device_backend).param, p.solved("reference").param
    assert (got == expected).float().mean() > 0.999
    nearest = replace(p, options=replace(p.options, rounding_seed=None)).solved(device_backend)
    assert (got == nearest.param).float().mean() < 0.9


def test_strides_change_nothing(device_backend: str) -> None:
    p = projected(37, 53, 5, "right", **FIXED)
    expected = p.solved(device_backend)
    wide = torch.full((37, 106), 3.0)
    wide[:, ::2] = p.param
    strided = replace(p, param=wide[:, ::2], grad=p.grad.T.contiguous().T, state=clone(p.state))
    strided.run(device_backend)
    assert_same_bits(strided.param.contiguous(), expected.param, "param")
    assert (wide[:, 1::2] == 3.0).all()


# --- what changes nothing


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e22])
def test_a_gradient_that_is_not_representable(device_backend: str, value: float) -> None:
    for side in SIDES:
        for long_rank in (None, 4):
            p = projected(37, 53, 5, side, beta1=0.9, long_rank=long_rank)
            p.grad[5, 7] = value
            assert_skipped(p, device_backend)


def assert_skipped(p: Problem, backend: str) -> None:
    got = p.solved(backend)
    assert_same_bits(got.param, p.param, "param")
    assert_same_state(got.state, replace(p.state, skipped=torch.tensor(1)))


def test_squares_whose_sum_overflows(device_backend: str) -> None:
    p = projected(37, 53, 5, "right")
    assert p.basis is not None
    lowrank = torch.randn(37, 5)
    lowrank[5] = 1.5e19  # each is representable, the sum of their squares is not
    got = replace(p, param=p.param.clone(), state=clone(p.state))
    ops.lowrank_adafactor_update(
        got.param, lowrank, p.basis, got.state, p.options, side="right", scale=0.25, backend=device_backend
    )
    assert_same_bits(got.param, p.param, "param")
    assert_same_state(got.state, replace(p.state, skipped=torch.tensor(1)))


@pytest.mark.parametrize("value", [1.0, 0.5, float("nan")])
def test_found_inf_changes_nothing_at_all(device_backend: str, value: float) -> None:
    for bad in (False, True):
        p = projected(37, 53, 5, "right")
        if bad:
            p.grad[0, 0] = float("nan")
        got = replace(p, options=replace(p.options, found_inf=torch.tensor([value]))).solved(device_backend)
        assert_same_bits(got.param, p.param, "param")
        assert_same_state(got.state, p.state)
    fine = replace(p, grad=torch.ones_like(p.grad), options=replace(p.options, found_inf=torch.zeros(1)))
    assert fine.solved(device_backend).state.step == p.state.step + 1


def test_an_empty_matrix_takes_its_step(device_backend: str) -> None:
    for shape in ((0, 5, 2), (5, 0, 2)):
        p = projected(*shape, "right")
        assert_same_state(p.solved(device_backend).state, replace(p.state, step=p.state.step + 1))
        stopped = replace(p, options=replace(p.options, found_inf=torch.ones(())))
        assert_same_state(stopped.solved(device_backend).state, p.state)


def test_nothing_has_changed_where_memory_runs_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*args: object) -> Tensor:
        raise MemoryError

    for name in ("adafactor_step", "LongSide", "new_control"):
        p = projected(37, 53, 5, "right", long_rank=4)
        got = replace(p, param=p.param.clone(), state=clone(p.state))
        with monkeypatch.context() as patch, serving("cuda") as backend:
            patch.setattr(pipeline_module, name, no_memory)
            with pytest.raises(MemoryError):
                got.run(backend)
        assert_same_bits(got.param, p.param, "param")
        assert_same_state(got.state, p.state)


# --- nothing is read back


class _NothingReadBack(TorchDispatchMode):
    """Fails where a tensor's value is asked for: on a device the host would wait for it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.name() not in ("aten::_local_scalar_dense", "aten::equal", "aten::nonzero"), func
        return func(*args, **(kwargs or {}))


def _arguments(p: Problem) -> tuple[Any, ...]:
    return p.param, p.grad, p.basis, p.long_basis, p.basis_scale, p.state, p.options, p.side, p.scale, p.weight_scale


@pytest.mark.skipif(torch.cuda.is_available(), reason="the stand-ins copy to and from the device")
def test_no_value_is_read_back() -> None:
    backend = stand_in("cuda")
    p = projected(37, 300, 5, "left", long_rank=4, beta1=0.9, grad_scale=2.0, weight_decay=0.1)
    p.options = replace(p.options, found_inf=torch.zeros(()))
    codes, scale = quantize_weight(p.param)
    o = replace(p.options, rounding_seed=3)
    int8 = replace(p, param=codes, weight_scale=scale, options=o, state=clone(p.state))
    quantized = projected(37, 53, 5, "right")
    assert quantized.basis is not None
    quantized.basis, quantized.basis_scale = quantize_basis(torch.linalg.qr(quantized.basis).Q, "int4")
    wide = full_rank((37, 53), dtypes=(BF16, BF16), rounding_seed=5)
    wide.options = replace(wide.options, found_inf=torch.zeros(()))
    with _NothingReadBack():
        for each in (p, int8, quantized):
            backend.kernels["galore_adafactor_update"](*_arguments(each))
        adafactor_update(wide.param, wide.grad, wide.state, wide.options)
    assert [float(each.state.step) for each in (p, int8, quantized, wide)] == [4.0] * 4
    with _NothingReadBack(), pytest.raises(AssertionError):
        float(torch.ones(()))


def test_a_size_by_rows_is_as_precise_as_a_step_needs() -> None:
    for x in (3 * torch.randn(40, 1030), torch.randn(7).bfloat16(), torch.tensor(-2.0), torch.zeros(0, 5)):
        assert float(norm_by_rows(x)) == pytest.approx(float(x.double().norm()), rel=1e-6)


# --- the optimizer


def test_an_optimizer_of_both_kinds_of_weights(device_backend: str) -> None:
    runs = []
    for backend in (device_backend, "reference"):
        params = make_params()
        optimizer = GaLoreFusedAdafactor(params.values(), rank=8, update_proj_gap=3, backend=backend)
        for step in range(4):
            set_grads(params, step)
            optimizer.step()
        runs.append(params)
        assert f"backend {backend}" in repr(optimizer)
    for name, param in runs[0].items():
        torch.testing.assert_close(param, runs[1][name], rtol=1e-4, atol=1e-5)


def test_who_serves_what(device_backend: str) -> None:
    cpu = torch.device("cpu")
    assert registry.select("galore_adafactor_update", device_backend, cpu).name == device_backend
    with pytest.raises(RuntimeError, match=f"{device_backend}: it does not implement adafactor_update"):
        registry.select("adafactor_update", device_backend, cpu)
    full = full_rank((7,), **FIXED)
    with pytest.raises(RuntimeError, match="it does not implement adafactor_update"):
        full.run(device_backend)
