"""What people rely on in any ``torch.optim.Optimizer``: closures, schedulers, hooks, copies, strides, dtypes."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from optimizer_cases import (
    EVERY_OPTIMIZER,
    OF_PROJECTIONS,
    OPTIONS,
    SHAPES,
    OptimizerClass,
    assert_same_snapshot,
    clone_params,
    make_params,
    set_grads,
    snapshot,
    train,
)
from torch import Tensor, nn
from torch.optim import lr_scheduler
from update_cases import assert_same_bits

from galore_kernels import GaLoreFusedAdam8bit, GaLoreFusedAdamW
from galore_kernels.optim.base import LowRankOptimizer

Pair = tuple[LowRankOptimizer, dict[str, nn.Parameter]]


def pair(optimizer_class: OptimizerClass = GaLoreFusedAdam8bit, **options: Any) -> Pair:
    """An optimizer of the standard parameters, and these."""
    params = make_params()
    return optimizer_class(params.values(), **{**OPTIONS, **options}), params


def assert_same_weights(got: dict[str, nn.Parameter], expected: dict[str, nn.Parameter]) -> None:
    for name, param in expected.items():
        assert_same_bits(got[name].detach(), param.detach(), name)


# ---------------------------------------------------------------------- closures


def test_a_closure_runs_once_with_gradients_on_and_its_result_is_returned(backend: str) -> None:
    optimizer, params = pair(backend=backend)
    plain, plain_params = pair(backend=backend)
    losses = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = torch.stack([param.square().sum() for param in params.values()]).sum()
        assert loss.requires_grad
        loss.backward()
        losses.append(loss)
        return loss

    with torch.no_grad():
        assert optimizer.step(closure) is losses[0]
    assert len(losses) == 1
    for param in plain_params.values():
        param.grad = 2 * param.detach()
    plain.step()
    assert_same_weights(params, plain_params)


# ---------------------------------------------------------------------- schedules

SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], lr_scheduler.LRScheduler]] = {
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda step: 0.5**step),
    "numpy lambda": lambda o: lr_scheduler.LambdaLR(o, lambda step: np.cos(0.1 * step)),  # leaves a numpy scalar
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.02, total_steps=8),  # cycles beta1 too
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=6),
}


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_schedules_act_as_if_set_by_hand(backend: str, kind: str) -> None:
    optimizer, params = pair(backend=backend)
    by_hand, hand_params = pair(backend=backend)
    constant, constant_params = pair(backend=backend)
    scheduler = SCHEDULERS[kind](optimizer)
    seen = []
    for step in range(6):
        group = optimizer.param_groups[0]
        seen.append((float(group["lr"]), *group["betas"]))
        by_hand.param_groups[0].update({"lr": float(group["lr"]), "betas": group["betas"]})
        for current, current_params in ((optimizer, params), (by_hand, hand_params), (constant, constant_params)):
            train(current, current_params, [step])
        scheduler.step()
    assert len(set(seen)) > 3
    assert_same_weights(params, hand_params)
    for name, param in params.items():
        assert not torch.equal(param, constant_params[name])
    # Schedulers leave numbers of their own kinds in the groups; a state dict holds plain ones.
    assert all(type(group["lr"]) is float for group in optimizer.state_dict()["param_groups"])


@pytest.mark.parametrize("lr", [2.0**-7, torch.tensor(2.0**-7), torch.tensor([2.0**-7], dtype=torch.float64)])
def test_a_tensor_lr_equals_the_float(backend: str, lr: float | Tensor) -> None:
    optimizer, params = pair(backend=backend, lr=lr)
    expected, expected_params = pair(backend=backend, lr=2.0**-7)
    train(optimizer, params, range(4))
    train(expected, expected_params, range(4))
    assert_same_weights(params, expected_params)


def test_a_tensor_lr_is_read_at_every_step_and_scheduled_in_place(backend: str) -> None:
    lr = torch.tensor(0.01, dtype=torch.float64)
    optimizer, params = pair(backend=backend, lr=lr)
    expected, expected_params = pair(backend=backend, lr=0.01)
    schedulers = [lr_scheduler.CosineAnnealingLR(o, T_max=6) for o in (optimizer, expected)]
    for step in range(6):
        train(optimizer, params, [step])
        train(expected, expected_params, [step])
        for scheduler in schedulers:
            scheduler.step()
    assert optimizer.param_groups[0]["lr"] is lr
    assert float(lr) < 1e-3
    for name, param in params.items():  # the tensor's cosine may differ in its last bit from math's
        torch.testing.assert_close(param, expected_params[name], rtol=0, atol=1e-6)


def test_assigning_a_float_over_a_tensor_lr_works(backend: str) -> None:
    optimizer, params = pair(backend=backend, lr=torch.tensor(0.5))
    expected, expected_params = pair(backend=backend, lr=0.01)
    optimizer.param_groups[0]["lr"] = 0.01
    train(optimizer, params, range(2))
    train(expected, expected_params, range(2))
    assert_same_weights(params, expected_params)


def test_lr_zero_changes_no_weight_but_the_moments(backend: str) -> None:
    optimizer, params = pair(backend=backend, lr=0.0)
    before = clone_params(params)
    train(optimizer, params, range(2))
    assert_same_weights(params, before)
    assert all(float(optimizer.state[param]["step"]) == 2 for param in params.values())


# ---------------------------------------------------------------------- direction and gradients


def test_maximize_is_descent_along_the_negated_gradient(backend: str) -> None:
    optimizer, params = pair(backend=backend, maximize=True, refresh_method="svd")
    expected, expected_params = pair(backend=backend, refresh_method="svd")
    for step in range(5):
        train(optimizer, params, [step])
        set_grads(expected_params, step)
        for param in expected_params.values():
            assert param.grad is not None
            param.grad.neg_()
        expected.step()
    for name, param in params.items():
        torch.testing.assert_close(param, expected_params[name], rtol=0, atol=1e-5)
    descended, descended_params = pair(backend=backend)
    train(descended, descended_params, range(5))
    assert float((params["bias"].detach() - descended_params["bias"].detach()).abs().min()) > 1e-2


@pytest.mark.parametrize("optimizer_class", OF_PROJECTIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_of_another_dtype(backend: str, optimizer_class: OptimizerClass, dtype: torch.dtype) -> None:
    optimizer, params = pair(optimizer_class, backend=backend)
    expected, expected_params = pair(optimizer_class, backend=backend)
    for _ in range(5):
        for name, param in params.items():
            # A flat spectrum: of a steep one, a 16-bit gradient's small singular values are noise and move nothing.
            grad = torch.randn(param.shape).to(dtype)
            param.grad_dtype = None
            param.grad, expected_params[name].grad = grad, grad.float()
        optimizer.step()
        expected.step()
    assert_same_weights(params, expected_params)


def test_float32_gradients_of_a_bfloat16_model(backend: str) -> None:
    params = make_params(dtype=torch.bfloat16)
    rounded = clone_params(params)
    optimizers = [GaLoreFusedAdam8bit(p.values(), **OPTIONS, backend=backend) for p in (params, rounded)]
    for step in range(3):
        train(optimizers[0], params, [step], torch.float32)
        train(optimizers[1], rounded, [step])
    for name, param in params.items():
        assert param.dtype == torch.bfloat16
        assert not torch.equal(param, make_params(dtype=torch.bfloat16)[name])
        torch.testing.assert_close(param, rounded[name], rtol=0.05, atol=0.02)


def test_parameters_without_gradients_are_left_alone(backend: str) -> None:
    optimizer, params = pair(backend=backend)
    before = clone_params(params)
    set_grads(params, 0)
    params["tall"].grad = params["bias"].grad = None
    optimizer.step()
    assert_same_bits(params["tall"].detach(), before["tall"].detach(), "tall")
    assert not optimizer.state[params["tall"]]
    assert not torch.equal(params["wide"], before["wide"])
    # Its first step is its own, not the optimizer's.
    train(optimizer, params, [1])
    assert float(optimizer.state[params["tall"]]["step"]) == 1
    assert float(optimizer.state[params["wide"]]["step"]) == 2
    optimizer.zero_grad()
    unchanged = snapshot(optimizer, params)
    optimizer.step()
    assert_same_snapshot(snapshot(optimizer, params), unchanged)


@pytest.mark.parametrize("set_to_none", [False, True])
def test_zero_grad(set_to_none: bool) -> None:
    optimizer, params = pair()
    set_grads(params, 0)
    optimizer.zero_grad(set_to_none=set_to_none)
    grads = [param.grad for param in params.values()]
    assert all(grad is None if set_to_none else grad is not None and not grad.any() for grad in grads)


# ---------------------------------------------------------------------- strides

VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "every second column": lambda buffer: buffer[:, ::2],
    "a block in the middle": lambda buffer: buffer[5:-7, 3:-9],
    "transposed": lambda buffer: buffer.T,
    "transposed block": lambda buffer: buffer[1:-1, ::3].T,
    "a column": lambda buffer: buffer[:, 4],  # full rank
    "three dimensions": lambda buffer: buffer.view(310, 10, 20)[:, 1:9, ::2].permute(1, 0, 2),  # full rank, 8-bit
}


@pytest.mark.parametrize("optimizer_class", EVERY_OPTIMIZER)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", VIEWS)
def test_a_strided_view_is_updated_in_place_and_its_neighbours_are_not(
    backend: str, optimizer_class: OptimizerClass, dtype: torch.dtype, kind: str
) -> None:
    buffer = torch.randn(310, 200).to(dtype)
    before = buffer.clone()
    view = nn.Parameter(VIEWS[kind](buffer))
    contiguous = nn.Parameter(view.detach().clone(memory_format=torch.contiguous_format))
    assert not view.is_contiguous()
    address, strides = view.data_ptr(), view.stride()
    optimizers = [optimizer_class([param], **OPTIONS, backend=backend) for param in (view, contiguous)]
    for step in range(4):
        set_grads({"contiguous": contiguous}, step)
        assert contiguous.grad is not None
        view.grad = contiguous.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    assert_same_bits(view.detach().contiguous(), contiguous.detach(), kind)
    assert not torch.equal(view, VIEWS[kind](before))
    assert (view.data_ptr(), view.stride()) == (address, strides)
    VIEWS[kind](buffer).copy_(VIEWS[kind](before))  # takes the updates back: what remains is the neighbours'
    assert_same_bits(buffer, before, "neighbours")


def test_strided_gradients(backend: str) -> None:
    optimizer, params = pair(backend=backend)
    expected, expected_params = pair(backend=backend)
    for step in range(4):
        for current in (params, expected_params):
            set_grads(current, step)
        for name in ("tall", "wide"):
            grad = params[name].grad
            assert grad is not None
            params[name].grad = grad.T.contiguous().T
        optimizer.step()
        expected.step()
    for name, param in params.items():  # the products may sum in another order
        torch.testing.assert_close(param, expected_params[name], rtol=0, atol=1e-5)


# ---------------------------------------------------------------------- hooks


def test_step_hooks_run_before_and_after(backend: str) -> None:
    optimizer, params = pair(backend=backend)
    events: list[tuple[str, float]] = []

    def log(event: str) -> Callable[..., None]:
        return lambda *_: events.append((event, float(params["bias"].detach()[0])))

    optimizer.register_step_pre_hook(log("before"))
    optimizer.register_step_post_hook(log("after"))
    start = float(params["bias"].detach()[0])
    train(optimizer, params, [0])
    assert events == [("before", start), ("after", float(params["bias"].detach()[0]))]
    assert events[0][1] != events[1][1]


def test_a_step_pre_hook_may_change_the_gradients(backend: str) -> None:
    optimizer, params = pair(backend=backend)

    def quadruple(*_: Any) -> None:
        for param in params.values():
            assert param.grad is not None
            param.grad.mul_(4)

    optimizer.register_step_pre_hook(quadruple)
    expected, expected_params = pair(backend=backend)
    for step in range(3):
        train(optimizer, params, [step])
        set_grads(expected_params, step)
        for param in expected_params.values():
            assert param.grad is not None
            param.grad.mul_(4)
        expected.step()
    assert_same_weights(params, expected_params)


def test_state_dict_hooks_run(backend: str) -> None:
    optimizer, params = pair(backend=backend)
    train(optimizer, params, range(2))
    events = []

    def add_mine(_: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
        events.append("post")
        return {**state_dict, "mine": 1}

    optimizer.register_state_dict_pre_hook(lambda _: events.append("pre"))
    optimizer.register_state_dict_post_hook(add_mine)
    saved = optimizer.state_dict()
    assert events == ["pre", "post"]
    assert saved["mine"] == 1

    other, other_params = pair(backend=backend)
    other.register_load_state_dict_pre_hook(lambda _, state_dict: events.append(f"load {state_dict.pop('mine')}"))
    other.register_load_state_dict_post_hook(lambda _: events.append(f"loaded {len(other.state)}"))
    other.load_state_dict(saved)
    assert events[2:] == ["load 1", f"loaded {len(SHAPES)}"]
    assert saved["mine"] == 1  # a hook changes its own copy, as in torch.optim
    for name, param in params.items():
        assert_same_bits(other.state[other_params[name]]["exp_avg"], optimizer.state[param]["exp_avg"], name)


# ---------------------------------------------------------------------- copies

COPIES: dict[str, Callable[[Pair], Pair]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda both: pickle.loads(pickle.dumps(both)),
}


@pytest.mark.parametrize("optimizer_class", EVERY_OPTIMIZER)
@pytest.mark.parametrize("kind", COPIES)
def test_copies_continue_bitwise(backend: str, optimizer_class: OptimizerClass, kind: str) -> None:
    both = pair(optimizer_class, backend=backend, seed=5)
    train(*both, range(2))
    copied = COPIES[kind](both)
    assert type(copied[0]) is optimizer_class
    assert repr(copied[0]) == repr(both[0])
    assert_same_snapshot(snapshot(*copied), snapshot(*both))
    before = snapshot(*both)
    train(*copied, range(2, 6))
    assert_same_snapshot(snapshot(*both), before)  # the original hasn't moved with its copy
    train(*both, range(2, 6))
    assert_same_snapshot(snapshot(*copied), snapshot(*both))


def test_a_copy_under_a_scheduler_can_be_pickled() -> None:
    optimizer, params = pair()
    lr_scheduler.ExponentialLR(optimizer, 0.5)
    train(optimizer, params, range(2))
    copied: Pair = pickle.loads(pickle.dumps((optimizer, params)))
    train(*copied, [2])
    train(optimizer, params, [2])
    assert_same_weights(copied[1], params)


def test_options_may_be_set_later_in_the_groups() -> None:
    # Accelerate and schedulers write into param_groups; the next step must see it.
    optimizer, params = pair(weight_decay=0.0, lr=0.01)
    expected, expected_params = pair(weight_decay=0.5, lr=0.01)
    optimizer.param_groups[0]["weight_decay"] = 0.5
    train(optimizer, params, [0])
    train(expected, expected_params, [0])
    assert_same_weights(params, expected_params)
    assert math.isclose(optimizer.param_groups[0]["weight_decay"], 0.5)


def test_adamw_and_adam8bit_differ_in_their_moments_alone(backend: str) -> None:
    results = {}
    for optimizer_class in EVERY_OPTIMIZER:
        optimizer, params = pair(optimizer_class, backend=backend)
        train(optimizer, params, range(4))
        results[optimizer_class] = params
    assert_same_bits(
        results[GaLoreFusedAdam8bit]["bias"].detach(), results[GaLoreFusedAdamW]["bias"].detach(), "float32 in both"
    )
    assert not torch.equal(results[GaLoreFusedAdam8bit]["tall"], results[GaLoreFusedAdamW]["tall"])
