"""Refreshes in the optimizer: schedules, warm starts, moments, quantized bases, the report; resumed and interrupted."""

from __future__ import annotations

import copy
import itertools
import math
import warnings
from concurrent.futures import Future
from typing import Any

import pytest
import torch
from optimizer_cases import (
    OF_PROJECTIONS,
    OPTIMIZERS,
    OptimizerClass,
    assert_same_snapshot,
    clone_params,
    make_params,
    set_grads,
    snapshot,
    taken,
    train,
)
from torch import Tensor, nn
from update_cases import assert_same_bits

from galore_kernels import GaLoreFusedAdam8bit, GaLoreFusedAdamW, NonFiniteGradientWarning, ops
from galore_kernels.optim import refresh
from galore_kernels.optim.galore import GaLoreAdam
from galore_kernels.optim.pending import Pending
from galore_kernels.optim.state import adam_state, float_basis
from galore_kernels.optim.update import Update
from galore_kernels.quantizers import dequantize_basis, quantize_basis
from galore_kernels.subspace import find_subspaces, search

#: Of one shape, so that where there are groups they share one.
SHAPES: dict[str, tuple[int, ...]] = dict.fromkeys("abcdef", (300, 64)) | {"wide": (64, 300), "norm": (70,)}
OPTIONS: dict[str, Any] = {"lr": 1e-2, "rank": 16, "update_proj_gap": 6}

COMBINATIONS: list[dict[str, Any]] = [
    {"refresh_schedule": "staggered", "warm_start": True},
    {"refresh_schedule": "adaptive", "moments_on_refresh": "rotate"},
    {"refresh_schedule": "staggered", "async_refresh": True, "moments_on_refresh": "rotate", "basis_format": "int8"},
    {"refresh_schedule": "adaptive", "warm_start": True, "async_refresh": True, "moments_on_refresh": "reset"},
    {"moments_on_refresh": "reset", "basis_format": "int4"},
    {"proj_type": "full", "moments_on_refresh": "rotate", "warm_start": True},
]


def label(options: dict[str, Any]) -> str:
    return "-".join(str(value) for value in options.values())


def refreshed_at(optimizer: GaLoreAdam, params: dict[str, nn.Parameter], steps: range) -> dict[str, list[int]]:
    """Trains; returns the steps at which the number of each projected parameter's refreshes grew."""
    at: dict[str, list[int]] = {name: [] for name, param in params.items() if param.dim() == 2}
    for step in steps:
        before = {name: optimizer.state[params[name]].get("refreshes", 0) for name in at}
        train(optimizer, params, [step])
        for name, own in at.items():
            own += [step] * (optimizer.state[params[name]]["refreshes"] - before[name])
    return at


@pytest.mark.parametrize("options", COMBINATIONS, ids=label)
@pytest.mark.parametrize("optimizer_class", OF_PROJECTIONS)
def test_resuming_at_any_step_is_not_having_stopped(
    backend: str, optimizer_class: OptimizerClass, options: dict[str, Any]
) -> None:
    params, options = make_params(SHAPES), taken(optimizer_class, options)
    optimizer = optimizer_class(params.values(), **OPTIONS, **options, backend=backend)
    for stop in range(7):
        train(optimizer, params, [stop])
        if stop not in (1, 5, 6):  # among staggered refreshes, right before one of all layers, and right after it
            continue
        resumed_params = clone_params(params)
        resumed = optimizer_class(resumed_params.values(), **OPTIONS, **options, backend=backend)
        resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        both = copy.deepcopy((optimizer, params))
        train(both[0], both[1], range(stop + 1, stop + 4))
        train(resumed, resumed_params, range(stop + 1, stop + 4))
        assert_same_snapshot(snapshot(resumed, resumed_params), snapshot(*both))


@pytest.mark.parametrize("options", COMBINATIONS, ids=label)
def test_groups_equal_single_updates(cuda_stand_in: str, options: dict[str, Any]) -> None:
    """On a backend that offers groups, with refreshes that single some members out, and one that doesn't."""
    if "basis_format" in options:
        options = {**options, "basis_format": "int8"}
    results = []
    for backend in (cuda_stand_in, "reference"):
        params = make_params(dict.fromkeys("abc", (24, 20)))
        optimizer = GaLoreFusedAdamW(params.values(), lr=1e-2, rank=4, update_proj_gap=3, **options, backend=backend)
        at = refreshed_at(optimizer, params, range(8))
        results.append((at, {name: param.detach().clone() for name, param in params.items()}))
    assert results[0][0] == results[1][0]
    for name, weight in results[0][1].items():
        # A rotated second moment is a difference: where it is small, its root lets float32's rounding show.
        atol = 1e-3 if options.get("moments_on_refresh") == "rotate" else 1e-5
        torch.testing.assert_close(weight, results[1][1][name], rtol=1e-4, atol=atol)


def test_staggered_layers_are_refreshed_at_their_own_steps(backend: str) -> None:
    params = make_params(dict.fromkeys("abcdef", (60, 32)) | {"norm": (70,)})
    optimizer = GaLoreFusedAdamW(params.values(), lr=1e-2, rank=4, update_proj_gap=6, refresh_schedule="staggered",
                                 backend=backend)  # fmt: skip
    at = refreshed_at(optimizer, params, range(20))
    assert at["a"] == [0, 6, 12, 18]  # at place 0 of the gap the second comes a whole one later
    for place, name in enumerate("bcdef", start=1):
        assert at[name] == [0, *range(place, 20, 6)]


def test_an_adaptive_interval_follows_the_layers_overlap() -> None:
    params = make_params({"still": (60, 32), "moving": (60, 32)})
    factors = torch.randn(60, 4), torch.randn(4, 32)
    optimizer = GaLoreFusedAdamW(params.values(), lr=1e-3, rank=4, update_proj_gap=8, refresh_schedule="adaptive")
    for step in range(60):
        set_grads(params, step)  # new directions in each step
        params["still"].grad = factors[0] @ factors[1]
        optimizer.step()
    report = optimizer.subspace_report()
    still, moving = (report[f"param group 0, parameter {index}"] for index in range(2))
    assert still["overlap"] == pytest.approx(1.0, abs=1e-4)
    assert still["interval"] == 64  # refreshed at 0, 8, 24 and 56
    assert moving["overlap"] < 0.3
    assert moving["interval"] == 2


def test_overlap_knows_neither_signs_nor_rotations(monkeypatch: pytest.MonkeyPatch) -> None:
    params = make_params({"w": (60, 32)})
    optimizer = GaLoreFusedAdamW(params.values(), rank=4, update_proj_gap=1)
    turn = torch.linalg.qr(torch.randn(4, 4)).Q
    train(optimizer, params, [0])
    train(optimizer, params, [0])
    assert optimizer.state[params["w"]]["overlap"] == pytest.approx(1.0, abs=1e-5)
    optimizer.state[params["w"]]["basis"] @= turn
    train(optimizer, params, [0])
    assert optimizer.state[params["w"]]["overlap"] == pytest.approx(1.0, abs=1e-5)


def test_the_report_tells_what_the_refresh_found(backend: str) -> None:
    params = make_params({"w": (60, 32), "norm": (70,)})
    optimizer = GaLoreFusedAdam8bit(list(params.items()), rank=4, update_proj_gap=3, backend=backend)
    assert optimizer.subspace_report() == {}
    train(optimizer, params, range(2))
    name = 'param group 0, parameter 0 ("w")'
    first = optimizer.subspace_report()
    assert list(first) == [name]
    assert first[name]["overlap"] is None
    old = optimizer.state[params["w"]]["basis"].clone()
    train(optimizer, params, [2, 3])
    report = optimizer.subspace_report()[name]
    set_grads(params, 3)
    grad, new = params["w"].grad, optimizer.state[params["w"]]["basis"]
    assert isinstance(grad, Tensor)
    exact = float((grad @ new).square().sum() / grad.square().sum())
    assert report["captured"] == pytest.approx(exact, rel=1e-4)
    assert report["overlap"] == pytest.approx(float((old.T @ new).square().sum()) / 4, rel=1e-4)
    assert {key: report[key] for key in ("rank", "refreshes", "refreshed_at", "interval")} == {
        "rank": 4, "refreshes": 2, "refreshed_at": 3, "interval": 3,
    }  # fmt: skip


# ---------------------------------------------------------------------- warm starts


def test_a_warm_start_is_offered_the_previous_basis_and_the_last_cold_share(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Tensor, float | None]] = []

    def spy(*args: Any, **kwargs: Any) -> Any:
        (previous,), (captured,) = kwargs["previous"], kwargs["captured"]
        seen.append((previous.clone(), captured))
        return find_subspaces(*args, **kwargs)

    monkeypatch.setattr(refresh, "find_subspaces", spy)
    params = make_params({"w": (300, 256)})
    optimizer = GaLoreFusedAdamW(params.values(), rank=8, update_proj_gap=1, warm_start=True)
    state = optimizer.state[params["w"]]
    train(optimizer, params, [0])
    cold, basis = optimizer.state[params["w"]]["captured"], optimizer.state[params["w"]]["basis"].clone()
    train(optimizer, params, [0])
    assert seen[0][1] is None  # a cold start
    assert seen[1][1] == cold
    assert_same_bits(seen[1][0], basis, "previous")
    state = optimizer.state[params["w"]]
    assert state["captured_cold"] == cold  # the second search was warm
    # Shares that fall a little at each warm start would never fall below 0.9 of the one before.
    assert seen[-1][1] == state["captured_cold"]


# ---------------------------------------------------------------------- asynchronous


def test_an_asynchronous_basis_is_used_from_the_next_step_on(backend: str) -> None:
    params = make_params({"w": (60, 32)})
    later = clone_params(params)
    never = clone_params(params)
    options: dict[str, Any] = {"lr": 1e-2, "rank": 4, "backend": backend}
    optimizer = GaLoreFusedAdamW(later.values(), **options, update_proj_gap=3, async_refresh=True)
    keeps = GaLoreFusedAdamW(never.values(), **options, update_proj_gap=100)
    for each, own in ((optimizer, later), (keeps, never)):
        train(each, own, range(4))
    assert_same_bits(later["w"], never["w"], "the step that refreshes has the old basis")
    set_grads(params, 3)
    grad = params["w"].grad
    assert grad is not None
    found = optimizer.subspace_report()["param group 0, parameter 0"]
    assert found["refreshes"] == 2
    assert found["refreshed_at"] == 3
    captured = (grad @ optimizer.state[later["w"]]["basis"]).square().sum() / grad.square().sum()
    assert float(captured) == pytest.approx(found["captured"], rel=1e-4)  # of the step before, not of the next one
    train(optimizer, later, [4])
    train(keeps, never, [4])
    assert not torch.equal(later["w"], never["w"])


def test_a_search_that_fails_loses_itself_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    params = make_params({"a": (60, 32), "b": (60, 32)})
    optimizer = GaLoreFusedAdamW(params.values(), rank=4, update_proj_gap=3, async_refresh=True)
    train(optimizer, params, range(3))
    begin = Pending.begin

    def fails_for_a(self: Pending, update: Update, state: dict[str, Any], found: Any) -> Future[Any]:
        if update.index:
            return begin(self, update, state, found)
        future: Future[Any] = Future()  # as a search in a thread of its own leaves it
        future.set_exception(torch.OutOfMemoryError("no memory beside the step"))
        return future

    with monkeypatch.context() as patch:
        patch.setattr(Pending, "begin", fails_for_a)
        train(optimizer, params, [3])
    with pytest.raises(torch.OutOfMemoryError):
        train(optimizer, params, [4])
    train(optimizer, params, range(4, 6))
    report = optimizer.subspace_report()
    assert [layer["refreshed_at"] for layer in report.values()] == [4, 3]  # a's in the next gradient


@pytest.mark.parametrize("options", [{"moments_on_refresh": "rotate"}, {"async_refresh": True}], ids=label)
def test_a_refresh_under_autocast_is_the_same_refresh(options: dict[str, Any]) -> None:
    results = []
    for enabled in (False, True):
        params = make_params({"w": (300, 64)})
        optimizer = GaLoreFusedAdam8bit(params.values(), rank=16, update_proj_gap=2, **options)
        for step in range(4):
            set_grads(params, step)
            with torch.autocast("cpu", enabled=enabled):
                optimizer.step()
                taken = snapshot(optimizer, params)
        results.append(taken)
    assert_same_snapshot(*results)


def test_options_edited_in_mid_run_are_checked_and_kept_to() -> None:
    params = make_params({"w": (60, 32)})
    optimizer = GaLoreFusedAdamW(params.values(), rank=4, update_proj_gap=10**6)
    train(optimizer, params, range(3))
    optimizer.param_groups[0]["update_proj_gap"] = 5
    assert refreshed_at(optimizer, params, range(3, 12)) == {"w": [5, 10]}
    for key in ("refresh_schedule", "moments_on_refresh"):
        optimizer.param_groups[0][key] = "typo"
        with pytest.raises(ValueError, match=f"{key}='typo' in param group 0"):
            train(optimizer, params, [12])
        optimizer.param_groups[0][key] = optimizer.defaults[key]


# ---------------------------------------------------------------------- in batches


@pytest.mark.parametrize("options", COMBINATIONS[:3], ids=label)
def test_bases_searched_for_in_batches_are_those_of_each_alone(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a device, here on the CPU."""
    shapes = {**dict.fromkeys("abc", (300, 256)), **dict.fromkeys("de", (256, 300)), "f": (300, 256), "norm": (70,)}
    given: dict[str, Any] = {"lr": 1e-3, "rank": 8, "update_proj_gap": 2, **options}
    sizes: list[int] = []

    def spy(grads: list[Tensor], *args: Any, **kwargs: Any) -> Any:
        sizes.append(len(grads))
        return find_subspaces(grads, *args, **kwargs)

    results = []
    for together in (False, True):
        params = make_params(shapes)
        with monkeypatch.context() as patch:
            for module in (refresh, search):
                patch.setattr(module, "in_batches", lambda _, together=together: together)
            patch.setattr(refresh, "find_subspaces", spy)
            optimizer = GaLoreFusedAdamW(params.values(), **given, backend="reference")
            train(optimizer, params, range(3))
        results.append((optimizer, params))
    assert set(sizes[:6]) == {1}
    assert max(sizes) == 4  # in the first step a, b, c and f
    for name in "abcdef":
        bases = [float_basis(optimizer.state[params[name]], "basis") for optimizer, params in results]
        torch.testing.assert_close(bases[0], bases[1], rtol=0, atol=2e-2 if "basis_format" in options else 1e-3)


# ---------------------------------------------------------------------- moments


def state_before_and_after(
    optimizer: GaLoreAdam, params: dict[str, nn.Parameter]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """States of "w" before and after the step of its second refresh, the third."""
    train(optimizer, params, range(3))
    before = copy.deepcopy(optimizer.state[params["w"]])
    train(optimizer, params, [3])
    return before, optimizer.state[params["w"]]


@pytest.mark.parametrize("optimizer_class", OPTIMIZERS)
@pytest.mark.parametrize("proj_type", ["std", "full"])
def test_rotated_moments_are_those_of_the_operation(
    backend: str, optimizer_class: type[GaLoreAdam], proj_type: str
) -> None:
    params = make_params({"w": (320, 280)})
    given = clone_params(params)
    optimizer = optimizer_class(
        params.values(), rank=64, update_proj_gap=3, proj_type=proj_type, moments_on_refresh="rotate", backend=backend
    )
    before, after = state_before_and_after(optimizer, params)
    # The same step by hand: the moments turned, then the update with the new basis.
    train(optimizer_class(given.values(), rank=64, update_proj_gap=3, proj_type=proj_type, backend=backend), given,
          range(3))  # fmt: skip
    turns = {name: float_basis(before, name).T @ float_basis(after, name) for name in ("basis", "long_basis")
             if name in before}  # fmt: skip
    turned = ops.rotate_moments(
        adam_state(before), turns["basis"], beta1=0.9, beta2=0.999, long_rotation=turns.get("long_basis"),
        backend=backend,
    )  # fmt: skip
    set_grads(given, 3)
    grad = given["w"].grad
    assert grad is not None
    options = ops.AdamOptions(torch.tensor(1e-3, dtype=torch.float64))
    ops.galore_update(given["w"].detach(), grad, after["basis"], turned, options, side="right", scale=0.25,
                      long_basis=after.get("long_basis"), backend=backend)  # fmt: skip
    for name in ("exp_avg", "exp_avg_sq"):
        assert_same_bits(after[name], getattr(turned, name), name)


@pytest.mark.parametrize("async_refresh", [False, True])
def test_reset_counts_the_steps_on(async_refresh: bool) -> None:
    params = make_params({"w": (60, 32)})
    optimizer = GaLoreFusedAdamW(
        params.values(), rank=4, update_proj_gap=5, moments_on_refresh="reset", async_refresh=async_refresh
    )
    seen = []
    for step in range(23):
        set_grads(params, step)
        if step < 2:  # no basis yet: the first comes late, but the multiples of T stay
            for param in params.values():
                param.grad = torch.zeros_like(param)
        optimizer.step()
        (report,) = optimizer.subspace_report().values() or ({"refreshed_at": None},)
        seen.append(report["refreshed_at"])
    assert list(dict.fromkeys(seen)) == [None, 2, 5, 10, 15, 20]


def test_reset_begins_adam_anew(backend: str) -> None:
    params = make_params({"w": (60, 32)})
    optimizer = GaLoreFusedAdamW(params.values(), rank=4, update_proj_gap=3, moments_on_refresh="reset",
                                 backend=backend)  # fmt: skip
    at = refreshed_at(optimizer, params, range(10))
    assert at == {"w": [0, 3, 6, 9]}
    state = optimizer.state[params["w"]]
    assert float(state["step"]) == 1
    assert state["refreshed_at"] == 9
    set_grads(params, 9)
    assert params["w"].grad is not None
    first = 0.1 * (params["w"].grad @ state["basis"])
    torch.testing.assert_close(state["exp_avg"], first, rtol=1e-4, atol=1e-6)  # nothing of the moments before


@pytest.mark.parametrize("moments", ["keep", "rotate", "reset"])
def test_a_refresh_in_a_gradient_that_is_not_finite_changes_nothing(backend: str, moments: str) -> None:
    params = make_params({"w": (300, 64)})
    optimizer = GaLoreFusedAdam8bit(params.values(), **OPTIONS, moments_on_refresh=moments, backend=backend)
    train(optimizer, params, range(6))
    before = snapshot(optimizer, params)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            set_grads(params, 6)
            assert params["w"].grad is not None
            params["w"].grad[7, 3] = math.nan
            optimizer.step()
    assert [each.category for each in caught] == [NonFiniteGradientWarning] * 2  # at the first and the second
    after = snapshot(optimizer, params)
    changed = {key for key in after if isinstance(after[key], Tensor) and not torch.equal(after[key], before[key])}
    assert {key.rpartition("/")[2] for key in changed} == {"skipped"}
    train(optimizer, params, [6])
    assert optimizer.state[params["w"]]["refreshes"] == 2  # it was still due


@pytest.mark.parametrize("moments", ["rotate", "reset"])
def test_a_scaler_that_found_inf_elsewhere_leaves_the_moments(backend: str, moments: str) -> None:
    params = make_params({"w": (300, 64)})
    optimizer = GaLoreFusedAdam8bit(params.values(), **OPTIONS, moments_on_refresh=moments, backend=backend)
    train(optimizer, params, range(6))
    before = snapshot(optimizer, params)
    set_grads(params, 6)
    optimizer.found_inf = torch.ones(())  # type: ignore[attr-defined]
    optimizer.step()
    del optimizer.found_inf  # type: ignore[attr-defined]
    assert_same_snapshot(snapshot(optimizer, params), before)


# ---------------------------------------------------------------------- quantized bases


@pytest.mark.parametrize("basis_format", ["int8", "int4"])
@pytest.mark.parametrize("proj_type", ["left", "right"])
def test_a_quantized_basis_is_that_of_the_gradient(backend: str, basis_format: str, proj_type: str) -> None:
    params = make_params({"w": (300, 64)})
    optimizer = GaLoreFusedAdam8bit(
        params.values(), rank=16, basis_format=basis_format, proj_type=proj_type, backend=backend
    )
    plain = clone_params(params)
    unquantized = GaLoreFusedAdam8bit(plain.values(), rank=16, proj_type=proj_type, backend=backend)
    for each, own in ((optimizer, params), (unquantized, plain)):
        train(each, own, [0])
    state, exact = optimizer.state[params["w"]], unquantized.state[plain["w"]]["basis"]
    codes, scale = quantize_basis(exact, basis_format)
    assert_same_bits(state["basis"], codes, "codes")
    assert_same_bits(state["basis_scale"], scale, "scale")
    error = float((dequantize_basis(codes, scale) - exact).norm() / exact.norm())
    assert error < {"int8": 0.01, "int4": 0.15}[basis_format]
    train(optimizer, params, range(1, 4))
    assert optimizer.state_bytes() < unquantized.state_bytes()


def test_a_quantized_basis_needs_one_projected_side() -> None:
    with pytest.raises(ValueError, match=r"basis_format='int8'.*None with proj_type"):
        GaLoreFusedAdam8bit([nn.Parameter(torch.ones(40, 40))], rank=4, proj_type="full", basis_format="int8")


def test_a_checkpoint_of_another_format_of_the_basis_is_refused() -> None:
    params = make_params({"w": (300, 64)})
    saved = GaLoreFusedAdam8bit(params.values(), rank=16, basis_format="int8")
    train(saved, params, [0])
    for basis_format in (None, "int4"):
        other = GaLoreFusedAdam8bit(params.values(), rank=16, basis_format=basis_format)
        with pytest.raises(ValueError, match="basis_format='int8'"):
            other.load_state_dict(saved.state_dict())


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("refresh_schedule", "stagered", 'did you mean "staggered"'),
        ("moments_on_refresh", "rotated", 'did you mean "rotate"'),
        ("basis_format", "int2", "one of int8, int4"),
        ("warm_start", 1, "True or False"),
        ("async_refresh", "yes", "True or False"),
    ],
)
def test_a_bad_option_is_refused(key: str, value: object, expected: str) -> None:
    with pytest.raises(ValueError, match=f"{key}=.*{expected}"):
        GaLoreFusedAdam8bit([{"params": [nn.Parameter(torch.ones(40, 40))], key: value}])


def test_the_repr_tells_of_the_refreshes() -> None:
    optimizer = GaLoreFusedAdam8bit(
        [nn.Parameter(torch.ones(40, 40))], rank=4, refresh_schedule="adaptive", warm_start=True, async_refresh=True,
        moments_on_refresh="rotate", basis_format="int8",
    )  # fmt: skip
    assert "every 200 steps, randomized, adaptive, warm, asynchronous, moments rotate, int8 basis" in repr(optimizer)


def test_options_combine() -> None:
    """All of them with all of them take steps, stay finite and are refreshed."""
    choices: dict[str, list[Any]] = {
        "refresh_schedule": ["periodic", "staggered", "adaptive"],
        "warm_start": [False, True],
        "async_refresh": [False, True],
        "moments_on_refresh": ["keep", "rotate", "reset"],
        "basis_format": [None, "int8", "int4"],
    }
    for values in itertools.product(*choices.values()):
        params = make_params({"a": (60, 32), "b": (32, 60)})
        optimizer = GaLoreFusedAdamW(params.values(), rank=5, update_proj_gap=2, backend="reference",
                                     **dict(zip(choices, values, strict=True)))  # fmt: skip
        train(optimizer, params, range(5))
        report = optimizer.subspace_report()
        assert all(layer["refreshes"] >= 2 for layer in report.values()), values
        assert all(bool(param.isfinite().all()) for param in params.values()), values
