"""``rank="auto"``: ranks from the energy of the first gradients, within a budget of bytes."""

from __future__ import annotations

import copy
import math
import re
import warnings
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from optimizer_cases import assert_same_snapshot, clone_params, make_params, ranks, set_grads, snapshot, train
from torch import Tensor, nn

from galore_kernels import GaLoreFusedAdam8bit, GaLoreFusedAdamW, NonFiniteGradientWarning, galore_param_groups
from galore_kernels.subspace import RankChoices, choose_ranks

LAYERS = st.lists(
    st.builds(
        lambda gains, cost, elements: RankChoices(
            [sum(sorted(gains, reverse=True)[: i + 1]) for i in range(len(gains))],
            [cost * (i + 1) for i in range(len(gains))],
            elements,
        ),
        st.lists(st.floats(1e-6, 1.0), min_size=1, max_size=4),
        st.integers(1, 9),
        st.integers(1, 5),
    ),
    min_size=1,
    max_size=4,
)


def held(layers: list[RankChoices], chosen: tuple[int, ...] | list[int]) -> tuple[int, float]:
    """Bytes and captured energy, weighted by elements, of these ranks."""
    places = [rank // 16 - 1 for rank in chosen]
    pairs = list(zip(layers, places, strict=True))
    return sum(layer.bytes[i] for layer, i in pairs), sum(layer.captured[i] * layer.elements for layer, i in pairs)


@given(layers=LAYERS, spare=st.integers(0, 60))
def test_ranks_fit_the_budget_and_leave_nothing_that_would_fit(layers: list[RankChoices], spare: int) -> None:
    budget = sum(layer.bytes[0] for layer in layers) + spare
    chosen = choose_ranks(layers, budget)
    used, energy = held(layers, chosen)
    assert used <= budget
    for layer, rank in zip(layers, chosen, strict=True):
        place = rank // 16 - 1
        if place + 1 < len(layer.bytes):
            assert used + layer.bytes[place + 1] - layer.bytes[place] > budget
    # Greedy: no choice holds more than what the budget, widened by one step, could.
    best = max(e for b, e in (held(layers, c) for c in product(*([16 * (i + 1) for i in range(len(layer.bytes))]
               for layer in layers))) if b <= budget)  # fmt: skip
    largest_step = max((layer.elements for layer in layers), default=0)
    assert energy >= best - largest_step


def test_columns_go_where_a_byte_captures_most() -> None:
    flat = RankChoices([0.25, 0.5, 0.75, 1.0], [10, 20, 30, 40], 100)
    steep = RankChoices([0.97, 0.98, 0.99, 1.0], [10, 20, 30, 40], 100)
    assert choose_ranks([steep, flat], 50) == [16, 64]
    assert choose_ranks([flat, flat], 60) == [48, 48]
    dear = RankChoices([0.25, 0.5, 0.75, 1.0], [20, 40, 60, 80], 100)
    assert choose_ranks([dear, flat], 60) == [16, 64]
    with pytest.raises(ValueError, match=r"rank_budget=19: expected at least 20 bytes, which rank 16 of all 2"):
        choose_ranks([flat, flat], 19)


def of_rank(rank: int, rows: int, cols: int, seed: int) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(rows, rank, generator=rng) @ torch.randn(rank, cols, generator=rng)


def two_layers(budget: int, **options: object) -> tuple[GaLoreFusedAdam8bit, dict[str, nn.Parameter]]:
    params = make_params({"low": (256, 192), "high": (256, 192), "norm": (70,)})
    return GaLoreFusedAdam8bit(params.values(), rank="auto", rank_budget=budget, **options), params  # type: ignore[arg-type]


def give(params: dict[str, nn.Parameter]) -> None:
    set_grads(params, 0)
    params["low"].grad = of_rank(16, 256, 192, 0)
    params["high"].grad = of_rank(96, 256, 192, 1)


# Budgets that end before the second layer's 96 directions.
@pytest.mark.parametrize(("basis_format", "budget"), [(None, 110_000), ("int8", 75_000), ("int4", 65_000)])
def test_the_layer_of_higher_rank_gets_more_and_the_budget_is_kept(basis_format: str | None, budget: int) -> None:
    optimizer, params = two_layers(budget, basis_format=basis_format)
    assert optimizer.state_bytes() == budget + 2 * 4 * 70 + 12  # and the norm's, in float32
    give(params)
    optimizer.step()
    low, high = (report["rank"] for report in optimizer.subspace_report().values())
    assert low == 16
    assert high in (64, 80)
    held_bytes = sum(v.nbytes for name in ("low", "high") for v in optimizer.state[params[name]].values()
                     if isinstance(v, Tensor))  # fmt: skip
    assert 0.85 * budget < held_bytes <= budget
    train(optimizer, params, range(1, 4))
    assert [report["rank"] for report in optimizer.subspace_report().values()] == [low, high]
    assert f"ranks 16 to {high}, in {budget} bytes" in repr(optimizer)


def test_layers_of_equal_spectra_get_equal_ranks() -> None:
    params = make_params(dict.fromkeys("abc", (128, 96)))
    optimizer = GaLoreFusedAdamW(params.values(), rank="auto", rank_budget=3 * 4 * 32 * (2 * 128 + 96) + 100)
    assert set(ranks(optimizer, params).values()) == {32}


def test_resuming_keeps_the_ranks_that_were_chosen() -> None:
    optimizer, params = two_layers(120_000)
    give(params)
    optimizer.step()
    resumed_params = clone_params(params)
    resumed = GaLoreFusedAdam8bit(resumed_params.values(), rank="auto", rank_budget=120_000)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for each, own in ((optimizer, params), (resumed, resumed_params)):
        train(each, own, range(1, 4))
    assert_same_snapshot(snapshot(resumed, resumed_params), snapshot(optimizer, params))


def test_a_first_gradient_that_is_not_finite_puts_the_choice_off() -> None:
    optimizer, params = two_layers(120_000)
    before = {name: param.detach().clone() for name, param in params.items()}
    for _ in range(3):
        give(params)
        assert params["low"].grad is not None
        params["low"].grad[0, 0] = math.inf
        with pytest.warns(NonFiniteGradientWarning, match="no ranks can be chosen") if _ < 2 else _nothing():
            optimizer.step()
    assert torch.equal(params["high"], before["high"])
    assert not torch.equal(params["norm"], before["norm"])
    give(params)
    optimizer.step()
    assert not torch.equal(params["high"], before["high"])
    assert optimizer.state[params["low"]]["basis"].shape[1] == 16


def _nothing() -> pytest.WarningsRecorder:
    return pytest.WarningsRecorder(_ispytest=True)


def test_gradients_without_energy_choose_no_ranks() -> None:
    optimizer, params = two_layers(110_000)
    for names in (["norm"], ["norm", "low", "high"], ["high"]):
        for name, param in params.items():
            param.grad = torch.zeros_like(param) if name in names else None
        optimizer.step()
        assert optimizer.param_groups[0]["chosen_ranks"] is None
    give(params)
    optimizer.step()
    assert optimizer.state[params["low"]]["basis"].shape[1] == 16


def test_a_matrix_without_a_gradient_gets_the_mean_of_the_others() -> None:
    optimizer, params = two_layers(110_000)
    give(params)
    params["low"].grad = None
    optimizer.step()
    low, high, _ = optimizer.param_groups[0]["chosen_ranks"]
    assert abs(low - high) <= 16  # what was left of the budget is one of them's
    train(optimizer, params, [1])
    assert optimizer.state[params["low"]]["basis"].shape == (192, low)


def test_a_bad_gradient_elsewhere_leaves_the_choice_open() -> None:
    params = make_params({"low": (256, 192), "high": (256, 192)})
    optimizer = GaLoreFusedAdam8bit(
        [{"params": [("low", params["low"])]}, {"params": [("high", params["high"])]}], rank="auto", rank_budget=60_000
    )
    give({**params, "norm": nn.Parameter(torch.ones(70))})
    assert params["high"].grad is not None
    params["high"].grad = params["high"].grad.to_sparse()
    with pytest.raises(ValueError, match=r'"high".*expected a dense real gradient'):
        optimizer.step()
    assert [group["chosen_ranks"] for group in optimizer.param_groups] == [None, None]


def test_a_scalers_overflow_is_not_told_of() -> None:
    optimizer, params = two_layers(110_000)
    give(params)
    assert params["low"].grad is not None
    params["low"].grad[0, 0] = math.inf
    optimizer.found_inf = torch.ones(())  # type: ignore[attr-defined]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
    del optimizer.found_inf  # type: ignore[attr-defined]
    assert optimizer.param_groups[0]["chosen_ranks"] is None


def test_small_moments_keep_their_format_at_every_rank() -> None:
    params = make_params({"a": (128, 126), "b": (128, 64)})  # 8-bit from rank 32 on, were it not for the budget
    optimizer = GaLoreFusedAdam8bit(params.values(), rank="auto", rank_budget=120_000)
    train(optimizer, params, range(2))
    assert {optimizer.state[param]["exp_avg"].dtype for param in params.values()} == {torch.float32}


def test_a_group_of_given_rank_beside_chosen_ones() -> None:
    params = make_params({"chosen": (256, 192), "given": (256, 192)})
    groups = [{"params": [params["chosen"]], "rank": "auto"}, {"params": [params["given"]], "rank": 8}]
    optimizer = GaLoreFusedAdamW(groups, rank="auto", rank_budget=100_000)
    train(optimizer, params, [0])
    assert optimizer.state[params["given"]]["basis"].shape[1] == 8


def test_convolutions_and_groups() -> None:
    model = nn.Sequential(nn.Linear(64, 48), nn.Linear(48, 64))
    optimizer = GaLoreFusedAdamW(
        galore_param_groups(model, "all-linear", rank="auto", rank_budget=100_000), proj_type="full"
    )
    for step in range(3):
        for index, param in enumerate(model.parameters()):
            param.grad = torch.randn(param.shape, generator=torch.Generator().manual_seed(10 * step + index))
        optimizer.step()
    assert all(report["rank"] >= 16 for report in optimizer.subspace_report().values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": "auto"}, "rank_budget=None in GaLoreFusedAdam8bit(...): expected an integer >= 1"),
        ({"rank": 8, "rank_budget": 10**6}, 'rank_budget=1000000 in GaLoreFusedAdam8bit(...): expected None unless'),
        ({"rank": "auto", "rank_budget": 100}, "rank_budget=100: expected at least"),
        ({"rank": "automatic"}, "rank='automatic' in GaLoreFusedAdam8bit(...): expected an integer >= 1"),
    ],
)  # fmt: skip
def test_a_bad_budget_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        GaLoreFusedAdam8bit([nn.Parameter(torch.ones(300, 40))], **options)  # type: ignore[arg-type]
