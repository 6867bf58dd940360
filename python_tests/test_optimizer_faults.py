"""Failures in the middle of training: memory that runs out, exceptions, casts, threads. What is right stays right."""

from __future__ import annotations

import contextlib
import copy
import math
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from failing_allocations import FailingAllocations, watch_operations
from optimizer_cases import (
    EVERY_OPTIMIZER,
    OPTIMIZERS,
    OPTIONS,
    SHAPES,
    AdafactorAtALearningRate,
    OptimizerClass,
    assert_same_snapshot,
    differing_keys,
    make_params,
    set_grads,
    snapshot,
    train,
)
from torch import Tensor, nn

from galore_kernels import APOLLOFusedAdam8bit, GaLoreFusedAdam8bit, GaLoreFusedAdamW, NonFiniteGradientWarning
from galore_kernels.optim.base import LowRankOptimizer
from galore_kernels.optim.update import Update

Params = dict[str, nn.Parameter]
Pair = tuple[LowRankOptimizer, Params]


def plain(backend: str, optimizer_class: OptimizerClass) -> Pair:
    """Every kind of state, small: 260 x 16 moments are 8-bit, 30 x 16 ones float32; the last is updated by itself."""
    params = make_params({"tall": (260, 20), "wide": (20, 30), "table": (4100,), "last": (7, 3)})
    params["last"] = nn.Parameter(params["last"].detach().T)  # which a copy of it is too
    return optimizer_class(list(params.items()), **OPTIONS, backend=backend), params


def awkward(backend: str, optimizer_class: OptimizerClass) -> Pair:
    """Everything that goes through a copy: bf16, strides, channels_last, both sides projected."""
    conv = torch.randn(16, 3, 3, 3).bfloat16().to(memory_format=torch.channels_last)
    params = {
        "conv": nn.Parameter(conv),
        "strided": nn.Parameter(torch.randn(20, 30).bfloat16()[:, ::2]),
        "vector": nn.Parameter(torch.randn(40).bfloat16()[::2]),
    }
    options = {**OPTIONS, "rank": 4, "proj_type": "full", "project_nd": True, "stochastic_rounding": True}
    return optimizer_class(list(params.items()), **options, backend=backend), params


def of_one_parameter(leaves: dict[str, Any], name: str, index: int) -> dict[str, Any]:
    """The part of a snapshot that belongs to one parameter."""
    own = (f"/params/{name}", f"/optimizer/state/{index}/")
    return {key: value for key, value in leaves.items() if key.startswith(own)}


def start(both: Pair, steps: int) -> Pair:
    """A copy about to take the step of the given number."""
    optimizer, params = copy.deepcopy(both)
    set_grads(params, steps)
    return optimizer, params


def fails(both: Pair, fail_at: int, monkeypatch: pytest.MonkeyPatch) -> int:
    """Takes a step whose ``fail_at``-th allocation fails (0: none); returns how many there were."""
    mode = FailingAllocations(fail_at)
    with monkeypatch.context() as patch:
        watch_operations(patch, mode)
        with mode, pytest.raises(mode.error) if fail_at else contextlib.nullcontext():
            both[0].step()
    assert mode.count == fail_at or not fail_at, "the failure was swallowed"
    return mode.count


def refreshing(**options: Any) -> Callable[[str, OptimizerClass], Pair]:
    """A matrix of each side, refreshed with these options."""

    def make(backend: str, optimizer_class: OptimizerClass) -> Pair:
        params = make_params({name: SHAPES[name] for name in ("tall", "wide")})
        return optimizer_class(list(params.items()), **OPTIONS, **options, backend=backend), params

    return make


ROTATING = refreshing(moments_on_refresh="rotate", basis_format="int8", warm_start=True)
RESETTING = refreshing(moments_on_refresh="reset")
ASYNCHRONOUS = refreshing(async_refresh=True, moments_on_refresh="rotate")


@pytest.mark.parametrize(
    ("make", "optimizer_class", "steps", "at_least"),
    [
        (plain, GaLoreFusedAdam8bit, 0, 15),  # the first step makes the state
        (plain, GaLoreFusedAdam8bit, 1, 4),  # a plain step, in which the native backend allocates little
        (plain, GaLoreFusedAdam8bit, 3, 15),  # a refresh
        (plain, GaLoreFusedAdamW, 3, 15),
        (awkward, GaLoreFusedAdam8bit, 3, 15),
        (ROTATING, GaLoreFusedAdam8bit, 3, 30),
        (RESETTING, GaLoreFusedAdam8bit, 3, 15),
        (plain, APOLLOFusedAdam8bit, 0, 15),
        (plain, APOLLOFusedAdam8bit, 3, 8),  # whose bases are drawn
        (plain, AdafactorAtALearningRate, 3, 15),
        (ASYNCHRONOUS, GaLoreFusedAdam8bit, 3, 15),  # searches
    ],
)
def test_any_allocation_may_fail_and_the_step_be_retried(
    backend: str,
    make: Callable[[str, OptimizerClass], Pair],
    optimizer_class: OptimizerClass,
    steps: int,
    at_least: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert check_every_allocation(make(backend, optimizer_class), steps, monkeypatch) >= at_least


def test_any_allocation_may_fail_on_a_device(cuda_stand_in: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # One refresh, and matrices both of whose sides are projected.
    assert check_every_allocation(awkward(cuda_stand_in, GaLoreFusedAdam8bit), 3, monkeypatch) >= 15


def test_any_allocation_may_fail_where_a_step_takes_over_what_was_found(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def at_the_take_over() -> Pair:
        both = ASYNCHRONOUS(backend, GaLoreFusedAdam8bit)
        train(*both, range(4))  # not copied: a copy is of the state after it
        set_grads(both[1], 4)
        return both

    undisturbed = at_the_take_over()
    points = fails(undisturbed, 0, monkeypatch)
    after = snapshot(*undisturbed)
    assert points >= 10
    for fail_at in range(1, points + 1):
        both = at_the_take_over()
        fails(both, fail_at, monkeypatch)
        both[0].step()
        kept = snapshot(*both)
        # What couldn't be taken over is found anew, in the gradient of this step.
        done = [both[0].state[param]["refreshes"] == 2 for param in both[1].values()]
        assert all(done)
        assert fail_at < points or not differing_keys(kept, after)


def check_every_allocation(both: Pair, steps: int, monkeypatch: pytest.MonkeyPatch) -> int:
    """Fails unless a step from which memory is withheld can be repeated. Returns at how many points it was."""
    train(*both, range(steps))
    undisturbed = start(both, steps)
    before = snapshot(*undisturbed)
    undisturbed[0].step()
    after = snapshot(*undisturbed)
    points = fails(start(both, steps), 0, monkeypatch)
    for fail_at in range(1, points + 1):
        optimizer, params = start(both, steps)
        fails((optimizer, params), fail_at, monkeypatch)
        halfway = snapshot(optimizer, params)
        for index, name in enumerate(params):
            own = of_one_parameter(halfway, name, index)
            fits = [not differing_keys(own, of_one_parameter(whole, name, index)) for whole in (before, after)]
            assert any(fits), f"allocation {fail_at} left {name} half updated"
        optimizer.step()
        assert_same_snapshot(snapshot(optimizer, params), after)
    return points


@pytest.mark.parametrize("give_up", ["optimizer.zero_grad", "model.zero_grad", "in place"])
def test_after_a_failure_new_gradients_are_a_new_step(
    backend: str, give_up: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = plain(backend, GaLoreFusedAdam8bit)
    train(*both, range(3))
    points = fails(start(both, 3), 0, monkeypatch)
    counts = set()
    for fail_at in (1, points // 2, points * 3 // 4, points):
        optimizer, params = start(both, 3)
        fails((optimizer, params), fail_at, monkeypatch)
        updated = [name for name, param in params.items() if float(optimizer.state[param]["step"]) == 4]
        counts.add(len(updated))
        if give_up == "in place":
            fresh = copy.deepcopy(params)
            set_grads(fresh, 4)
            for name, param in params.items():
                assert param.grad is not None
                grad = fresh[name].grad
                assert grad is not None
                param.grad.copy_(grad)
        else:
            if give_up == "optimizer.zero_grad":
                optimizer.zero_grad()
            else:
                nn.ParameterDict(params).zero_grad()
            set_grads(params, 4)
        optimizer.step()
        expected, expected_params = copy.deepcopy(both)
        set_grads(expected_params, 3)
        for name, param in expected_params.items():
            param.grad = param.grad if name in updated else None
        expected.step()
        train(expected, expected_params, [4])
        assert_same_snapshot(snapshot(optimizer, params), snapshot(expected, expected_params))
    assert 0 in counts
    assert counts & {1, 2, 3}


def test_a_step_that_succeeded_is_not_taken_for_one_to_resume(backend: str) -> None:
    # Accumulating loops call step() again and again with the very same gradient tensors.
    optimizer, params = plain(backend, GaLoreFusedAdam8bit)
    set_grads(params, 0)
    for _ in range(3):
        optimizer.step()
    assert all(float(optimizer.state[param]["step"]) == 3 for param in params.values())


# ---------------------------------------------------------------------- exceptions of others


def explode(*_: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("steps", [0, 2, 3])
def test_an_exception_in_a_pre_hook_or_closure_changes_nothing(backend: str, steps: int) -> None:
    both = plain(backend, GaLoreFusedAdam8bit)
    train(*both, range(steps))
    optimizer, params = start(both, steps)
    before = snapshot(optimizer, params)
    handle = optimizer.register_step_pre_hook(explode)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step()
    handle.remove()
    with pytest.raises(KeyboardInterrupt):
        optimizer.step(explode)
    assert_same_snapshot(snapshot(optimizer, params), before)
    optimizer.step()
    expected = start(both, steps)
    expected[0].step()
    assert_same_snapshot(snapshot(optimizer, params), snapshot(*expected))


def test_an_exception_in_a_post_hook_finds_the_step_done(backend: str) -> None:
    optimizer, params = plain(backend, GaLoreFusedAdam8bit)
    handle = optimizer.register_step_post_hook(explode)
    set_grads(params, 0)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step()
    handle.remove()
    train(optimizer, params, [1])
    expected, expected_params = plain(backend, GaLoreFusedAdam8bit)
    train(expected, expected_params, range(2))
    assert_same_snapshot(snapshot(optimizer, params), snapshot(expected, expected_params))


def test_an_exception_in_a_load_hook_changes_nothing(backend: str) -> None:
    optimizer, params = plain(backend, GaLoreFusedAdam8bit)
    saved = copy.deepcopy(optimizer.state_dict())
    train(optimizer, params, range(2))
    before = snapshot(optimizer, params)
    optimizer.register_load_state_dict_pre_hook(explode)
    with pytest.raises(KeyboardInterrupt):
        optimizer.load_state_dict(saved)
    assert_same_snapshot(snapshot(optimizer, params), before)


# ---------------------------------------------------------------------- casts


@pytest.mark.parametrize("optimizer_class", OPTIMIZERS)
def test_a_model_cast_in_mid_training_and_back(backend: str, optimizer_class: OptimizerClass) -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(64, 300), nn.Tanh(), nn.Linear(300, 64))
    params: Params = dict(model.named_parameters())
    straight = copy.deepcopy(model)
    options: dict[str, Any] = {**OPTIONS, "lr": 0.1, "update_proj_gap": 4, "backend": backend}
    optimizer = optimizer_class(model.named_parameters(), **options)
    expected = optimizer_class(straight.named_parameters(), **options)
    steps = 0
    for dtype in (torch.float32, torch.bfloat16, torch.float32):
        moments = {name: optimizer.state[param].get("exp_avg", Tensor()).clone() for name, param in params.items()}
        model.to(dtype)
        assert all(torch.equal(optimizer.state[params[n]]["exp_avg"], m) for n, m in moments.items() if steps)
        train(optimizer, params, range(steps, steps + 5))  # over a refresh in each dtype
        train(expected, dict(straight.named_parameters()), range(steps, steps + 5))
        steps += 5
        assert all(param.dtype == dtype for param in params.values())
        assert optimizer.state[params["0.weight"]]["basis"].dtype == dtype
        assert (
            optimizer.state[params["0.weight"]]["exp_avg"].dtype
            == expected.state[straight.get_parameter("0.weight")]["exp_avg"].dtype
        )
    for name, param in straight.named_parameters():
        assert float(optimizer.state[params[name]]["step"]) == 15
        # bfloat16 rounds a weight below 4 by up to 2^-7, five times; the updates themselves sum up to 15 lr.
        assert float((params[name] - param).detach().abs().max()) < 0.15
        assert float(param.detach().abs().max()) > 0.15


# ---------------------------------------------------------------------- threads


def test_optimizers_in_threads_equal_optimizers_in_turn(backend: str) -> None:
    def work(seed: int) -> dict[str, Any]:
        params = make_params(seed=seed)
        optimizer = EVERY_OPTIMIZER[seed](list(params.items()), **OPTIONS, seed=seed, backend=backend)
        train(optimizer, params, range(10 * seed, 10 * seed + 7))
        return snapshot(optimizer, params)

    expected = [work(seed) for seed in range(4)]
    results: dict[int, dict[str, Any]] = {}
    barrier = threading.Barrier(4)

    def run(seed: int) -> None:
        torch.set_num_threads(1)
        barrier.wait()
        results[seed] = work(seed)

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in range(4):
        assert_same_snapshot(results[seed], expected[seed])


def test_a_nan_gradient_and_a_failure_in_one_step(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    both = plain(backend, GaLoreFusedAdamW)
    train(*both, range(2))

    def poisoned() -> Pair:
        optimizer, params = start(both, 2)
        params["tall"].grad = torch.full_like(params["tall"], math.nan)
        return optimizer, params

    apply = LowRankOptimizer._apply

    def fails_at_the_last(self: LowRankOptimizer, update: Update, *args: Any) -> tuple[int, int]:
        if "last" in update.name:
            raise MemoryError
        return apply(self, update, *args)

    optimizer, params = poisoned()
    with monkeypatch.context() as patch:
        patch.setattr(LowRankOptimizer, "_apply", fails_at_the_last)
        with pytest.warns(NonFiniteGradientWarning, match="tall"), pytest.raises(MemoryError):
            optimizer.step()
    optimizer.step()  # no second report: the skip is done
    assert optimizer.skipped_steps() == {'param group 0, parameter 0 ("tall")': 1}
    assert [float(optimizer.state[param]["step"]) for param in params.values()] == [2, 3, 3, 3]


@pytest.mark.parametrize("proj_type", ["std", "full"])
def test_a_step_under_autocast_is_the_same_step(proj_type: str, backend: str) -> None:
    """Its float32 products would come out in bfloat16: half the memory that the native stages then write to."""
    weights = []
    for enabled in (False, True):
        generator = torch.Generator().manual_seed(0)
        param = torch.nn.Parameter(torch.randn(96, 64, generator=generator))
        optimizer = GaLoreFusedAdamW([param], lr=0.01, rank=16, proj_type=proj_type, backend=backend)
        for _ in range(3):
            param.grad = torch.randn(96, 64, generator=generator)
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
                optimizer.step()
        weights.append(param.detach().clone())
    assert torch.equal(*weights)


def test_a_gradient_of_inference_mode_is_refused_before_anything_changes() -> None:
    first, second = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    optimizer = GaLoreFusedAdamW([("first", first), ("second", second)], lr=0.1)
    first.grad = torch.ones(3)
    with torch.inference_mode():
        second.grad = torch.ones(3)
    with pytest.raises(ValueError, match=r'"second".*inference mode'):
        optimizer.step()
    assert torch.equal(first, torch.ones(3))
    assert not optimizer.state


def test_an_overlapping_parameter_is_refused_at_construction() -> None:
    windows = torch.zeros(128).as_strided((20, 30), (5, 1)).requires_grad_()
    with pytest.raises(ValueError, match=r'"windows".*overlapping.*clone'):
        GaLoreFusedAdamW([("windows", windows)])
