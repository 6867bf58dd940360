"""Gradients that can't be used: refused by name before anything changes, or skipped, counted and reported."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from optimizer_cases import (
    EVERY_OPTIMIZER,
    OF_PROJECTIONS,
    OPTIONS,
    SHAPES,
    OptimizerClass,
    assert_same_snapshot,
    differing_keys,
    make_params,
    set_grads,
    snapshot,
    train,
)
from torch import Tensor, nn

from galore_kernels import GaLoreFusedAdam8bit, GaLoreFusedAdamW, NonFiniteGradientWarning
from galore_kernels.optim.base import LowRankOptimizer

Params = dict[str, nn.Parameter]


def named(optimizer_class: OptimizerClass = GaLoreFusedAdam8bit, **options: Any) -> tuple[LowRankOptimizer, Params]:
    params = make_params()
    return optimizer_class(list(params.items()), **{**OPTIONS, **options}), params


def of_dtype(param: nn.Parameter, grad: Tensor) -> None:
    param.grad_dtype = None
    param.grad = grad


# ---------------------------------------------------------------------- refused

LAST = "bias"  # everything before it would already have been updated

REFUSED: dict[str, tuple[Callable[[nn.Parameter], None], str]] = {
    "sparse": (lambda p: setattr(p, "grad", torch.ones(p.shape).to_sparse()), "dense real gradient.*densify it"),
    "complex": (lambda p: of_dtype(p, torch.ones(p.shape, dtype=torch.complex64)), "dense real gradient.*complex64"),
    "float64": (lambda p: of_dtype(p, torch.ones(p.shape).double()), "float32, bfloat16 or float16 gradient"),
    "weight of another shape": (lambda p: setattr(p, "data", torch.zeros(9)), "was changed since the last step"),
    "weight of another dtype": (lambda p: setattr(p, "data", p.data.double()), "float64; convert it"),
    "expanded weight": (lambda p: setattr(p, "data", torch.zeros(1).expand(p.shape)), "clone it"),
}


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.parametrize("steps", [0, 2])  # at the first step, and later
def test_refused_before_anything_changes(backend: str, kind: str, steps: int) -> None:
    optimizer, params = named(backend=backend)
    train(optimizer, params, range(steps))
    set_grads(params, steps)
    spoil, message = REFUSED[kind]
    good = params[LAST].data
    spoil(params[LAST])
    before = snapshot(optimizer, params)
    with pytest.raises(ValueError, match=rf'parameter 4 \("{LAST}"\): .*{message}'):
        optimizer.step()
    assert_same_snapshot(snapshot(optimizer, params), before)
    # Put right, the step works as if nothing had happened.
    params[LAST].grad = None
    params[LAST].data = good
    params[LAST].grad_dtype = torch.float32
    train(optimizer, params, [steps])
    expected, expected_params = named(backend=backend)
    train(expected, expected_params, range(steps + 1))
    assert_same_snapshot(snapshot(optimizer, params), snapshot(expected, expected_params))


@pytest.mark.parametrize("name", ["tall", "wide", "table"])
def test_a_parameter_resized_between_steps(backend: str, name: str) -> None:
    optimizer, params = named(backend=backend)
    train(optimizer, params, range(2))
    params[name].data = torch.zeros([size + 1 for size in SHAPES[name]])
    set_grads(params, 2)  # a gradient of the new shape: only the state remembers the old one
    before = snapshot(optimizer, params)
    with pytest.raises(ValueError, match=rf'\("{name}"\): .*make a new optimizer, or restore it'):
        optimizer.step()
    assert_same_snapshot(snapshot(optimizer, params), before)


def test_a_rank_changed_between_steps(backend: str) -> None:
    optimizer, params = named(backend=backend)
    train(optimizer, params, range(2))
    set_grads(params, 2)
    before = snapshot(optimizer, params)
    optimizer.param_groups[0]["rank"] = 8
    with pytest.raises(ValueError, match=r'\("tall"\): .*another shape or rank'):
        optimizer.step()
    optimizer.param_groups[0]["rank"] = 16
    assert_same_snapshot(snapshot(optimizer, params), before)


def test_a_device_that_no_backend_serves() -> None:
    here, there = nn.Parameter(torch.ones(8, 8)), nn.Parameter(torch.empty(8, 8, device="meta"))
    optimizer = GaLoreFusedAdamW([here, there], rank=2)
    here.grad, there.grad = torch.ones(8, 8), torch.empty(8, 8, device="meta")
    with pytest.raises(RuntimeError, match="on meta"):
        optimizer.step()
    assert torch.equal(here, torch.ones(8, 8))


# ---------------------------------------------------------------------- skipped

#: What makes a gradient unusable.
UNUSABLE: dict[str, float] = {
    "nan": math.nan,
    "inf": math.inf,
    "-inf": -math.inf,
    "1e25": 1e25,  # finite, but its square isn't
}


@pytest.mark.parametrize("optimizer_class", EVERY_OPTIMIZER)
@pytest.mark.parametrize("value", UNUSABLE)
@pytest.mark.parametrize("at", [0, 2, 3])  # the very first step, a plain one, a refresh
@pytest.mark.parametrize("name", SHAPES)
def test_one_tensors_step_is_skipped_and_the_others_taken(
    backend: str, optimizer_class: OptimizerClass, value: str, at: int, name: str
) -> None:
    optimizer, params = named(optimizer_class, backend=backend)
    train(optimizer, params, range(at))
    before = snapshot(optimizer, params)
    set_grads(params, at)
    grad = params[name].grad
    assert grad is not None
    grad.view(-1)[-1] = UNUSABLE[value]
    with pytest.warns(NonFiniteGradientWarning, match=rf'\("{name}"\): .*skipped') as caught:
        optimizer.step()
    assert [warning.filename for warning in caught] == [__file__]  # it points at the caller, not into torch
    expected, expected_params = named(optimizer_class, backend=backend)
    train(expected, expected_params, range(at + 1))
    after, undisturbed = snapshot(optimizer, params), snapshot(expected, expected_params)
    index = str(list(SHAPES).index(name))
    own = (f"/params/{name}", f"/optimizer/state/{index}/", f"/optimizer/galore_kernels/checksums/{index}")
    assert {key for key in differing_keys(after, undisturbed) if not key.startswith(own)} == set()
    changed = {key for key in differing_keys(after, before) if key.startswith(own)}
    if at:
        assert changed == {own[1] + "skipped", own[2]}
    else:  # its state is new
        assert own[0] not in changed
    assert optimizer.skipped_steps() == {f'param group 0, parameter {index} ("{name}")': 1}


@pytest.mark.parametrize("optimizer_class", EVERY_OPTIMIZER)
@pytest.mark.parametrize("value", UNUSABLE)
@pytest.mark.parametrize("at", [0, 2, 3])
def test_training_continues_as_if_the_skipped_step_had_not_been(
    backend: str, optimizer_class: OptimizerClass, value: str, at: int
) -> None:
    optimizer, params = named(optimizer_class, backend=backend)
    train(optimizer, params, range(at))
    set_grads(params, 99)
    for param in params.values():
        assert param.grad is not None
        if value == "1e25":
            param.grad *= 1e25  # all of it, as when a loss explodes
        else:
            param.grad.view(-1)[0] = UNUSABLE[value]
    with pytest.warns(NonFiniteGradientWarning) as caught:
        optimizer.step()
    assert len(caught) == len(SHAPES)
    train(optimizer, params, range(at, 7))
    expected, expected_params = named(optimizer_class, backend=backend)
    train(expected, expected_params, range(7))
    differing = differing_keys(snapshot(optimizer, params), snapshot(expected, expected_params))
    assert {key.rsplit("/", 1)[1] for key in differing if "checksums" not in key} == {"skipped"}


def test_reports_thin_out_and_counts_go_on(backend: str) -> None:
    optimizer, params = named(backend=backend)
    for step in range(9):
        set_grads(params, step)
        params["wide"].grad = torch.full_like(params["wide"], math.nan)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizer.step()
        assert len(caught) == (step + 1 in (1, 2, 4, 8))
    assert optimizer.skipped_steps() == {'param group 0, parameter 1 ("wide")': 9}


def test_a_report_turned_into_an_exception_loses_nothing(backend: str) -> None:
    optimizer, params = named(backend=backend)
    set_grads(params, 0)
    params["tall"].grad = torch.full_like(params["tall"], math.nan)
    with pytest.raises(NonFiniteGradientWarning, match="tall"):  # pytest makes errors of warnings
        optimizer.step()
    optimizer.step()  # the other tensors' turn; nobody's twice
    assert optimizer.skipped_steps() == {'param group 0, parameter 0 ("tall")': 1}
    assert [float(optimizer.state[p]["step"]) for p in params.values()] == [0, 1, 1, 1, 1]


@pytest.mark.parametrize("optimizer_class", OF_PROJECTIONS)
@pytest.mark.parametrize("factor", [1e-30, 1e-38, 1e15])
def test_gradients_of_extreme_but_usable_size(backend: str, optimizer_class: OptimizerClass, factor: float) -> None:
    optimizer, params = named(optimizer_class, weight_decay=0.0, backend=backend)
    before = {name: param.detach().clone() for name, param in params.items()}
    for step in range(4):
        set_grads(params, step)
        for param in params.values():
            assert param.grad is not None
            param.grad *= factor
        optimizer.step()
    assert optimizer.skipped_steps() == {}
    for name, param in params.items():
        moved = (param.detach() - before[name]).abs().max()
        # Adam's step doesn't depend on the gradient's size, but below eps = 1e-8 it vanishes.
        assert float(moved) == 0 if factor < 1 else 1e-3 < float(moved) < 1, name
    basis = optimizer.state[params["wide"]]["basis"]
    active = basis[:, basis.any(dim=0)]
    assert active.shape[1] >= 4  # found even at 1e-38
    torch.testing.assert_close(active.T @ active, torch.eye(active.shape[1]), rtol=0, atol=1e-5)
    train(optimizer, params, range(4, 8))
    assert all(bool(torch.isfinite(param).all()) for param in params.values())
    if factor < 1:
        assert all(float((param - before[name]).detach().abs().max()) > 1e-3 for name, param in params.items())


def test_an_eps_of_zero_and_a_gradient_of_zero(backend: str) -> None:
    optimizer, params = named(eps=0.0, weight_decay=0.0, backend=backend)
    before = {name: param.detach().clone() for name, param in params.items()}
    for param in params.values():
        param.grad = torch.zeros_like(param)
    optimizer.step()
    assert all(torch.equal(param, before[name]) for name, param in params.items())
    train(optimizer, params, range(2))
    assert all(bool(torch.isfinite(param).all()) for param in params.values())
