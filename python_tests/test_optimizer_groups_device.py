"""Groups on a device: nothing is read, refreshes and reports come all the same; failures, and CUDA graphs."""

from __future__ import annotations

import copy
import math
import warnings
from typing import Any

import pytest
import torch
from grouping import SHAPES, Grouping, compare, install, pair, steps, take_for_device
from optimizer_cases import OPTIONS, assert_same_snapshot, make_params, set_grads, snapshot, train
from torch import Tensor

from galore_kernels import GaLoreFusedAdam8bit, GaLoreFusedAdamW, NonFiniteGradientWarning
from galore_kernels.optim import multi_tensor, refresh, skip_monitor
from galore_kernels.optim.rules import rule as rule_module
from galore_kernels.subspace import Subspace, find_subspaces


@pytest.fixture(params=["host", "device"])
def grouped(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Grouping:
    """Backend "cuda", whose tensors are in turn the CPU's, and taken for a device's."""
    grouping = install(monkeypatch)
    if request.param == "device":
        take_for_device(grouping, monkeypatch)
    return grouping


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Grouping:
    """Backend "cuda", whose tensors are taken for a device's."""
    grouping = install(monkeypatch)
    take_for_device(grouping, monkeypatch)
    return grouping


# ---------------------------------------------------------------------- nothing is read


class RefreshSpy:
    """Counts refreshes by step."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[int] = []
        self.step = 0

        def spy(grads: list[Tensor], *args: Any, **kwargs: Any) -> list[Subspace]:
            self.seen += [self.step] * len(grads)
            return find_subspaces(grads, *args, **kwargs)

        monkeypatch.setattr(refresh, "find_subspaces", spy)


@pytest.mark.parametrize("kind", ["constant", "scheduled", "of a device"])
def test_a_plain_step_reads_nothing_from_a_device(device: Grouping, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    params = make_params(SHAPES)
    optimizer = GaLoreFusedAdam8bit(params.values(), **{**OPTIONS, "update_proj_gap": 40}, backend="cuda")
    if kind == "of a device":
        # One of a device is not read: see test_optimizer_groups_parts.py.
        monkeypatch.setattr(rule_module, "check_lr", lambda *_: None)
        optimizer.param_groups[0]["lr"] = torch.tensor(0.01)
    spy = RefreshSpy(monkeypatch)
    reads = []
    for step in range(85):
        spy.step = step
        set_grads(params, 0)
        if kind == "scheduled":
            optimizer.param_groups[0]["lr"] = 0.01 / (step + 1)
        device.forbidden = step % 40 > 1
        device.reads = 0
        optimizer.step()
        device.forbidden = False
        reads.append(device.reads)
    assert sorted(set(spy.seen)) == [0, 40, 80]
    assert [step for step, count in enumerate(reads) if count] == [0, 40, 80]
    assert len(device.on_host) > 4  # the monitor has looked


def test_a_refresh_is_due_when_the_device_says_so(device: Grouping, monkeypatch: pytest.MonkeyPatch) -> None:
    # Skipped steps don't count: what the host estimates runs ahead, and is put right by a read.
    both = pair(lambda params, backend: GaLoreFusedAdamW(list(params.items()), **OPTIONS, backend=backend))
    refreshed = []
    for optimizer, params in both:
        spy = RefreshSpy(monkeypatch)
        for step in range(20):
            spy.step = step
            set_grads(params, step)
            for name, bad in (("tall0", (1, 2, 6, 9)), ("wide1", (3, 4)), ("small2", (0, 1, 13)), ("norm0", (2,))):
                if step in bad:
                    params[name].grad = torch.full_like(params[name], math.nan)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", NonFiniteGradientWarning)
                optimizer.step()
        refreshed.append(spy.seen)
    compare(both)
    assert refreshed[0] == refreshed[1]


# ---------------------------------------------------------------------- skips


def test_a_skip_is_reported_at_once_where_reading_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)
    (optimizer, params), _ = pair()
    steps([(optimizer, params)], range(1))
    set_grads(params, 1)
    params["norm1"].grad = torch.full_like(params["norm1"], math.nan)
    with pytest.warns(NonFiniteGradientWarning, match=r'"norm1".*\(1 skipped so far\)') as caught:
        optimizer.step()
    assert [warning.filename for warning in caught] == [__file__]


def test_reports_of_a_group_thin_out(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)
    (optimizer, params), _ = pair()
    train(optimizer, params, range(1))
    reported = []
    for step in range(1, 10):
        set_grads(params, step)
        params["norm1"].grad = torch.full_like(params["norm1"], math.nan)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizer.step()
        reported += [step] * len(caught)
    assert reported == [1, 2, 4, 8]


def test_a_skip_that_a_refresh_comes_upon_is_reported_then(device: Grouping) -> None:
    (optimizer, params), _ = pair()
    for step in range(5):
        set_grads(params, step)
        if step == 2:  # after the monitor's first look, long before its second
            params["tall1"].grad = torch.full_like(params["tall1"], math.nan)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizer.step()
        assert ["tall1" in str(warning.message) for warning in caught] == [True] * (step == 4)


def test_a_skip_on_a_device_is_reported_later_and_once(device: Grouping) -> None:
    (optimizer, params), _ = pair()
    reports: list[tuple[int, str]] = []
    for step in range(1, 80):
        set_grads(params, 1)
        if step in (2, 5, 6, 7, 30):  # 30 is a refresh of all but this one, whose counter is behind
            params["tall1"].grad = torch.full_like(params["tall1"], math.nan)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizer.step()
        reports += [(step, str(warning.message)) for warning in caught]
        assert all(warning.filename == __file__ for warning in caught)
    assert optimizer.skipped_steps() == {'param group 0, parameter 5 ("tall1")': 5}
    assert 1 <= len(reports) <= 3
    assert all('"tall1"' in text for _, text in reports)
    assert "(4 skipped so far)" in reports[-1][1] or "(5 skipped so far)" in reports[-1][1]
    assert reports[-1][0] <= 7 + 2 * skip_monitor.CALLS_BETWEEN_LOOKS


# ---------------------------------------------------------------------- failures


def test_a_failure_in_the_second_group_and_a_retry(grouped: Grouping) -> None:
    for numbers in (range(1, 2), range(3, 4)):  # a plain step; a refresh, whose full-rank tensors are grouped
        for failing in (1, 2):
            both = pair()
            for optimizer, params in both:
                train(optimizer, params, range(numbers.start))
                set_grads(params, 7)
            grouped.fail_at = len(grouped.calls) + failing
            with pytest.raises(MemoryError):
                both[0][0].step()
            updated = [name for name, p in both[0][1].items() if float(both[0][0].state[p]["step"]) > numbers.start]
            assert len(updated) == 3 * (failing - 1)
            both[0][0].step()
            both[1][0].step()
            compare(both)
            steps(both, range(8, 13))
            compare(both)


def test_after_a_failure_new_gradients_are_a_new_step(grouped: Grouping) -> None:
    (optimizer, params), _ = pair()
    train(optimizer, params, range(2))
    set_grads(params, 2)
    grouped.fail_at = len(grouped.calls) + 2
    with pytest.raises(MemoryError):
        optimizer.step()
    set_grads(params, 3)
    optimizer.step()
    assert sorted(float(optimizer.state[param]["step"]) for param in params.values()) == [3.0] * 12 + [4.0] * 3


def test_after_a_failure_a_loaded_state_is_a_new_start(grouped: Grouping) -> None:
    both = pair()
    for optimizer, params in both:
        train(optimizer, params, range(2))
        set_grads(params, 2)
    (optimizer, params), (alone, _) = both
    saved = copy.deepcopy(optimizer.state_dict())
    weights = {name: param.detach().clone() for name, param in params.items()}
    grouped.fail_at = len(grouped.calls) + 2
    with pytest.raises(MemoryError):
        optimizer.step()
    optimizer.load_state_dict(saved)
    with torch.no_grad():
        for name, param in params.items():
            param.copy_(weights[name])
    optimizer.step()
    alone.step()
    compare(both)


# ---------------------------------------------------------------------- checks


def sparse(params: dict[str, Any]) -> None:
    params["wide1"].grad = torch.zeros(20, 300).to_sparse()


def double(params: dict[str, Any]) -> None:
    params["wide1"].grad_dtype = None
    params["wide1"].grad = torch.zeros(20, 300, dtype=torch.float64)


def inference(params: dict[str, Any]) -> None:
    with torch.inference_mode():
        params["wide1"].grad = torch.ones(20, 300)


def cut(params: dict[str, Any]) -> None:
    params["wide1"].data = params["wide1"].data[:10]  # at the same address


def cut_grad(params: dict[str, Any]) -> None:
    params["wide1"].grad.data = params["wide1"].grad.data[:10]


def cast(params: dict[str, Any]) -> None:
    params["wide1"].data = params["wide1"].data.double()


BAD_TENSORS = {f.__name__: f for f in (sparse, double, inference, cut, cut_grad, cast)}


@pytest.mark.parametrize("bad", BAD_TENSORS)
def test_a_bad_tensor_is_refused_in_any_step_and_nothing_changes(grouped: Grouping, bad: str) -> None:
    (optimizer, params), _ = pair()
    train(optimizer, params, range(3))
    set_grads(params, 4)
    BAD_TENSORS[bad](params)
    before = snapshot(optimizer, params)
    with pytest.raises(ValueError, match=r'\("wide1"\): '):
        optimizer.step()
    assert_same_snapshot(snapshot(optimizer, params), before)


def test_a_sparse_gradient_after_a_strided_one(grouped: Grouping) -> None:
    (optimizer, params), _ = pair()
    train(optimizer, params, range(1))
    for step in (1, 2):
        set_grads(params, step)
        params["wide1"].grad = torch.ones(300, 20).T
        optimizer.step()
    sparse(params)
    with pytest.raises(ValueError, match="densify"):
        optimizer.step()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("lr", -1.0),
        ("lr", math.nan),
        ("lr", math.inf),
        ("lr", "0.1"),
        ("lr", True),
        ("lr", torch.tensor(-1.0)),
        ("betas", (0.9, 1.0)),
        ("betas", 0.9),
        ("eps", math.nan),
        ("scale", 0.0),
        ("weight_decay", -1.0),
        ("update_proj_gap", 3.0),  # equals the 3 that is there, and is no integer
        ("proj_type", "rigth"),
    ],
)
def test_a_bad_option_is_refused_in_any_step_and_nothing_changes(grouped: Grouping, key: str, value: Any) -> None:
    (optimizer, params), _ = pair()
    train(optimizer, params, range(3))
    set_grads(params, 4)
    before = snapshot(optimizer, params)
    good = optimizer.param_groups[0][key]
    optimizer.param_groups[0][key] = value
    with pytest.raises(ValueError, match=f"^{key}=.* in param group 0: "):
        optimizer.step()
    optimizer.param_groups[0][key] = good
    assert_same_snapshot(snapshot(optimizer, params), before)


# ---------------------------------------------------------------------- CUDA graphs


def test_a_captured_step_reads_nothing_and_its_replays_are_counted(
    device: Grouping, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = pair()
    (optimizer, params), (alone, alone_params) = both
    for each, own in both:
        each.param_groups[0]["update_proj_gap"] = 4
        train(each, own, range(2))
    set_grads(params, 2)
    made = len(device.made)
    with monkeypatch.context() as patch:
        patch.setattr(multi_tensor, "capturing", lambda devices: True)
        device.forbidden = True
        optimizer.step()
        device.forbidden = False
        captured = device.calls[-5:]
        assert len(device.made) == made + 5  # a plan of its own
        made += 5
    train(alone, alone_params, [2])
    bases = {name: optimizer.state[param].get("basis") for name, param in params.items()}
    # A replay does what the capture did, to the same memory.
    device.calls.clear()
    with torch.no_grad():
        for group in optimizer._captured[0].groups:
            group.run([param.grad for param in params.values()], captured[0][2])
    train(alone, alone_params, [2])
    compare(both)
    # The fifth step is a refresh, which the host can't know of without asking.
    train(optimizer, params, range(3, 9))
    train(alone, alone_params, range(3, 9))
    compare(both)
    # A graph goes on reading the memory that the bases had.
    assert all(optimizer.state[params[name]].get("basis") is basis for name, basis in bases.items())


@pytest.mark.parametrize("what", ["fresh", "refresh", "strided", "unknown"])
def test_a_step_that_a_graph_cannot_hold_is_refused_and_nothing_changes(
    device: Grouping, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (optimizer, params), _ = pair()
    if what == "strided":
        params["norm1"].data = torch.ones(140)[::2]
    train(optimizer, params, range({"fresh": 0, "refresh": 3}.get(what, 2)))
    if what == "unknown":
        optimizer.load_state_dict(optimizer.state_dict())
    set_grads(params, 7)
    before = snapshot(optimizer, params)
    with monkeypatch.context() as patch:
        patch.setattr(multi_tensor, "capturing", lambda devices: True)
        device.forbidden = True
        name = "norm1" if what == "strided" else "tall0"
        with pytest.raises(RuntimeError, match=rf'"{name}".*outside of the capture'):
            optimizer.step()
        device.forbidden = False
    assert_same_snapshot(snapshot(optimizer, params), before)
    optimizer.step()
    assert all(float(state["step"]) >= 1 for state in optimizer.state.values())


def test_a_number_as_lr_is_uploaded_when_it_changes_and_is_the_graphs_own_in_a_capture(
    device: Grouping, monkeypatch: pytest.MonkeyPatch
) -> None:
    (optimizer, params), _ = pair()
    used = []
    for step, lr in enumerate((0.1, 0.1, 0.1, 0.2)):
        set_grads(params, step)
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        if device.calls:
            used.append((device.calls[-1][2].lr, float(device.calls[-1][2].lr)))
    assert [value for _, value in used] == [0.1, 0.1, 0.2]
    assert len({id(tensor) for tensor, _ in used}) == 1
    monkeypatch.setattr(multi_tensor, "capturing", lambda devices: True)
    optimizer.step()
    captured = device.calls[-1][2].lr
    assert float(captured) == 0.2
    assert captured is not used[0][0]


def test_a_tensor_as_lr_is_passed_on_as_it_is(device: Grouping) -> None:
    lr = torch.tensor(0.1)
    (optimizer, params), _ = pair()
    optimizer.param_groups[0]["lr"] = lr
    train(optimizer, params, range(3))
    assert {id(options.lr) for *_, options in device.calls} == {id(lr)}
