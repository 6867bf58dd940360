"""Layerwise updates: those of the wrapped optimizer, in another order, with one gradient at a time."""

from __future__ import annotations

import copy
import functools
import gc
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lowrank_models import RANK, Model, backward_passes, batch, loss_of, run
from optimizer_cases import OF_PROJECTIONS, OptimizerClass, assert_same_snapshot, snapshot, taken
from torch import Tensor, nn

from galore_kernels import (
    GaLoreFusedAdam8bit,
    LayerwiseOptimizer,
    NonFiniteGradientWarning,
    galore_param_groups,
    prepare,
)
from galore_kernels.nn import FactoredLinear
from galore_kernels.optim.base import LowRankOptimizer
from galore_kernels.optim.multi_tensor import Plan

#: Refreshes at steps 0, 4 and 8 of the runs.
OPTIONS: dict[str, Any] = {"rank": RANK, "update_proj_gap": 4}
STEPS = 10


def made(
    optimizer: OptimizerClass = GaLoreFusedAdam8bit,
    *,
    factored: bool = False,
    model: Model | None = None,
    **options: Any,
) -> tuple[Model, LowRankOptimizer]:
    model = Model() if model is None else model
    if factored:
        prepare(model, rank=RANK)
    groups = galore_param_groups(model, **{**OPTIONS, **options})
    return model, optimizer(groups, lr=1e-2, weight_decay=0.1)


def result(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    inner = optimizer.optimizer if isinstance(optimizer, LayerwiseOptimizer) else optimizer
    return snapshot(inner, dict(model.state_dict()))


SCHEDULES: list[dict[str, Any]] = [
    {},
    {"refresh_schedule": "staggered", "warm_start": True},
    {"async_refresh": True, "moments_on_refresh": "rotate"},
    {"moments_on_refresh": "reset", "basis_format": "int8"},
    {"proj_type": "reverse_std"},
]


@pytest.mark.parametrize("factored", [False, True])
@pytest.mark.parametrize("options", SCHEDULES, ids=str)
@pytest.mark.parametrize("optimizer", OF_PROJECTIONS)
def test_it_makes_the_weights_and_states_of_the_wrapped_optimizer(
    optimizer: OptimizerClass, options: dict[str, Any], factored: bool
) -> None:
    options, results = taken(optimizer, options), []
    for wrap in (False, True):
        model = Model()
        if factored:
            prepare(model, rank=RANK, proj_type=options.get("proj_type", "std"))
        model, plain = made(optimizer, model=model, **options)
        stepped = LayerwiseOptimizer(plain) if wrap else plain
        losses = run(model, stepped, range(STEPS))
        results.append((losses, result(model, stepped)))
    assert results[1][0] == results[0][0]
    assert_same_snapshot(results[1][1], results[0][1])


def test_a_schedulers_rate_is_that_of_the_step() -> None:
    results = []
    for wrap in (False, True):
        model, plain = made()
        stepped = LayerwiseOptimizer(plain) if wrap else plain
        scheduler = torch.optim.lr_scheduler.LambdaLR(stepped, lambda step: 1.0 / (step + 1))
        for step in range(STEPS):
            run(model, stepped, [step])
            scheduler.step()
        results.append(result(model, stepped))
    assert_same_snapshot(results[1], results[0])


def test_one_gradient_exists_at_a_time() -> None:
    model, plain = made()
    optimizer = LayerwiseOptimizer(plain)
    there: list[int] = []
    for param in model.parameters():
        param.register_post_accumulate_grad_hook(
            lambda _: there.append(sum(param.grad is not None for param in model.parameters()))
        )
    backward_passes(model, 0)
    optimizer.step()
    assert there == [0] * len(list(model.parameters()))  # after each, its own is gone too


def test_prepared_layers_give_up_the_memory_of_their_gradients() -> None:
    model, plain = made(factored=True)
    optimizer = LayerwiseOptimizer(plain)
    run(model, optimizer, range(2))
    carriers = [layer.lowrank for layer in model.modules() if isinstance(layer, FactoredLinear)]
    assert carriers
    assert all(carrier.untyped_storage().nbytes() == carrier.element_size() for carrier in carriers)


# ---------------------------------------------------------------------- accumulation


def same_first_basis(model: Model, optimizer: LowRankOptimizer) -> None:
    """A step of one backward pass: then both have the same bases, which come from the first pass under accumulation."""
    run(model, optimizer, [0])


@pytest.mark.parametrize("factored", [False, True])
@pytest.mark.parametrize("options", SCHEDULES[:3], ids=str)
def test_gradients_of_several_passes_are_added_up(options: dict[str, Any], factored: bool) -> None:
    results = []
    for wrap in (False, True):
        model, plain = made(factored=factored, **options)
        same_first_basis(model, plain)
        stepped = LayerwiseOptimizer(plain, accumulation_steps=3) if wrap else plain
        losses = run(model, stepped, range(1, STEPS), accumulate=3)
        results.append((losses, model.state_dict()))
    # The sums of projections differ from projections of sums by roundings, which Adam's roots multiply.
    torch.testing.assert_close(results[1][0], results[0][0], rtol=0, atol=2e-4)
    for key, value in results[0][1].items():
        change = float((value - Model().state_dict().get(key, value)).norm())
        assert float((results[1][1][key] - value).norm()) <= 5e-3 * change + 1e-7, key


def test_projections_are_added_up_at_rank_r() -> None:
    model, plain = made()
    optimizer = LayerwiseOptimizer(plain, accumulation_steps=3)
    run(model, optimizer, [0], accumulate=3)
    for passes in (1, 2):
        loss_of(model, batch(9, passes)).backward()
        matrices = [param for name, param in model.named_parameters() if "mlp" in name and param.dim() == 2]
        assert all(param.grad is None for param in matrices)
        assert all(optimizer._sums[id(param)].shape == plain.state[param]["exp_avg"].shape for param in matrices)


def test_a_step_that_comes_early_takes_what_is_there() -> None:
    results = []
    for passes in (3, 2):
        model, plain = made()
        optimizer = LayerwiseOptimizer(plain, accumulation_steps=passes)
        run(model, optimizer, range(4), accumulate=2)
        results.append(result(model, optimizer))
    assert_same_snapshot(results[0], results[1])


def test_more_passes_than_said_are_refused() -> None:
    model, plain = made()
    optimizer = LayerwiseOptimizer(plain)
    backward_passes(model, 0)
    with pytest.raises(RuntimeError, match=r"gradient number 2 in a step of 1; call step\(\)"):
        backward_passes(model, 1)
    optimizer.step()


# ---------------------------------------------------------------------- clipping

#: Below the norms of all steps of the runs.
MOST = 0.5


def clipped_by_torch(model: nn.Module) -> Callable[[], Tensor]:
    return lambda: torch.nn.utils.clip_grad_norm_(model.parameters(), MOST)


@pytest.mark.parametrize("factored", [False, True])
def test_exact_clipping_is_torchs(factored: bool) -> None:
    model, plain = made(factored=factored)
    expected = run(model, plain, range(STEPS), before_step=clipped_by_torch(model))
    other, wrapped = made(factored=factored)
    optimizer = LayerwiseOptimizer(wrapped, max_grad_norm=MOST, clipping="exact")
    losses = []
    for step in range(STEPS):
        losses.append(float(optimizer.step(functools.partial(backward_passes, other, step))))
        optimizer.zero_grad()
    torch.testing.assert_close(losses, expected, rtol=0, atol=1e-5)  # division by the norm rounds once more
    unclipped, plain = made(factored=factored)
    assert max(map(abs, map(float.__sub__, run(unclipped, plain, range(STEPS)), expected))) > 1e-2


def test_exact_clipping_draws_the_same_random_numbers_twice() -> None:
    model, plain = made()
    optimizer = LayerwiseOptimizer(plain, max_grad_norm=MOST, clipping="exact")
    drawn: list[float] = []

    def closure() -> Tensor:
        drawn.append(float(torch.rand(())))
        return backward_passes(model, 0)

    optimizer.step(closure)
    assert len(drawn) == 2
    assert drawn[0] == drawn[1]


def test_exact_clipping_skips_a_step_whose_norm_is_not_finite() -> None:
    model, plain = made()
    optimizer = LayerwiseOptimizer(plain, max_grad_norm=MOST, clipping="exact")
    for step in range(2):
        optimizer.step(functools.partial(backward_passes, model, step))
    before = result(model, optimizer)

    def closure() -> Tensor:
        loss = loss_of(model, batch(2)) * torch.inf
        loss.backward()
        return loss

    with pytest.warns(NonFiniteGradientWarning, match="norm of all gradients"):
        optimizer.step(closure)
    assert_same_snapshot(result(model, optimizer), before)
    optimizer.step(lambda: backward_passes(model, 3))
    assert all(bool(param.isfinite().all()) for param in model.parameters())


def test_exact_clipping_needs_a_closure() -> None:
    model, plain = made()
    optimizer = LayerwiseOptimizer(plain, max_grad_norm=MOST, clipping="exact")
    with pytest.raises(RuntimeError, match="expected a closure"):
        optimizer.step()
    with pytest.raises(RuntimeError, match=r"pass step\(\) a closure"):
        backward_passes(model, 0)


def divisors(optimizer: LayerwiseOptimizer, monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """What each gradient of the next steps is divided by."""
    found: dict[str, float] = {}
    step_of = optimizer.optimizer.step_of

    def noting(update: Any, unscaling: Any) -> None:
        scale = unscaling.on(update.param.device)["grad_scale"]
        found[update.name] = 1.0 if scale is None else float(scale)
        step_of(update, unscaling)

    monkeypatch.setattr(optimizer.optimizer, "step_of", noting)
    return found


def test_clipping_by_the_norm_before(monkeypatch: pytest.MonkeyPatch) -> None:
    model, plain = made()
    optimizer = LayerwiseOptimizer(plain, max_grad_norm=MOST)
    twin, _ = made()
    found = divisors(optimizer, monkeypatch)
    backward_passes(twin, 0)
    first = torch.nn.utils.get_total_norm([param.grad for param in twin.parameters() if param.grad is not None])
    run(model, optimizer, [0])
    assert len(found) == len(list(model.parameters()))
    # At the first step there is but each tensor's own norm.
    own = sorted(max(1.0, float(param.grad.norm()) / MOST) for param in twin.parameters() if param.grad is not None)
    torch.testing.assert_close(sorted(found.values()), own)
    run(model, optimizer, [1])
    assert min(found.values()) == pytest.approx(max(1.0, float(first) / MOST), rel=1e-5)


def test_a_norm_that_is_not_finite_clips_nothing_later(monkeypatch: pytest.MonkeyPatch) -> None:
    model, plain = made()
    optimizer = LayerwiseOptimizer(plain, max_grad_norm=MOST)
    run(model, optimizer, [0])
    found = divisors(optimizer, monkeypatch)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NonFiniteGradientWarning)
        (loss_of(model, batch(1)) * torch.nan).backward()
        optimizer.step()
    run(model, optimizer, [2])
    assert all(torch.isfinite(torch.tensor(list(found.values()))))


# ---------------------------------------------------------------------- faults and persistence


@pytest.mark.parametrize("factored", [False, True])
def test_a_gradient_that_is_not_finite_skips_its_parameter(factored: bool) -> None:
    model, plain = made(factored=factored)
    optimizer = LayerwiseOptimizer(plain)
    run(model, optimizer, range(2))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    head = next(iter(model.head.parameters()))
    handle = head.register_hook(lambda grad: grad * torch.nan)
    with pytest.warns(NonFiniteGradientWarning, match=r"head\.weight"):
        run(model, optimizer, [2])
    handle.remove()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == set(before) - {"head.weight"}
    assert list(optimizer.skipped_steps().values()) == [1]


@pytest.mark.parametrize("factored", [False, True])
@pytest.mark.parametrize("async_refresh", [False, True])
def test_roundings_are_drawn_anew_after_a_reset(
    async_refresh: bool, factored: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def trained(*, layerwise: bool) -> dict[str, Any]:
        options: dict[str, Any] = {"moments_on_refresh": "reset", "async_refresh": async_refresh}
        model, plain = made(factored=factored, model=Model(dtype=torch.bfloat16), stochastic_rounding=True, **options)
        optimizer = LayerwiseOptimizer(plain) if layerwise else plain
        run(model, optimizer, range(STEPS))
        return result(model, optimizer)

    whole, layer_by_layer = trained(layerwise=False), trained(layerwise=True)
    monkeypatch.setattr(Plan, "reason_to_be_alone", lambda self, update, states: "no plan is followed")
    expected = trained(layerwise=False)
    assert_same_snapshot(whole, expected)
    assert_same_snapshot(layer_by_layer, expected)


@pytest.mark.parametrize("factored", [False, True])
@pytest.mark.parametrize("at", [3, 4, 5])  # before, at and after a refresh
def test_resuming_gives_the_run_that_was_not_interrupted(at: int, factored: bool) -> None:
    model, plain = made(factored=factored, async_refresh=True)
    whole = LayerwiseOptimizer(plain, max_grad_norm=MOST)
    run(model, whole, range(at))
    saved = copy.deepcopy((model.state_dict(), whole.state_dict()))
    run(model, whole, range(at, STEPS))
    other, plain = made(factored=factored, async_refresh=True)
    resumed = LayerwiseOptimizer(plain, max_grad_norm=MOST)
    other.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    run(other, resumed, range(at, STEPS))
    assert_same_snapshot(result(other, resumed), result(model, whole))


def test_its_state_dict_is_plain_and_that_of_the_wrapped_loads(tmp_path: Any) -> None:
    model, plain = made()
    optimizer = LayerwiseOptimizer(plain, max_grad_norm=MOST)
    run(model, optimizer, range(3))
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    _, plain = made()
    LayerwiseOptimizer(plain).load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert_same_snapshot(result(model, plain), result(model, optimizer))
    LayerwiseOptimizer(made()[1]).load_state_dict(optimizer.optimizer.state_dict())


def test_a_damaged_norm_is_refused_before_anything_changes() -> None:
    model, plain = made()
    optimizer = LayerwiseOptimizer(plain, max_grad_norm=MOST)
    run(model, optimizer, range(2))
    before, state = result(model, optimizer), optimizer.state_dict()
    with pytest.raises(ValueError, match="previous_norm is tensor"):
        optimizer.load_state_dict({**state, "layerwise": {"previous_norm": torch.tensor(-1.0)}})
    assert_same_snapshot(result(model, optimizer), before)


def test_zero_grad_drops_what_waits() -> None:
    results = []
    for disturbed in (False, True):
        model, plain = made()
        optimizer = LayerwiseOptimizer(plain, accumulation_steps=2)
        run(model, optimizer, range(2), accumulate=2)
        if disturbed:
            loss_of(model, batch(77)).backward()
            optimizer.zero_grad()
        run(model, optimizer, range(2, 5), accumulate=2)
        results.append(result(model, optimizer))
    assert_same_snapshot(results[1], results[0])


def test_copies_train_apart() -> None:
    model, plain = made()
    optimizer = LayerwiseOptimizer(plain)
    run(model, optimizer, range(2))
    other, copied = copy.deepcopy((model, optimizer))
    before = result(model, optimizer)
    run(other, copied, range(2, 4))
    assert_same_snapshot(result(model, optimizer), before)
    run(model, optimizer, range(2, 4))
    assert_same_snapshot(result(other, copied), result(model, optimizer))


def test_a_parameter_that_was_frozen_is_noticed() -> None:
    model, plain = made()
    model.head.weight.requires_grad_(False)
    optimizer = LayerwiseOptimizer(plain)
    model.head.weight.requires_grad_(True)
    backward_passes(model, 0)
    with pytest.raises(RuntimeError, match="did not require one"):
        optimizer.step()
    model.zero_grad()
    optimizer = LayerwiseOptimizer(plain)  # the remedy that the message names
    before = model.head.weight.detach().clone()
    run(model, optimizer, range(1, 3))
    assert not torch.equal(model.head.weight, before)


def test_the_last_of_several_wrappers_updates() -> None:
    results = []
    for wrappers in (1, 2):
        model, plain = made()
        kept = [LayerwiseOptimizer(plain) for _ in range(wrappers)]
        run(model, kept[-1], range(3))
        results.append(result(model, plain))
    assert_same_snapshot(results[1], results[0])


@pytest.mark.parametrize("by", ["detaching", "forgetting"])
def test_a_wrapper_that_is_gone_updates_nothing(by: str) -> None:
    model, plain = made()
    optimizer = LayerwiseOptimizer(plain)
    run(model, optimizer, range(2))
    before = result(model, plain)
    if by == "detaching":
        optimizer.detach()
    else:
        del optimizer
        gc.collect()
    backward_passes(model, 2)
    assert_same_snapshot(result(model, plain), before)
    assert all(param.grad is not None for param in model.parameters())


def test_gradients_whose_norm_overflows_are_skipped() -> None:
    model, plain = made()
    optimizer = LayerwiseOptimizer(plain, max_grad_norm=MOST)
    run(model, optimizer, range(2))
    handle = model.head.weight.register_hook(lambda grad: torch.full_like(grad, 3e18))
    with pytest.warns(NonFiniteGradientWarning, match=r"head\.weight"):
        run(model, optimizer, [2])
    handle.remove()
    assert list(optimizer.skipped_steps().values()) == [1]


def test_zero_grad_before_step_leaves_the_step_to_be_ended() -> None:
    results = []
    for early in (False, True):
        model, plain = made(factored=True)
        optimizer = LayerwiseOptimizer(plain)
        for step in range(STEPS):  # over refreshes, for which layers are told to keep their factors
            backward_passes(model, step)
            if early:
                optimizer.zero_grad()
            optimizer.step()
            optimizer.zero_grad()
        results.append(result(model, plain))
    assert_same_snapshot(results[1], results[0])


def test_what_cannot_be_is_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    model, plain = made()
    with pytest.raises(TypeError, match="optimizer: expected one of galore_kernels"):
        LayerwiseOptimizer(torch.optim.SGD(model.parameters()))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="accumulation_steps=0"):
        LayerwiseOptimizer(plain, accumulation_steps=0)
    with pytest.raises(ValueError, match="max_grad_norm=-1"):
        LayerwiseOptimizer(plain, max_grad_norm=-1.0)
    with pytest.raises(ValueError, match="clipping='norm'"):
        LayerwiseOptimizer(plain, clipping="norm")
    auto = GaLoreFusedAdam8bit(Model().parameters(), rank="auto", rank_budget=10**6)
    with pytest.raises(ValueError, match='rank="auto" in param group 0'):
        LayerwiseOptimizer(auto)
    optimizer = LayerwiseOptimizer(plain)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(loss_of(model, batch(0))).backward()
    with pytest.raises(RuntimeError, match="GradScaler with a LayerwiseOptimizer"):
        scaler.step(optimizer)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(RuntimeError, match="DDP averages gradients"):
        LayerwiseOptimizer(made()[1])
