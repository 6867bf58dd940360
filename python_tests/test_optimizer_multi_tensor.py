"""Steps in groups: bitwise those of one tensor at a time, in as few calls as there are kinds of tensors."""

from __future__ import annotations

import copy
import math
import pickle
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from grouping import KINDS, Grouping, Make, Params, apollo, compare, install, mixed, pair, plain, steps, take_for_device
from optimizer_cases import EVERY_OPTIMIZER, set_grads, train
from torch import Tensor, nn

from galore_kernels.ops import registry
from galore_kernels.ops.group import GroupUpdate, UpdateGroup
from galore_kernels.optim.base import LowRankOptimizer


@pytest.fixture(params=["host", "device"])
def grouped(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Grouping:
    """Backend "cuda", whose tensors are in turn the CPU's, and taken for a device's."""
    grouping = install(monkeypatch)
    if request.param == "device":
        take_for_device(grouping, monkeypatch)
    return grouping


# ---------------------------------------------------------------------- the same bits


@pytest.mark.parametrize("make", [plain, mixed, apollo])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_groups_are_bitwise_one_tensor_at_a_time(grouped: Grouping, make: Make, dtype: torch.dtype) -> None:
    both = pair(make, dtype)
    for start in (0, 3, 6, 9):
        steps(both, range(start, start + 3))
        compare(both)
    assert max(size for _, size, _ in grouped.calls) > 1
    projected = "apollo_update" if make is apollo else "galore_update"
    assert {operation for operation, *_ in grouped.calls} == {projected, "adam8bit_update"}


@pytest.mark.parametrize("optimizer_class", EVERY_OPTIMIZER)
def test_a_checkpoint_in_mid_training(grouped: Grouping, optimizer_class: type[LowRankOptimizer]) -> None:
    both = pair(lambda params, backend: plain(params, backend, optimizer_class))
    steps(both, range(5))
    for optimizer, _ in both:
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    steps(both, range(5, 11))
    compare(both)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))])
def test_copies_lead_lives_of_their_own(grouped: Grouping, copied: Callable[[Any], Any]) -> None:
    both = pair()
    steps(both, range(4))
    ours, alone = copied(both[0]), copied(both[1])
    steps(both[:1], range(4, 6))
    steps((ours, alone), range(4, 9))
    compare((ours, alone))
    steps(both[:1], range(6, 9))
    compare((both[0], alone))


def test_a_group_added_and_options_set_later(grouped: Grouping) -> None:
    both = pair()
    for optimizer, params in both:
        params["late"] = nn.Parameter(torch.ones(300, 20))
        steps([(optimizer, {name: p for name, p in params.items() if name != "late"})], range(3))
        optimizer.add_param_group({"params": [("late", params["late"])], "weight_decay": 0.5})
    steps(both, range(3, 6))
    for optimizer, _ in both:
        optimizer.param_groups[0]["betas"] = [0.5, 0.6]
        optimizer.param_groups[0]["update_proj_gap"] = 2
    steps(both, range(6, 9))
    compare(both)


def test_under_autocast(grouped: Grouping) -> None:
    both = pair()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        steps(both, range(5))
    compare(both)


@pytest.mark.parametrize("overflow_at", [1, 3])  # a plain step, a refresh
def test_under_a_grad_scaler(grouped: Grouping, overflow_at: int) -> None:
    both = pair()
    for optimizer, params in both:
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**7)
        scaler.scale(torch.zeros(()))
        for step in range(8):
            set_grads(params, step)
            for param in params.values():
                assert param.grad is not None
                param.grad *= scaler.get_scale()
            if step == overflow_at:
                params["tall1"].grad = torch.full_like(params["tall1"], math.inf)
            scaler.step(optimizer)
            scaler.update()
        assert scaler.get_scale() == 2.0**6
        assert optimizer.skipped_steps() == {}
    compare(both)
    assert float(both[0][0].state[both[0][1]["tall0"]]["step"]) == 7


def assert_same_weights(both: Sequence[tuple[LowRankOptimizer, Params]]) -> None:
    for (name, got), expected in zip(both[0][1].items(), both[1][1].values(), strict=True):
        assert torch.equal(got, expected), name


# ---------------------------------------------------------------------- how many calls, how many plans


def test_a_step_is_one_call_for_each_kind(grouped: Grouping) -> None:
    (optimizer, params), _ = pair()
    steps([(optimizer, params)], range(1))
    assert not grouped.calls  # states are made one at a time
    set_grads(params, 1)
    optimizer.step()
    assert [size for _, size, _ in grouped.calls] == [3] * len(KINDS)
    grouped.calls.clear()
    for name in ("tall0", "norm1", "norm2"):
        params[name].grad = None
    optimizer.step()
    assert sorted(size for _, size, _ in grouped.calls) == [1, 2, 3, 3, 3]


def test_a_plan_is_made_after_the_first_refresh_and_then_followed(grouped: Grouping) -> None:
    (optimizer, params), _ = pair()
    made = []
    for step in range(9):
        set_grads(params, step)
        optimizer.param_groups[0]["lr"] = 1e-3 * step
        optimizer.step()
        optimizer.zero_grad(set_to_none=bool(step % 2))
        made.append(len(grouped.made))
        grouped.made.clear()
    assert made == [len(KINDS) if step == 1 else 0 for step in range(9)]  # refreshed at 0, 3 and 6


def nothing(optimizer: LowRankOptimizer, params: Params) -> None:
    """The plan is followed: what follows is not due to something else."""


def replace_state(optimizer: LowRankOptimizer, params: Params) -> None:
    state = optimizer.state[params["tall0"]]
    state["exp_avg_sq"] = state["exp_avg_sq"].clone()


def move_state(optimizer: LowRankOptimizer, params: Params) -> None:
    for value in optimizer.state[params["tall0"]].values():
        if isinstance(value, Tensor):
            value.data = value.data.clone()


def move_weight(optimizer: LowRankOptimizer, params: Params) -> None:
    params["tall0"].data = params["tall0"].data.clone()


def replace_weight(optimizer: LowRankOptimizer, params: Params, new: nn.Parameter) -> None:
    old = params["tall0"]
    params["tall0"] = optimizer.param_groups[0]["params"][list(params).index("tall0")] = new
    new.grad = old.grad


def swap_weight(optimizer: LowRankOptimizer, params: Params) -> None:
    """What FSDP2 does: another parameter takes the place, and the state, of the old one."""
    old, new = params["tall0"], nn.Parameter(params["tall0"].detach().clone())
    replace_weight(optimizer, params, new)
    optimizer.state[new] = optimizer.state.pop(old)


def alias_weight(optimizer: LowRankOptimizer, params: Params) -> None:
    """Another parameter in the same memory, which has no state yet."""
    replace_weight(optimizer, params, nn.Parameter(params["tall0"].detach()))


def other_state_dict(optimizer: LowRankOptimizer, params: Params) -> None:
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def new_states(optimizer: LowRankOptimizer, params: Params) -> None:
    """What an offloader does: away, and back; the memory may be the old one."""
    for state in optimizer.state.values():
        for key, value in state.items():
            if isinstance(value, Tensor):
                state[key] = value.clone()


CHANGES: dict[str, Callable[[LowRankOptimizer, Params], None]] = {
    f.__name__: f
    for f in (
        nothing,
        replace_state,
        move_state,
        move_weight,
        swap_weight,
        alias_weight,
        other_state_dict,
        new_states,
    )
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_plan_is_made_anew_when_what_it_rests_on_has_changed(grouped: Grouping, change: str) -> None:
    both = pair()
    for optimizer, params in both:
        train(optimizer, params, range(2))
    grouped.made.clear()
    for optimizer, params in both:
        set_grads(params, 2)
        CHANGES[change](optimizer, params)
        optimizer.step()
    assert len(grouped.made) == (0 if change == "nothing" else len(KINDS))
    assert_same_weights(both)
    steps(both, range(6, 12))
    assert_same_weights(both)


def test_gradients_that_come_and_go(grouped: Grouping) -> None:
    both = pair()
    for step in range(9):
        for optimizer, params in both:
            set_grads(params, step)
            params[f"tall{step // 2 % 2}"].grad = params["norm0"].grad = None
            optimizer.step()
    compare(both)


@pytest.mark.parametrize("key", ["scale", "betas"])
def test_an_option_changed_in_place(grouped: Grouping, key: str) -> None:
    both = pair()
    for optimizer, params in both:
        value: Any = torch.tensor([0.25]) if key == "scale" else [0.9, 0.99]
        optimizer.param_groups[0][key] = value
        for step in range(9):
            value[0] -= 0.02
            train(optimizer, params, [step])
    assert_same_weights(both)
    if key == "betas":  # of numbers, which are equal or not: the plan is not made in every step
        grouped.made.clear()
        train(*both[0], [9, 10, 11])
        assert not grouped.made


def test_another_backend_is_found(grouped: Grouping, monkeypatch: pytest.MonkeyPatch) -> None:
    both = pair(lambda params, backend: plain(params, "auto" if backend == "cuda" else backend))
    for optimizer, params in both:
        train(optimizer, params, range(2))
    other = Grouping()
    monkeypatch.setitem(registry._backends, "cuda", other.backend())
    calls = len(grouped.calls)
    for optimizer, params in both:
        train(optimizer, params, range(2, 6))
    assert len(grouped.calls) == calls
    assert other.calls
    compare(both)


def take_nothing(monkeypatch: pytest.MonkeyPatch) -> list[UpdateGroup]:
    """A backend "cuda" whose groups hold no tensor and do nothing; for each made there is a None in the list."""
    made: list[Any] = []

    def group(group: UpdateGroup) -> GroupUpdate:
        made.append(None)
        return lambda grads, options: None

    monkeypatch.setitem(registry._backends, "cuda", replace(Grouping().backend(), group=group))
    return made


def test_an_id_that_comes_again_is_another_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    made = take_nothing(monkeypatch)
    (optimizer, params), _ = pair()
    train(optimizer, params, range(3))
    made.clear()
    state = optimizer.state[params["tall0"]]
    values, seen = state["exp_avg_sq"].clone(), id(state["exp_avg_sq"])
    state["exp_avg_sq"] = None
    others = [values.detach() for _ in range(10000)]
    again = [other for other in others if id(other) == seen]
    assert again, "the test needs the id of a tensor that is gone"
    state["exp_avg_sq"] = again[0]
    train(optimizer, params, [1])
    assert len(made) == len(KINDS)


def test_a_plan_keeps_no_gradients_and_what_is_replaced_until_the_next_step(cuda_stand_in: str) -> None:
    (optimizer, params), _ = pair()
    for step in range(2):
        set_grads(params, step)
        optimizer.step()
    gradients = [weakref.ref(param.grad) for param in params.values()]
    optimizer.zero_grad()
    assert not [gradient for gradient in gradients if gradient() is not None]
    replaced = []
    for state in optimizer.state.values():
        for key in ("exp_avg", "exp_avg_sq", "basis"):
            if key in state:
                replaced.append(weakref.ref(state[key]))
                state[key] = state[key].clone()
    set_grads(params, 2)
    optimizer.step()
    assert not [tensor for tensor in replaced if tensor() is not None]


def test_versions_count_the_updates(grouped: Grouping) -> None:
    (optimizer, params), _ = pair()
    steps([(optimizer, params)], range(1))
    for _ in range(2):
        set_grads(params, 1)
        before = {name: param._version for name, param in params.items()}
        optimizer.step()
        assert all(param._version > before[name] for name, param in params.items())
