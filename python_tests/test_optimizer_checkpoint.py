"""State dicts: resuming is not having stopped, across backends, dtypes and files."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from optimizer_cases import (
    EVERY_OPTIMIZER,
    OPTIONS,
    SHAPES,
    OptimizerClass,
    assert_same_snapshot,
    clone_params,
    flatten,
    make_params,
    snapshot,
    train,
)
from torch import Tensor, nn
from torch.optim import lr_scheduler
from update_cases import assert_same_bits

from galore_kernels import GaLoreFusedAdam8bit, GaLoreFusedAdamW, checkpoint

Params = dict[str, nn.Parameter]


def in_memory(state_dict: Any, _: Path) -> Any:
    return copy.deepcopy(state_dict)


def through_torch_save(state_dict: Any, _: Path) -> Any:
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def through_checkpoint(state_dict: Any, folder: Path) -> Any:
    checkpoint.save(state_dict, folder / "optimizer.pt")
    return checkpoint.load(folder / "optimizer.pt")


WAYS: list[Callable[[Any, Path], Any]] = [in_memory, through_torch_save, through_checkpoint]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("optimizer_class", EVERY_OPTIMIZER)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stop", [2, 3])  # in the middle of a period, and right before a refresh
def test_resuming_is_bitwise_not_having_stopped(
    backend: str,
    way: Callable[[Any, Path], Any],
    optimizer_class: OptimizerClass,
    dtype: torch.dtype,
    stop: int,
    tmp_path: Path,
) -> None:
    # The seed is the first run's: it comes back with the state, as lr does.
    options: dict[str, Any] = {**OPTIONS, "stochastic_rounding": True, "seed": 7}
    params = make_params(dtype=dtype)
    optimizer = optimizer_class(list(params.items()), **options, backend=backend)
    scheduler = lr_scheduler.CosineAnnealingLR(optimizer, T_max=9)
    for step in range(stop):
        train(optimizer, params, [step])
        scheduler.step()
    saved = way({"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}, tmp_path)

    resumed_params = clone_params(params)
    resumed = optimizer_class(list(resumed_params.items()), rank=16, stochastic_rounding=False, lr=0.5, backend=backend)
    resumed_scheduler = lr_scheduler.CosineAnnealingLR(resumed, T_max=9)
    resumed.load_state_dict(saved["optimizer"])
    resumed_scheduler.load_state_dict(saved["scheduler"])
    for run, run_params, run_scheduler in (
        (optimizer, params, scheduler),
        (resumed, resumed_params, resumed_scheduler),
    ):
        for step in range(stop, 7):
            train(run, run_params, [step])
            run_scheduler.step()
    assert_same_snapshot(snapshot(resumed, resumed_params), snapshot(optimizer, params))


def test_a_state_dict_is_tensors_and_plain_data(backend: str) -> None:
    params = make_params()
    optimizer = GaLoreFusedAdam8bit(list(params.items()), **OPTIONS, backend=backend)
    train(optimizer, params, range(2))
    kinds = {type(leaf) for leaf in flatten(optimizer.state_dict()).values()}
    assert kinds <= {Tensor, int, float, str, bool, type(None)}
    assert optimizer.state_dict()["galore_kernels"]["format_version"] == 2
    assert optimizer.state_dict()["state"][0]["block_size"] == 256


@pytest.mark.parametrize("optimizer_class", EVERY_OPTIMIZER)
@pytest.mark.parametrize(("saver", "loader"), [("reference", "cpu"), ("cpu", "reference")])
def test_loads_across_backends(saver: str, loader: str, optimizer_class: OptimizerClass) -> None:
    params = make_params()
    optimizer = optimizer_class(params.values(), **OPTIONS, backend=saver)
    train(optimizer, params, range(2))
    loaded_params = clone_params(params)
    loaded = optimizer_class(loaded_params.values(), **OPTIONS, backend=loader)
    loaded.load_state_dict(optimizer.state_dict())
    assert_same_snapshot(snapshot(loaded, loaded_params), snapshot(optimizer, params))
    train(optimizer, params, [2])
    train(loaded, loaded_params, [2])
    for name, param in params.items():
        torch.testing.assert_close(loaded_params[name], param, rtol=0, atol=1e-4)


@pytest.mark.parametrize("optimizer_class", EVERY_OPTIMIZER)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_loading_into_a_model_of_another_dtype_casts_nothing(
    backend: str, optimizer_class: OptimizerClass, dtype: torch.dtype
) -> None:
    # torch.optim casts every tensor but "step" to the weight's dtype: codes, absmax and the basis would be ruined.
    source = torch.float32 if dtype != torch.float32 else torch.bfloat16
    params = make_params(dtype=source)
    optimizer = optimizer_class(params.values(), **OPTIONS, backend=backend)
    train(optimizer, params, range(2))
    other_params = {name: nn.Parameter(param.detach().to(dtype)) for name, param in params.items()}
    other = optimizer_class(other_params.values(), **OPTIONS, backend=backend)
    other.load_state_dict(optimizer.state_dict())
    for name, param in params.items():
        for key, value in optimizer.state[param].items():
            if isinstance(value, Tensor):
                assert_same_bits(other.state[other_params[name]][key], value, f"{name} {key}")
    before = clone_params(other_params)
    train(other, other_params, range(2, 5))  # over a refresh, which brings the basis to the new dtype
    for name, param in other_params.items():
        assert bool(torch.isfinite(param).all())
        assert not torch.equal(param, before[name])
        assert other.state[param].get("basis", param).dtype == dtype


def test_loading_copies(backend: str) -> None:
    params = make_params()
    first = GaLoreFusedAdam8bit(params.values(), **{**OPTIONS, "lr": torch.tensor(0.01)}, backend=backend)
    train(first, params, range(2))
    saved = first.state_dict()
    frozen = copy.deepcopy(saved)
    loaded_params = clone_params(params)
    loaded = GaLoreFusedAdam8bit(loaded_params.values(), **OPTIONS, backend=backend)
    loaded.load_state_dict(saved)
    train(loaded, loaded_params, range(2, 6))
    loaded.param_groups[0]["lr"].fill_(0.7)
    assert_same_snapshot(flatten(saved), flatten(frozen))  # the run hasn't written into the dict
    other_params = clone_params(loaded_params)
    other = GaLoreFusedAdam8bit(other_params.values(), **OPTIONS, backend=backend)
    other.load_state_dict(frozen)
    before = snapshot(other, other_params)
    for state in frozen["state"].values():
        for value in state.values():
            if isinstance(value, Tensor):
                value.fill_(1)
    frozen["param_groups"][0]["lr"].fill_(9.0)
    assert_same_snapshot(snapshot(other, other_params), before)  # nor does the dict reach into the run


@pytest.mark.parametrize("optimizer_class", EVERY_OPTIMIZER)
def test_loading_into_a_used_optimizer_leaves_nothing_of_its_past(
    backend: str, optimizer_class: OptimizerClass
) -> None:
    params = make_params()
    optimizer = optimizer_class(params.values(), **OPTIONS, backend=backend)
    train(optimizer, {name: params[name] for name in ("tall", "bias")}, [0])  # the others have no state yet
    saved = copy.deepcopy(optimizer.state_dict())
    results = []
    for past in (0, 4):
        current = make_params()
        used = optimizer_class(current.values(), **{**OPTIONS, "lr": 0.5}, backend=backend)
        train(used, current, range(past))
        for name, param in params.items():
            current[name].data.copy_(param)
        used.load_state_dict(saved)
        train(used, current, range(1, 5))
        results.append(snapshot(used, current))
    assert_same_snapshot(*results)


def test_a_fresh_optimizer_saves_and_loads(backend: str) -> None:
    # Accelerate loads the state dict of an optimizer that hasn't taken a step.
    params = make_params()
    optimizer = GaLoreFusedAdamW(params.values(), **OPTIONS, backend=backend)
    optimizer.load_state_dict(optimizer.state_dict())
    expected_params = make_params()
    expected = GaLoreFusedAdamW(expected_params.values(), **OPTIONS, backend=backend)
    train(optimizer, params, range(2))
    train(expected, expected_params, range(2))
    assert_same_snapshot(snapshot(optimizer, params), snapshot(expected, expected_params))


def test_state_of_a_loaded_optimizer_still_makes_entries(backend: str) -> None:
    # torch.optim's state is a defaultdict, and code around it (FSDP's among it) counts on that.
    params = make_params()
    optimizer = GaLoreFusedAdamW(params.values(), **OPTIONS, backend=backend)
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.state[params["tall"]] == {}


def test_replaying_a_step_from_a_checkpoint_repeats_it(backend: str) -> None:
    params = make_params()
    optimizer = GaLoreFusedAdam8bit(params.values(), **OPTIONS, backend=backend)
    train(optimizer, params, range(3))
    saved, weights = copy.deepcopy(optimizer.state_dict()), clone_params(params)
    results = []
    for _ in range(2):
        optimizer.load_state_dict(saved)
        for name, param in params.items():
            param.data.copy_(weights[name])
        train(optimizer, params, range(3, 5))
        results.append(snapshot(optimizer, params))
    assert_same_snapshot(*results)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_names_under_ddp_and_compile_are_the_same_names(prefix: str) -> None:
    params = make_params()
    optimizer = GaLoreFusedAdamW([(prefix + name, param) for name, param in params.items()], **OPTIONS)
    train(optimizer, params, [0])
    plain = GaLoreFusedAdamW(list(params.items()), **OPTIONS)
    plain.load_state_dict(optimizer.state_dict())
    assert plain.param_groups[0]["param_names"] == list(SHAPES)
    optimizer.load_state_dict(plain.state_dict())
    assert optimizer.param_groups[0]["param_names"] == [prefix + name for name in SHAPES]
