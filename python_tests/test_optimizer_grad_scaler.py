"""``torch.amp.GradScaler``: the optimizer takes ``grad_scale`` and ``found_inf`` itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from optimizer_cases import (
    EVERY_OPTIMIZER,
    OPTIONS,
    OptimizerClass,
    assert_same_snapshot,
    make_params,
    set_grads,
    snapshot,
    train,
)
from torch import nn

from galore_kernels import GaLoreFusedAdam8bit
from galore_kernels.optim.base import LowRankOptimizer

SCALE = 2.0**7  # a power of two: scaling and unscaling are exact


def scaled_grads(params: dict[str, nn.Parameter], step: int, factor: float = SCALE) -> None:
    set_grads(params, step)
    for param in params.values():
        assert param.grad is not None
        param.grad *= factor


def scaler_of(scale: float = SCALE) -> torch.amp.GradScaler:
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1000)
    scaler.scale(torch.zeros(()))  # creates its tensors
    return scaler


@pytest.mark.parametrize("optimizer_class", EVERY_OPTIMIZER)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_scaled_gradients_give_the_unscaled_run(
    backend: str, optimizer_class: OptimizerClass, dtype: torch.dtype
) -> None:
    # float16 gradients are what GradScaler is for; torch's own unscale_ refuses them.
    options: dict[str, Any] = {**OPTIONS, "backend": backend}
    params, plain_params = make_params(dtype=dtype), make_params(dtype=dtype)
    optimizer, plain = optimizer_class(params.values(), **options), optimizer_class(plain_params.values(), **options)
    scaler = scaler_of()
    for step in range(5):
        scaled_grads(params, step)
        scaler.step(optimizer)
        scaler.update()
    train(plain, plain_params, range(5))
    assert_same_snapshot(snapshot(optimizer, params), snapshot(plain, plain_params))
    assert scaler.get_scale() == SCALE


@pytest.mark.parametrize("overflow_at", [0, 2, 3])  # the first step, any step, a refresh
def test_an_overflow_changes_nothing_and_is_not_counted(backend: str, overflow_at: int) -> None:
    params, plain_params = make_params(), make_params()
    options: dict[str, Any] = {**OPTIONS, "backend": backend}
    optimizer = GaLoreFusedAdam8bit(params.values(), **options)
    plain = GaLoreFusedAdam8bit(plain_params.values(), **options)
    scaler = scaler_of()
    for step in range(5):
        if step == overflow_at:
            before = snapshot(optimizer, params)
            scaled_grads(params, 99)
            grad = params["small"].grad
            assert grad is not None
            grad[0, 0] = torch.inf  # one parameter's overflow stops them all
            scaler.step(optimizer)
            scaler.update()
            assert scaler.get_scale() == SCALE / 2
            assert_same_snapshot(snapshot(optimizer, params), before)
            assert optimizer.skipped_steps() == {}
        scaled_grads(params, step, scaler.get_scale())
        scaler.step(optimizer)
        scaler.update()
    train(plain, plain_params, range(5))
    assert_same_snapshot(snapshot(optimizer, params), snapshot(plain, plain_params))


def test_unscale_then_clip(backend: str) -> None:
    params, plain_params = make_params(), make_params()
    options: dict[str, Any] = {**OPTIONS, "backend": backend}
    optimizer = GaLoreFusedAdam8bit(params.values(), **options)
    plain = GaLoreFusedAdam8bit(plain_params.values(), **options)
    scaler = scaler_of()
    for step in range(4):
        scaled_grads(params, step)
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(params.values(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        set_grads(plain_params, step)
        assert float(nn.utils.clip_grad_norm_(plain_params.values(), 1.0)) == float(norm) > 1.0
        plain.step()
    assert_same_snapshot(snapshot(optimizer, params), snapshot(plain, plain_params))


def test_a_disabled_scaler(backend: str) -> None:
    params, plain_params = make_params(), make_params()
    optimizer = GaLoreFusedAdam8bit(params.values(), **OPTIONS, backend=backend)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    set_grads(params, 0)
    scaler.step(optimizer)
    plain = GaLoreFusedAdam8bit(plain_params.values(), **OPTIONS, backend=backend)
    train(plain, plain_params, [0])
    assert_same_snapshot(snapshot(optimizer, params), snapshot(plain, plain_params))


def test_a_step_that_failed_under_a_scaler_is_not_unscaled_twice_by_the_retry(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # GradScaler leaves its attributes on an optimizer whose step raised, and multiplies into them the next time.
    params, plain_params = make_params(), make_params()
    optimizer = GaLoreFusedAdam8bit(params.values(), **OPTIONS, backend=backend)
    scaler = scaler_of()
    scaled_grads(params, 0)

    def fails(*_: Any) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(LowRankOptimizer, "_apply", fails)
        with pytest.raises(MemoryError):
            scaler.step(optimizer)
    scaler.step(optimizer)
    plain = GaLoreFusedAdam8bit(plain_params.values(), **OPTIONS, backend=backend)
    train(plain, plain_params, [0])
    assert_same_snapshot(snapshot(optimizer, params), snapshot(plain, plain_params))
