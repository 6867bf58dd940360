"""Prepared models saved and resumed, copied, and failing in the middle of a step or of a backward pass."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from factored_cases import TARGETS, Run, batch, carriers, loss_of
from failing_allocations import FailingAllocations, watch_operations
from optimizer_cases import OF_PROJECTIONS, OptimizerClass, assert_same_snapshot, snapshot, taken

from galore_kernels import GaLoreFusedAdam8bit, GaLoreFusedAdamW
from galore_kernels.optim import factored as factored_module
from galore_kernels.optim import step as step_module

SCHEDULES: dict[str, dict[str, Any]] = {
    "periodic": {"update_proj_gap": 5, "moments_on_refresh": "rotate", "basis_format": "int8"},
    "staggered": {"update_proj_gap": 5, "refresh_schedule": "staggered", "moments_on_refresh": "reset"},
    "adaptive": {"update_proj_gap": 5, "refresh_schedule": "adaptive", "warm_start": True},
}


def state_of(run: Run) -> dict[str, Any]:
    return snapshot(run.optimizer, run.model.state_dict())


def weights_only(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("optimizer_class", OF_PROJECTIONS)
@pytest.mark.parametrize("steps", [1, 5, 6])  # within; right before a step that keeps factors; right after
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_resumed_run_is_the_one_that_was_not_interrupted(
    schedule: str, steps: int, optimizer_class: OptimizerClass
) -> None:
    fields: dict[str, Any] = {
        "optimizer_class": optimizer_class,
        "options": taken(optimizer_class, SCHEDULES[schedule]),
    }
    straight, stopped, resumed = (Run(True, **fields) for _ in range(3))
    straight.train(12)
    stopped.train(steps)
    model, optimizer = weights_only(stopped.model.state_dict()), weights_only(stopped.optimizer.state_dict())
    resumed.model.load_state_dict(model)
    resumed.optimizer.load_state_dict(optimizer)
    resumed.steps = steps
    resumed.train(12 - steps)
    assert_same_snapshot(state_of(resumed), state_of(straight))
    assert straight.optimizer.subspace_report() == resumed.optimizer.subspace_report()
    assert all(entry["refreshes"] >= 2 for entry in straight.optimizer.subspace_report().values())


@pytest.mark.parametrize("steps", [0, 3, 5])
def test_a_deep_copy_of_model_and_optimizer_trains_on_alike(steps: int) -> None:
    run = Run(True, GaLoreFusedAdam8bit, options={"update_proj_gap": 5})
    run.train(steps)
    other = copy.deepcopy(run)
    assert other.train(7) == run.train(7)
    for name, weight in run.weights().items():
        assert torch.equal(other.weights()[name], weight), name


@pytest.mark.parametrize("steps", [0, 3], ids=["the first step", "a refresh"])
def test_any_allocation_of_a_step_may_fail_and_the_step_be_retried(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def before_the_step() -> Run:
        options = {"update_proj_gap": 3, "moments_on_refresh": "rotate", "basis_format": "int8"}
        run = Run(True, GaLoreFusedAdam8bit, "cpu", options=options)
        run.train(steps)
        run.backward()
        return run

    undisturbed = before_the_step()
    undisturbed.optimizer.step()
    after = state_of(undisturbed)
    undisturbed.optimizer.zero_grad()
    losses = undisturbed.train(2)
    points, fail_at = 1000, 0
    while fail_at < points:
        run, mode = before_the_step(), FailingAllocations(fail_at)
        with monkeypatch.context() as patch:
            watch_operations(patch, mode)
            if fail_at == 0:
                with mode:
                    run.optimizer.step()
                points = mode.count
            else:
                with mode, pytest.raises(mode.error):
                    run.optimizer.step()
        if fail_at:
            run.optimizer.step()
        assert_same_snapshot(state_of(run), after)
        run.optimizer.zero_grad()
        assert run.train(2) == losses, fail_at
        fail_at += 1 if fail_at < 12 else 7  # each costs a run
    assert points > (60 if steps else 3)


@pytest.mark.parametrize("where", ["find_bases", "changes", "take_over", "tell_layers"])
def test_an_exception_at_a_refresh_leaves_a_step_to_be_retried(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def at_the_refresh() -> Run:
        run = Run(True, options={"update_proj_gap": 3, "moments_on_refresh": "rotate"})
        run.train(3)
        run.backward()
        return run

    expected, run = at_the_refresh(), at_the_refresh()
    expected.optimizer.step()
    calls = 0
    original = getattr(factored_module, where)

    def second_fails(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == (1 if where == "tell_layers" else 2):
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(factored_module, where, second_fails)
        with pytest.raises(KeyboardInterrupt):
            run.optimizer.step()
    run.optimizer.step()
    for name, weight in expected.weights().items():
        assert torch.equal(run.weights()[name], weight), name
    assert run.optimizer.subspace_report() == expected.optimizer.subspace_report()
    for either in (run, expected):
        either.optimizer.zero_grad()
    assert run.train(4) == expected.train(4)


def test_an_exception_in_the_first_search_leaves_a_backward_pass_to_be_retried(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected, run, where = Run(True), Run(True), "find_bases"
    calls = 0
    original = getattr(step_module, where)

    def second_fails(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise MemoryError
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(step_module, where, second_fails)
        with pytest.raises(MemoryError):
            run.backward()
    run.optimizer.zero_grad()
    assert run.train(5) == expected.train(5)


def test_a_checkpoint_between_the_first_backward_pass_and_its_step_loads() -> None:
    run, other = Run(True), Run(True)
    run.backward()
    assert len(run.optimizer.state_dict()["state"]) == len(carriers(run.model))  # first bases, no moments yet
    other.optimizer.load_state_dict(weights_only(run.optimizer.state_dict()))
    run.optimizer.zero_grad()
    assert other.train(5) == run.train(5)


def test_a_gradient_of_zero_has_no_basis_and_later_ones_have() -> None:
    run = Run(True, GaLoreFusedAdamW)
    (loss_of(run.model, batch(0)) * 0).backward()
    before = run.weights()
    run.optimizer.step()
    assert all(torch.equal(weight, before[name]) for name, weight in run.weights().items())
    run.optimizer.zero_grad()
    assert not run.optimizer.subspace_report()
    losses = run.train(20)
    assert losses[-1] < losses[0]
    assert len(run.optimizer.subspace_report()) == 3


def test_the_state_of_other_layers_is_refused() -> None:
    run, other = Run(True), Run(True)
    run.train(1)
    saved = copy.deepcopy(run.optimizer.state_dict())
    saved["param_groups"][0]["param_names"] = [name.replace("up", "top") for name in TARGETS for _ in range(3)]
    with pytest.raises(ValueError, match=r'is "mlp" there and "mlp_up\.lowrank" here'):
        other.optimizer.load_state_dict(saved)
