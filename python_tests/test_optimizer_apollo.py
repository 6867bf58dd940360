"""APOLLO's optimizers: what they have that GaLore's have not."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from optimizer_cases import OPTIONS, assert_same_snapshot, clone_params, make_params, set_grads, snapshot, train
from torch import nn

from galore_kernels import APOLLOFusedAdam8bit, APOLLOFusedAdamW, LayerwiseOptimizer, ops, prepare
from galore_kernels.optim.base import LowRankOptimizer

CLASSES: list[Callable[..., LowRankOptimizer]] = [APOLLOFusedAdamW, APOLLOFusedAdam8bit]

MINI: dict[str, Any] = {"rank": 1, "scale_type": "tensor", "scale": 128.0}


@pytest.mark.parametrize("optimizer_class", CLASSES)
def test_a_step_is_the_operation_by_hand(optimizer_class: Callable[..., LowRankOptimizer]) -> None:
    params = make_params({"tall": (300, 64), "wide": (64, 300)})
    by_hand = clone_params(params)
    options = {**OPTIONS, "scale": 2.0, "scale_front": True, "norm_growth_limit": 1.5, "scale_type": "tensor"}
    optimizer = optimizer_class(params.values(), **options)
    eight_bit = optimizer_class is APOLLOFusedAdam8bit
    states = {name: ops.AdamState.zeros((300, 16), eight_bit=eight_bit) for name in params}
    norms = {name: torch.zeros(()) for name in params}
    for step in range(5):
        set_grads(params, step)
        set_grads(by_hand, step)
        optimizer.step()
        for name, param in by_hand.items():
            assert param.grad is not None
            ops.apollo_update(
                param.detach(),
                param.grad,
                ops.RandomBasis(16, optimizer.state[params[name]]["basis_seed"]),
                states[name],
                norms[name],
                ops.AdamOptions(torch.tensor(1e-2, dtype=torch.float64), weight_decay=0.1),
                ops.ApolloOptions(2.0, "tensor", True, 1.5),
                side="right" if name == "tall" else "left",
            )
            assert torch.equal(params[name], param)
            assert torch.equal(optimizer.state[params[name]]["scaled_norm"], norms[name])


def test_a_basis_is_drawn_anew_at_every_refresh_and_for_every_matrix() -> None:
    params = make_params()
    optimizer = APOLLOFusedAdam8bit(params.values(), **OPTIONS)
    seeds = []
    for step in range(7):
        train(optimizer, params, range(step, step + 1))
        seeds.append([optimizer.state[params[name]]["basis_seed"] for name in ("tall", "wide", "small")])
    assert seeds[0] == seeds[1] == seeds[2] != seeds[3] == seeds[5] != seeds[6]
    assert len({seed for step in seeds for seed in step}) == 9
    assert all("basis" not in state for state in optimizer.state.values())
    other = APOLLOFusedAdam8bit(clone_params(params).values(), **OPTIONS, seed=1)
    copies = dict(zip(params, other.param_groups[0]["params"], strict=True))
    train(other, copies, range(1))
    assert other.state[copies["tall"]]["basis_seed"] not in {step[0] for step in seeds}


def test_the_state_is_smaller_by_the_bases() -> None:
    params = make_params({"tall": (300, 64)})
    drawn = APOLLOFusedAdamW(params.values(), rank=16).state_bytes()
    found = APOLLOFusedAdamW(params.values(), rank=16, proj="svd").state_bytes()
    assert found - drawn == 64 * 16 * 4
    # Two moments of 300 x 1, and step, skips and norm.
    assert APOLLOFusedAdamW(params.values(), **MINI).state_bytes() == 2 * 4 * 300 + 4 + 8 + 4


def test_the_report_knows_no_energy_of_a_drawn_basis() -> None:
    params = make_params({"tall": (300, 64)})
    drawn, found = (APOLLOFusedAdamW(params.values(), **OPTIONS, proj=proj) for proj in ("random", "svd"))
    for optimizer in (drawn, found):
        train(optimizer, params, range(5))
    (of_drawn,), (of_found,) = (optimizer.subspace_report().values() for optimizer in (drawn, found))
    assert (of_drawn["captured"], of_drawn["overlap"], of_drawn["refreshes"]) == (None, None, 2)
    assert of_found["captured"] > 0.5
    assert "drawn" in repr(drawn)
    assert "randomized" in repr(found)


@pytest.mark.parametrize("schedule", ["periodic", "staggered"])
@pytest.mark.parametrize(
    "own", [{}, MINI, {"proj": "rademacher"}, {"proj": "svd"}], ids=["APOLLO", "Mini", "±1", "svd"]
)
def test_resuming_at_any_step_is_not_having_stopped(schedule: str, own: dict[str, Any]) -> None:
    options = {**OPTIONS, "refresh_schedule": schedule, **own}
    params = make_params()
    optimizer = APOLLOFusedAdam8bit(list(params.items()), **options)
    for steps in range(1, 7):
        train(optimizer, params, range(steps - 1, steps))
        resumed_params = clone_params(params)
        resumed = APOLLOFusedAdam8bit(list(resumed_params.items()), **options)
        resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        straight = copy.deepcopy((optimizer, params))
        train(resumed, resumed_params, range(steps, 7))
        train(*straight, range(steps, 7))
        assert_same_snapshot(snapshot(resumed, resumed_params), snapshot(*straight))


def test_a_reset_forgets_the_norm_that_limits_growth() -> None:
    params = make_params({"tall": (300, 64)})
    optimizer = APOLLOFusedAdamW([{"params": list(params.values()), "moments_on_refresh": "reset", **OPTIONS}])
    norms = []
    for step in range(7):
        train(optimizer, params, range(step, step + 1))
        norms.append(float(optimizer.state[params["tall"]]["scaled_norm"]))
    # Adam's first directions are signs, 3.2 times as long as the bias-corrected ones that follow: no limit of 1.01.
    assert min(norms[3] / norms[2], norms[6] / norms[5]) < 0.9 or max(norms[3] / norms[2], norms[6] / norms[5]) > 1.1


def test_another_projection_s_checkpoint_is_refused() -> None:
    params = make_params()
    optimizer = APOLLOFusedAdam8bit(params.values(), **OPTIONS)
    train(optimizer, params, range(2))
    other = APOLLOFusedAdam8bit(clone_params(params).values(), **OPTIONS, proj="svd")
    with pytest.raises(ValueError, match="proj='random'"):
        other.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("accumulation", [1, 2])
def test_layerwise_updates_are_those_of_whole_steps(accumulation: int) -> None:
    def model() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(40, 60), nn.Tanh(), nn.Linear(60, 30, bias=False))

    whole, layered = model(), model()
    options = {**OPTIONS, "rank": 4}
    optimizer = APOLLOFusedAdam8bit(whole.parameters(), **options)
    layerwise = LayerwiseOptimizer(
        APOLLOFusedAdam8bit(layered.parameters(), **options), accumulation_steps=accumulation
    )
    for step in range(7):
        for own, its in ((whole, optimizer), (layered, layerwise)):
            torch.manual_seed(step)
            for _ in range(accumulation):
                own(torch.randn(8, 40)).square().sum().backward()
            its.step()
            its.zero_grad()
        for one, other in zip(whole.parameters(), layered.parameters(), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("option", "remedy"),
    [
        ({"proj": "gaussian"}, "proj='gaussian' in .*: expected one of random, rademacher, svd"),
        ({"scale_type": "chanel"}, 'did you mean "channel"'),
        ({"scale_front": 1}, "scale_front=1"),
        ({"norm_growth_limit": 0.5}, "norm_growth_limit=0.5"),
        ({"norm_growth_limit": "1.01"}, "norm_growth_limit='1.01'"),
        ({"proj_type": "full"}, "proj_type='full' in .*pass \"std\""),
        ({"refresh_schedule": "adaptive"}, "'periodic' or 'staggered' unless proj=\"svd\""),
        ({"rank": "auto"}, "rank='auto'"),
    ],
)
def test_a_bad_option_is_refused_by_name(option: dict[str, Any], remedy: str) -> None:
    params = make_params()
    with pytest.raises(ValueError, match=remedy):
        APOLLOFusedAdamW(params.values(), **option)
    with pytest.raises(ValueError, match=remedy):
        APOLLOFusedAdamW([{"params": list(params.values()), "rank": 4, **option}])


@pytest.mark.parametrize("key", ["warm_start", "async_refresh"])
def test_what_is_for_found_bases_is_refused_for_drawn_ones(key: str) -> None:
    group = {"params": list(make_params().values()), "rank": 4, key: True}
    with pytest.raises(ValueError, match=f'{key}=True in .*unless proj="svd"'):
        APOLLOFusedAdamW([group])
    APOLLOFusedAdamW([{**group, "proj": "svd"}])


@pytest.mark.parametrize(("before", "after"), [("random", "svd"), ("svd", "random")])
def test_another_projection_in_mid_training_is_refused(before: str, after: str) -> None:
    params = make_params()
    optimizer = APOLLOFusedAdamW(params.values(), **OPTIONS, proj=before)
    train(optimizer, params, range(2))
    set_grads(params, 2)
    kept = snapshot(optimizer, params)
    optimizer.param_groups[0]["proj"] = after
    with pytest.raises(ValueError, match="state was made for another shape or rank"):
        optimizer.step()
    optimizer.param_groups[0]["proj"] = before
    assert_same_snapshot(snapshot(optimizer, params), kept)


def test_prepared_layers_are_refused() -> None:
    model = prepare(nn.Sequential(nn.Linear(40, 60)), target_modules="all-linear", rank=4)
    with pytest.raises(
        ValueError, match=r"with rank 4, and its full gradient is never .* prepare it with rank=None, weights=\"int8\""
    ):
        APOLLOFusedAdamW(model.parameters(), rank=4)
