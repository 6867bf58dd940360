"""Bad options and parameters are refused when they are given, by name and with a remedy; nothing changes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from optimizer_cases import OPTIMIZERS, OPTIONS, assert_same_snapshot, make_params, set_grads, snapshot, train
from torch import Tensor, nn
from torch.optim import lr_scheduler

from galore_kernels import GaLoreFusedAdam8bit, GaLoreFusedAdamW
from galore_kernels.optim.base import LowRankOptimizer

#: option, bad value, what the error says of the remedy
BAD_OPTIONS: list[tuple[str, Any, str]] = [
    ("lr", -1.0, "expected a finite number >= 0"),
    ("lr", math.nan, "expected a finite number >= 0"),
    ("lr", math.inf, "expected a finite number >= 0"),
    ("lr", torch.tensor(-1.0), "expected a finite number >= 0"),
    ("lr", torch.ones(2), "expected a finite number >= 0"),
    ("lr", "0.1", "expected a finite number >= 0"),
    ("lr", True, "expected a finite number >= 0"),
    ("eps", -1e-8, "1e-8 is usual"),
    ("eps", math.nan, "1e-8 is usual"),
    ("betas", (1.0, 0.999), r"two numbers in \[0, 1\)"),
    ("betas", (0.9, -0.1), r"two numbers in \[0, 1\)"),
    ("betas", (0.9, math.nan), r"two numbers in \[0, 1\)"),
    ("betas", (0.9,), r"two numbers in \[0, 1\)"),
    ("betas", (0.9, 0.99, 0.999), r"two numbers in \[0, 1\)"),
    ("betas", 0.9, r"two numbers in \[0, 1\)"),
    ("weight_decay", -0.1, "0 turns it off"),
    ("weight_decay", math.inf, "0 turns it off"),
    ("rank", 0, "rank=None keeps the group at full rank"),
    ("rank", -3, "rank=None keeps the group at full rank"),
    ("rank", 8.0, "rank=None keeps the group at full rank"),
    ("rank", True, "rank=None keeps the group at full rank"),
    ("rank", "8", "rank=None keeps the group at full rank"),
    ("update_proj_gap", 0, "200 is GaLore's default"),
    ("update_proj_gap", -1, "200 is GaLore's default"),
    ("update_proj_gap", 2.5, "200 is GaLore's default"),
    ("scale", 0.0, "0.25 is GaLore's default"),
    ("scale", math.nan, "0.25 is GaLore's default"),
    ("proj_type", "rigth", 'did you mean "right"'),
    ("proj_type", "continuous", "one of std, reverse_std, left, right, full"),
    ("proj_type", None, "one of std, reverse_std, left, right, full"),
    ("refresh_method", "randomised", 'did you mean "randomized"'),
    ("stochastic_rounding", 1, "True or False"),
    ("maximize", "yes", "True or False"),
    ("project_nd", None, "True or False"),
    ("seed", -1, "an integer >= 0"),
    ("seed", 0.5, "an integer >= 0"),
]

IDS = [f"{key}={value}" for key, value, _ in BAD_OPTIONS]


@pytest.mark.parametrize("optimizer_class", OPTIMIZERS)
@pytest.mark.parametrize(("key", "value", "remedy"), BAD_OPTIONS, ids=IDS)
def test_a_bad_option(optimizer_class: type[LowRankOptimizer], key: str, value: Any, remedy: str) -> None:
    with pytest.raises(ValueError, match=rf"{key}=.*{optimizer_class.__name__}.*{remedy}"):
        optimizer_class([nn.Parameter(torch.zeros(3, 4))], **{key: value})


@pytest.mark.parametrize(("key", "value", "remedy"), BAD_OPTIONS, ids=IDS)
def test_a_bad_option_inside_a_group(key: str, value: Any, remedy: str) -> None:
    good = {"params": [("good", nn.Parameter(torch.zeros(3, 4)))]}
    bad = {"params": [("layer.weight", nn.Parameter(torch.zeros(3, 4)))], key: value}
    message = rf'{key}=.*param group 1 \("layer.weight"\).*{remedy}'
    with pytest.raises(ValueError, match=message):
        GaLoreFusedAdamW([good, bad])
    optimizer = GaLoreFusedAdamW([good])
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group(bad)
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(
    ("typo", "meant"),
    [
        ("rnak", "rank"),
        ("ranks", "rank"),
        ("update_proj_gpa", "update_proj_gap"),
        ("updateprojgap", "update_proj_gap"),
        ("scael", "scale"),
        ("projtype", "proj_type"),
        ("weight_deacy", "weight_decay"),
        ("beta", "betas"),
        ("lrs", "lr"),
    ],
)
def test_a_misspelt_key_in_a_group(typo: str, meant: str) -> None:
    group = {"params": [nn.Parameter(torch.zeros(3, 4))], typo: 1}
    with pytest.raises(ValueError, match=rf'unknown key "{typo}" in param group 0: did you mean "{meant}"'):
        GaLoreFusedAdamW([group])


@pytest.mark.parametrize("key", ["initial_lr", "max_lr", "min_lr", "name", "lr_scale", "layer", "base_momentum"])
def test_other_libraries_keys_in_a_group_are_kept(key: str) -> None:
    optimizer = GaLoreFusedAdamW([{"params": [nn.Parameter(torch.zeros(3, 4))], key: 1}])
    assert optimizer.param_groups[0][key] == 1


def test_a_misspelt_argument() -> None:
    with pytest.raises(TypeError, match="update_proj_gpa"):
        GaLoreFusedAdamW([nn.Parameter(torch.zeros(3, 4))], update_proj_gpa=3)  # type: ignore[call-arg]


def test_an_unknown_backend_lists_those_there_are() -> None:
    with pytest.raises(ValueError, match=r"backend='cupy'.*auto, .*cpu, reference; choose"):
        GaLoreFusedAdamW([nn.Parameter(torch.zeros(3, 4))], backend="cupy")


# ---------------------------------------------------------------------- set later

SET_LATER: list[tuple[str, Any]] = [
    ("lr", math.nan),
    ("lr", math.inf),
    ("lr", -0.1),
    ("lr", torch.tensor(math.nan)),
    ("betas", (0.9, 1.0)),
    ("eps", -1.0),
    ("weight_decay", math.nan),
    ("scale", math.inf),
    ("update_proj_gap", 0),
]


@pytest.mark.parametrize(("key", "value"), SET_LATER)
def test_a_bad_value_set_later_stops_the_step_before_anything_changes(backend: str, key: str, value: Any) -> None:
    params = make_params()
    groups = [{"params": [params["tall"]]}, {"params": [params[name] for name in params if name != "tall"]}]
    optimizer = GaLoreFusedAdam8bit(groups, **OPTIONS, backend=backend)
    train(optimizer, params, range(2))
    good = optimizer.param_groups[1][key]
    before = snapshot(optimizer, params)
    set_grads(params, 2)
    optimizer.param_groups[1][key] = value
    with pytest.raises(ValueError, match=rf"{key}=.*param group 1"):
        optimizer.step()
    optimizer.param_groups[1][key] = good
    assert_same_snapshot(snapshot(optimizer, params), before)


def test_a_schedule_that_diverges_is_caught(backend: str) -> None:
    params = make_params()
    optimizer = GaLoreFusedAdam8bit(params.values(), **OPTIONS, backend=backend)
    scheduler = lr_scheduler.LambdaLR(optimizer, lambda step: math.nan if step == 2 else 1.0)
    for step in range(2):
        train(optimizer, params, [step])
        scheduler.step()
    set_grads(params, 2)
    weights = {name: param.detach().clone() for name, param in params.items()}
    with pytest.raises(ValueError, match="lr=nan in param group 0"):
        optimizer.step()
    assert all(torch.equal(params[name], weight) for name, weight in weights.items())


def test_numpy_scalars_are_numbers() -> None:
    params = make_params({"w": (8, 8)})
    options: dict[str, Any] = {"lr": np.float32(0.5), "weight_decay": np.float64(0.1)}
    optimizer = GaLoreFusedAdamW(params.values(), **options)
    train(optimizer, params, [0])
    group = optimizer.state_dict()["param_groups"][0]
    assert (type(group["lr"]), group["lr"]) == (float, 0.5)
    assert type(group["weight_decay"]) is float


# ---------------------------------------------------------------------- parameters


def test_no_parameters() -> None:
    with pytest.raises(ValueError, match="empty parameter list"):
        GaLoreFusedAdamW([])


@pytest.mark.parametrize("named", [False, True])
def test_a_parameter_given_twice(named: bool) -> None:
    w, v = (nn.Parameter(torch.zeros(3, 4)) for _ in range(2))
    entries: list[Any] = [("a", w), ("b", v), ("c", w)] if named else [w, v, w]
    name = r'param group 0, parameter 2 \("c"\)' if named else "param group 0, parameter 2"
    with pytest.raises(ValueError, match=rf"{name}: given twice; pass each parameter once"):
        GaLoreFusedAdamW(entries)
    with pytest.raises(ValueError, match=r"param group 1, parameter 1.*: given twice"):
        GaLoreFusedAdamW([{"params": entries[:1]}, {"params": entries[1:]}])
    optimizer = GaLoreFusedAdamW(entries[:2])
    with pytest.raises(ValueError, match=r"param group 1, parameter 0.*: given twice"):
        optimizer.add_param_group({"params": entries[2:]})
    assert len(optimizer.param_groups) == 1


BAD_PARAMETERS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "no tensor": (lambda: "weight", TypeError, "expected a Tensor, got str; pass model.parameters()"),
    "no pair": (lambda: ("a", nn.Parameter(torch.zeros(2)), 3), TypeError, r"\(name, tensor\) pair"),
    "sparse": (lambda: torch.zeros(3, 4).to_sparse(), ValueError, "dense parameter.*to_dense"),
    "complex": (lambda: nn.Parameter(torch.zeros(3, dtype=torch.complex64)), ValueError, "complex64; convert it"),
    "float64": (lambda: nn.Parameter(torch.zeros(3, dtype=torch.float64)), ValueError, "float64; convert it"),
    "integer": (lambda: torch.zeros(3, dtype=torch.int64), ValueError, "int64; convert it"),
    "not a leaf": (lambda: nn.Parameter(torch.zeros(3)) * 2, ValueError, "leaf tensor"),
    "expanded": (lambda: nn.Parameter(torch.zeros(1, 3).expand(4, 3)), ValueError, "expanded tensor; clone it"),
}


@pytest.mark.parametrize("kind", BAD_PARAMETERS)
def test_a_parameter_that_cant_be_optimized(kind: str) -> None:
    make, error, remedy = BAD_PARAMETERS[kind]
    good = nn.Parameter(torch.zeros(3, 4))
    with pytest.raises(error, match=rf"param group 0, parameter 1.*: .*{remedy}"):
        GaLoreFusedAdamW([good, make()])
    optimizer = GaLoreFusedAdamW([good])
    with pytest.raises(error, match=rf"param group 1, parameter 0.*: .*{remedy}"):
        optimizer.add_param_group({"params": [make()]})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(
    ("params", "error", "message"),
    [
        (torch.zeros(3), TypeError, "wrap it in a list"),
        ([{"params": {nn.Parameter(torch.zeros(3))}}], TypeError, "got a set; pass a list"),
        ([{"parms": [nn.Parameter(torch.zeros(3))]}], ValueError, '"params"'),
    ],
)
def test_parameters_in_the_wrong_container(params: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        GaLoreFusedAdamW(params)


def test_a_group_that_is_no_dict() -> None:
    optimizer = GaLoreFusedAdamW([nn.Parameter(torch.zeros(3))])
    with pytest.raises(TypeError, match="param group 1: expected a dict, got list"):
        optimizer.add_param_group([nn.Parameter(torch.zeros(3))])  # type: ignore[arg-type]


def test_zero_element_parameters_are_carried_along(backend: str) -> None:
    params: dict[str, nn.Parameter] = make_params({"w": (8, 8), "none": (0, 8), "empty": (0,)})
    groups = [{"params": list(params.items()), "rank": 2}]
    optimizer = GaLoreFusedAdam8bit(groups, backend=backend)
    before = params["w"].detach().clone()
    set_grads({"w": params["w"]}, 0)
    for name in ("none", "empty"):
        params[name].grad = torch.zeros_like(params[name])
    optimizer.step()
    assert not torch.equal(params["w"], before)
    fresh = GaLoreFusedAdam8bit(groups, backend=backend)
    fresh.load_state_dict(optimizer.state_dict())
    assert fresh.state_bytes() == optimizer.state_bytes()
    assert "2 at full rank" in repr(optimizer)


@pytest.mark.parametrize("project_nd", [False, True])
def test_any_number_of_dimensions_in_a_group_with_rank(backend: str, project_nd: bool) -> None:
    shapes = {"0": (), "1": (5,), "2": (6, 5), "3": (6, 5, 2), "4": (6, 5, 2, 3), "one": (1, 1), "row": (1, 9)}
    params = make_params(shapes)
    before = {name: param.detach().clone() for name, param in params.items()}
    groups = [{"params": list(params.items()), "rank": 4, "project_nd": project_nd}]
    optimizer = GaLoreFusedAdam8bit(groups, lr=0.1, scale=1.0, backend=backend)
    train(optimizer, params, range(3))
    ranks = {name: optimizer.state[param].get("basis", Tensor()).shape[-1] for name, param in params.items()}
    nd = 4 if project_nd else 0
    assert ranks == {"0": 0, "1": 0, "2": 4, "3": nd, "4": nd, "one": 1, "row": 1}
    for name, param in params.items():
        assert not torch.equal(param, before[name]), name
        assert bool(torch.isfinite(param).all())
