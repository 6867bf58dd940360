"""Ctrl-C, warnings as errors and foreign hands, in the middle of a step: what they leave behind."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from grouping import compare, install, pair
from interrupts import interrupted
from optimizer_cases import assert_same_snapshot, clone_params, make_params, set_grads, snapshot, train
from torch import nn

from galore_kernels import GaLoreFusedAdam8bit, NonFiniteGradientWarning, _native, ops
from galore_kernels.backends.cuda import CudaStages
from galore_kernels.ops import registry


@pytest.mark.parametrize("taken", [0, 2, 3])  # a step that makes the state, a refresh, a plain one
def test_an_interrupt_while_a_kernel_runs_loses_nothing(
    backend: str, taken: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Strided, so that no backend updates them together.
    shapes = {"first": (400, 60), "second": (400, 60), "third": (400, 60), "norm": (50,)}
    undisturbed, params = make_params(shapes), make_params(shapes)
    whole = torch.zeros(400, 120)
    for each in (undisturbed, params):
        for name in ("first", "second", "third"):
            each[name].data = whole.clone()[:, ::2].copy_(each[name].data)
    expected = GaLoreFusedAdam8bit(undisturbed.values(), rank=16, update_proj_gap=2, backend=backend)
    optimizer = GaLoreFusedAdam8bit(params.values(), rank=16, update_proj_gap=2, backend=backend)
    train(expected, undisturbed, range(taken + 1))
    train(optimizer, params, range(taken))
    set_grads(params, taken)
    native = backend == "cpu"
    where: Any = _native if native else ops
    with interrupted(where, "cpu_galore_update" if native else "galore_update", monkeypatch):
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                optimizer.step()
    optimizer.step()
    assert_same_snapshot(snapshot(optimizer, params), snapshot(expected, undisturbed))


@pytest.mark.parametrize("after", [False, True])  # before the group's call has begun, and while it runs
def test_an_interrupt_of_a_group(after: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = {"first": (400, 60), "second": (400, 60), "norm": (50,)}
    undisturbed, params = make_params(shapes), make_params(shapes)
    expected, optimizer = (GaLoreFusedAdam8bit(own.values(), rank=16, backend="cpu") for own in (undisturbed, params))
    train(expected, undisturbed, range(4))
    train(optimizer, params, range(3))
    set_grads(params, 3)
    with interrupted(_native, "cpu_galore_update", monkeypatch, after=after), pytest.raises(KeyboardInterrupt):
        optimizer.step()
    steps = [float(optimizer.state[params[name]]["step"]) for name in ("first", "second")]
    assert steps == ([4, 4] if after else [3, 3])
    optimizer.step()
    assert_same_snapshot(snapshot(optimizer, params), snapshot(expected, undisturbed))


@contextlib.contextmanager
def cut_off_writes(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Of a group's new addresses only two are written."""
    write = CudaStages.write_column

    def cut_off(stages: CudaStages, table: torch.Tensor, column: int, values: Any) -> None:
        write(stages, table[:2], column, values[:2])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(CudaStages, "write_column", cut_off)
        yield


def test_an_interrupt_while_addresses_are_written(cuda_stand_in: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = {f"norm{i}": (70,) for i in range(6)}
    runs = []
    for interrupt in (False, True):
        params = make_params(shapes)
        optimizer = GaLoreFusedAdam8bit(params.values(), backend="cuda")
        first, second = ({name: torch.empty_like(param) for name, param in params.items()} for _ in range(2))

        def fill(buffers: dict[str, torch.Tensor], step: int, params: dict[str, nn.Parameter] = params) -> None:
            set_grads(params, step)
            for name, param in params.items():
                assert param.grad is not None
                param.grad = buffers[name].copy_(param.grad)

        for step in range(3):
            fill(first, step)
            optimizer.step()
        if interrupt:
            fill(second, 50)
            with cut_off_writes(monkeypatch), pytest.raises(KeyboardInterrupt):
                optimizer.step()
            optimizer.zero_grad()
        fill(first, 3)  # at the addresses of the last whole step
        optimizer.step()
        runs.append(snapshot(optimizer, params))
    assert_same_snapshot(runs[1], runs[0])


def test_a_group_that_is_called_again_after_a_cut_off_write(
    cuda_stand_in: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = [torch.ones(70) for _ in range(4)]
    states = [ops.AdamState.zeros((70,), eight_bit=False) for _ in weights]
    make = registry.select("adam8bit_update", "cuda", torch.device("cpu")).group
    assert make is not None
    update = make(ops.group.UpdateGroup("adam8bit_update", tuple(weights), tuple(states)))
    options = ops.AdamOptions(torch.tensor(0.1))
    ones, others = ([torch.full((70,), value) for _ in weights] for value in (1.0, -1.0))
    update(ones, options)
    with cut_off_writes(monkeypatch), pytest.raises(KeyboardInterrupt):
        update(others, options)
    update(ones, options)
    assert all(torch.equal(weight, weights[0]) for weight in weights)


def test_a_report_that_raises_at_the_end_leaves_no_interrupted_step() -> None:
    params = make_params({"first": (50,), "last": (60,)})
    optimizer = GaLoreFusedAdam8bit(params.values(), backend="reference")
    train(optimizer, params, range(2))
    set_grads(params, 2)
    params["last"].grad = torch.full_like(params["last"], torch.nan)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(NonFiniteGradientWarning):
            optimizer.step()
    # A graph's replay writes gradients without autograd's knowledge, as ``.data`` does.
    for param in params.values():
        assert param.grad is not None
        param.grad.data.fill_(0.1)
    optimizer.step()
    assert [int(optimizer.state[param]["step"]) for param in params.values()] == [4, 3]


def test_a_warning_names_the_users_line_under_a_scheduler() -> None:
    params = make_params({"norm": (50,)})
    optimizer = GaLoreFusedAdam8bit(params.values(), backend="reference")
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    params["norm"].grad = torch.full_like(params["norm"], torch.nan)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer.step()
    assert [warning.filename for warning in caught] == [__file__]


def test_what_others_keep_in_the_state_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)
    both = pair()
    stranger = nn.Parameter(torch.ones(3))
    for optimizer, params in both:
        optimizer.state[stranger]["ema"] = 1
        optimizer.state["mine"] = 7  # type: ignore[index]
        train(optimizer, params, range(3))
        assert optimizer.state.pop(stranger) == {"ema": 1}
        assert optimizer.state.pop("mine") == 7  # type: ignore[call-overload]
    compare(both)


@pytest.mark.parametrize("key", ["exp_avg", "exp_avg_sq"])
def test_a_state_tensor_that_moves_is_found_where_it_is(cuda_stand_in: str, key: str) -> None:
    both = []
    for moved in (False, True):
        params = clone_params(make_params({"a": (300, 20), "b": (300, 20)}))
        optimizer = GaLoreFusedAdam8bit(params.values(), rank=8, backend="cuda")
        train(optimizer, params, range(3))
        if moved:
            for param in params.values():
                tensor = optimizer.state[param][key]
                tensor.data = tensor.data.clone()
        train(optimizer, params, range(3, 5))
        both.append((optimizer, params))
    assert_same_snapshot(snapshot(*both[1]), snapshot(*both[0]))


def test_moments_that_were_cast_are_refused_before_anything_changes(backend: str) -> None:
    params = make_params({"a": (300, 20), "b": (300, 20)})
    optimizer = GaLoreFusedAdam8bit(params.values(), rank=16, backend=backend)
    train(optimizer, params, range(2))
    state = optimizer.state[params["b"]]
    state["exp_avg_sq"] = state["exp_avg_sq"].bfloat16()
    set_grads(params, 2)
    before = snapshot(optimizer, params)
    with pytest.raises(ValueError, match=r"parameter 1.*was cast"):
        optimizer.step()
    assert_same_snapshot(snapshot(optimizer, params), before)
