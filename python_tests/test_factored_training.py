"""Training with factored gradients: the dense path with the same lag, and what is done to gradients on the way."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import grouping
import lowrank_models
import pytest
import torch
from factored_cases import (
    HIDDEN,
    RANK,
    TARGETS,
    WIDTH,
    Model,
    Run,
    batch,
    carriers,
    largest_difference,
    loss_of,
)
from optimizer_cases import OF_PROJECTIONS, OptimizerClass
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from galore_kernels import (
    GaLoreFusedAdam8bit,
    GaLoreFusedAdamW,
    NonFiniteGradientWarning,
    galore_param_groups,
    prepare,
    unprepare,
)

#: Of losses from 3.7 down to 0.001 over 200 steps in float32, whose products are summed in another order.
SAME_LOSS = 1e-4

OPTIONS: dict[str, dict[str, Any]] = {
    "periodic": {},
    "staggered": {"refresh_schedule": "staggered"},
    "adaptive, warm": {"refresh_schedule": "adaptive", "warm_start": True},
    "rotate": {"moments_on_refresh": "rotate"},
    "reset": {"moments_on_refresh": "reset"},
    "int8": {"basis_format": "int8"},
    "int4, warm": {"basis_format": "int4", "warm_start": True},
    "svd": {"refresh_method": "svd"},
    "reverse_std": {"proj_type": "reverse_std"},
    "decay": {"weight_decay": 0.1, "maximize": False},
}


def equal_runs(steps: int, micro_batches: int = 1, **fields: Any) -> tuple[Run, Run]:
    """A dense and a factored run of equal losses."""
    dense, factored = Run(False, **fields), Run(True, **fields)
    losses = dense.train(steps, micro_batches), factored.train(steps, micro_batches)
    assert largest_difference(*losses) < SAME_LOSS
    assert losses[0][-1] < 0.9 * losses[0][0]
    return dense, factored


def assert_same_refreshes(dense: Run, factored: Run, at_least: int) -> None:
    """Fails unless all refreshes were at the same steps and captured as much."""
    reports = [list(run.optimizer.subspace_report().values()) for run in (dense, factored)]
    assert len(reports[1]) == 3
    for one, other in zip(*reports, strict=True):
        assert {k: one[k] for k in ("rank", "refreshes", "refreshed_at", "interval")} == {
            k: other[k] for k in ("rank", "refreshes", "refreshed_at", "interval")
        }
        assert other["refreshes"] >= at_least
        assert other["captured"] == pytest.approx(one["captured"], abs=1e-3)
        assert other["overlap"] == pytest.approx(one["overlap"], abs=1e-2)


@pytest.mark.parametrize("optimizer_class", OF_PROJECTIONS)
@pytest.mark.parametrize("case", ["periodic", "adaptive, warm"])
def test_200_steps_have_the_losses_of_the_dense_path(case: str, optimizer_class: OptimizerClass) -> None:
    dense, factored = equal_runs(200, optimizer_class=optimizer_class, options=OPTIONS[case], backend="cpu")
    assert_same_refreshes(dense, factored, 3)


OTHERS = [case for case in OPTIONS if case not in ("periodic", "adaptive, warm")]


# What differs between the backends is the update alone.
@pytest.mark.parametrize(("case", "name"), [*[(case, "cpu") for case in OTHERS], ("rotate", "reference")])
def test_every_option_does_what_it_does_to_the_dense_path(case: str, name: str) -> None:
    dense, factored = equal_runs(35, optimizer_class=GaLoreFusedAdam8bit, options=OPTIONS[case], backend=name)
    assert_same_refreshes(dense, factored, 3)
    for name, weight in dense.weights().items():
        assert float((factored.weights()[name] - weight).norm() / weight.norm()) < 1e-3, name


def test_the_lag_of_a_basis_is_seen() -> None:
    # Were the basis of a step's factors used in it, or R taken in another, the runs above would part by this much.
    dense, factored = Run(False), Run(True)
    for group in dense.optimizer.param_groups:
        group["async_refresh"] = False
    assert largest_difference(dense.train(60), factored.train(60)) > 10 * SAME_LOSS


@pytest.mark.parametrize("case", ["periodic", "rotate"])
def test_gradients_accumulate_over_a_refresh(case: str) -> None:
    # The micro-batches of the first step are alike: the first basis comes from the first of them.
    dense, factored = equal_runs(60, micro_batches=3, options=OPTIONS[case])
    assert_same_refreshes(dense, factored, 5)
    kept: list[int] = []

    def look(run: Run) -> None:
        kept.append(len(run.model.mlp_up.gradient.factors))  # type: ignore[union-attr, arg-type]

    factored.train(11, 3, look)
    assert kept == [3, *[0] * 9, 3]


@pytest.mark.parametrize("stochastic_rounding", [False, True])
def test_bfloat16_trains_as_well(stochastic_rounding: bool) -> None:
    options = {"stochastic_rounding": stochastic_rounding}
    runs = [Run(factored, GaLoreFusedAdam8bit, dtype=torch.bfloat16, options=options) for factored in (False, True)]
    dense, factored = (run.train(100) for run in runs)
    # Every weight is rounded by 2^-9 in every step, in directions that a product's last bit may turn.
    assert largest_difference(dense[:10], factored[:10]) < 0.02
    assert factored[-1] < 1.1 * dense[-1] + 0.01
    assert runs[1].model.mlp_up.weight.dtype == torch.bfloat16  # type: ignore[union-attr]


# ---------------------------------------------------------------------- groups, as on a device


def test_groups_are_the_single_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    made = grouping.install(monkeypatch)
    grouping.take_for_device(made, monkeypatch)
    runs = [Run(True, GaLoreFusedAdam8bit, backend, lr=1e-2) for backend in ("cuda", "reference")]
    losses = [run.train(25) for run in runs]
    assert losses[0] == losses[1]
    weights = [run.weights() for run in runs]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    # mlp_up and mlp_down differ in their weights' shapes, the square one in all: three groups of the low-rank update.
    assert {operation for operation, _ in made.made} == {"lowrank_update", "adam8bit_update"}
    plans = len(made.made)
    runs[0].train(4)  # whose carriers lie elsewhere in each
    assert len(made.made) == plans


def test_steps_of_a_graph_that_nobody_counted_bring_a_refresh_nearer(monkeypatch: pytest.MonkeyPatch) -> None:
    grouping.take_for_device(grouping.install(monkeypatch), monkeypatch)
    run = Run(True, backend="cuda")
    run.train(3)
    for state in run.optimizer.state.values():
        counter = run.optimizer._counters.of(state)
        assert counter is not None
        counter.captured = True
    run.optimizer._plan = None  # as after a capture
    run.train(1)
    for state in run.optimizer.state.values():
        state["step"].add_(6)  # as replays do
    run.train(1)
    assert [entry["refreshed_at"] for entry in run.optimizer.subspace_report().values()] == [10, 10, 10]


def test_groups_of_the_device_kernels(cuda_stand_in: str) -> None:
    # The kernels' emulation is slow: one refresh.
    fields: dict[str, Any] = {"optimizer_class": GaLoreFusedAdam8bit, "options": {"update_proj_gap": 3}}
    dense, factored = (Run(False, backend="cpu", **fields), Run(True, backend=cuda_stand_in, **fields))
    assert largest_difference(dense.train(6), factored.train(6)) < SAME_LOSS


# ---------------------------------------------------------------------- what is done to gradients


def test_clipping_by_the_low_rank_norm() -> None:
    run = Run(True, lr=1e-2)
    run.train(3)
    run.backward()
    before = {name: param.grad.clone() for name, param in run.model.named_parameters() if param.grad is not None}
    assert set(carriers(run.model)) <= set(before)
    norm = torch.linalg.vector_norm(torch.stack([grad.norm() for grad in before.values()]))
    reported = nn.utils.clip_grad_norm_(run.model.parameters(), 0.01)
    torch.testing.assert_close(reported, norm)
    for name, param in carriers(run.model).items():
        torch.testing.assert_close(param.grad, before[name] * (0.01 / (norm + 1e-6)))
    run.optimizer.step()
    run.optimizer.zero_grad()
    run.train(10)


@pytest.mark.filterwarnings("ignore::galore_kernels.NonFiniteGradientWarning")
@pytest.mark.parametrize("overflow_at", [0, 4, 5], ids=["first step", "before a refresh", "a refresh"])
def test_a_grad_scaler_skips_and_asks_again(overflow_at: int) -> None:
    losses = []
    runs = [Run(factored, GaLoreFusedAdam8bit, options={"update_proj_gap": 5}) for factored in (False, True)]
    for run in runs:
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=4)
        own = []
        for step in range(12):
            run.steps = step
            loss = loss_of(run.model, batch(step))
            own.append(loss.item())
            bases = {name: state.clone() for name, state in bases_of(run).items()}
            scaler.scale(loss * (float("inf") if step == overflow_at else 1.0)).backward()
            scaler.step(run.optimizer)
            scaler.update()
            run.optimizer.zero_grad()
            if step == overflow_at and step:
                assert all(torch.equal(basis, bases[name]) for name, basis in bases_of(run).items())
        losses.append(own)
    assert largest_difference(*losses) < SAME_LOSS
    assert_same_refreshes(runs[0], runs[1], at_least=3 if overflow_at else 2)


def bases_of(run: Run) -> dict[int, Tensor]:
    params = [param for group in run.optimizer.param_groups for param in group["params"]]
    states = [run.optimizer.state.get(param, {}) for param in params]
    return {index: state["basis"] for index, state in enumerate(states) if "basis" in state}


def test_a_skipped_step_at_a_refresh_asks_for_factors_again() -> None:
    run = Run(True, options={"update_proj_gap": 5})
    run.train(5)

    def poison(own: Run) -> None:
        next(iter(carriers(own.model).values())).grad.fill_(torch.nan)  # type: ignore[union-attr]

    with pytest.warns(NonFiniteGradientWarning):
        run.train(1, before_step=poison)
    report = list(run.optimizer.subspace_report().values())
    assert [entry["refreshes"] for entry in report] == [1, 2, 2]
    run.train(1)
    report = list(run.optimizer.subspace_report().values())
    assert [entry["refreshes"] for entry in report] == [2, 2, 2]
    assert report[0]["refreshed_at"] == 5


def test_autocast_over_float32_weights() -> None:
    runs = [Run(factored) for factored in (False, True)]
    losses = []
    for run in runs:
        forward = run.model.forward

        def autocast(*args: Any, forward: Any = forward) -> Any:
            with torch.autocast("cpu", torch.bfloat16):
                return forward(*args)

        run.model.forward = autocast
        losses.append(run.train(40))
    # R has the rounding of two bfloat16 products where the dense gradient has that of one.
    assert largest_difference(losses[0][:15], losses[1][:15]) < 0.03
    assert abs(losses[0][-1] - losses[1][-1]) < 0.1 * losses[0][-1] + 0.01
    assert all(param.grad is None or param.grad.dtype == torch.float32 for param in runs[1].model.parameters())


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(use_reentrant: bool) -> None:
    plain, recomputing = Run(True), Run(True)

    def forward(tokens: Tensor) -> Tensor:
        model = recomputing.model
        assert isinstance(model, Model)
        return model.head(checkpoint(middle, model, model.embedding(tokens), use_reentrant=use_reentrant))

    def middle(model: Model, x: Tensor) -> Tensor:
        x = x + model.mlp_down(nn.functional.silu(model.mlp_up(x)))
        return x + torch.tanh(model.mlp_square(x))

    recomputing.model.forward = forward
    assert plain.train(25) == recomputing.train(25)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_layer_used_twice_under_checkpointing_may_find_its_first_basis_in_between(use_reentrant: bool) -> None:
    # When the first use is computed again, the second has given the layer a basis.
    def losses(again: bool) -> list[float]:
        torch.manual_seed(0)
        model = prepare(nn.ModuleDict({"layer": nn.Linear(WIDTH, WIDTH)}), ["layer"], rank=8)
        optimizer = GaLoreFusedAdamW(galore_param_groups(model, ["layer"], update_proj_gap=2), lr=1e-2)
        layer, found = model["layer"], []
        x = torch.randn(9, WIDTH, generator=torch.Generator().manual_seed(3)).requires_grad_()
        for _ in range(5):
            y = x
            for _ in range(2):
                y = torch.tanh(checkpoint(layer, y, use_reentrant=use_reentrant) if again else layer(y))
            loss = y.square().sum()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.item())
        return found

    assert losses(True) == losses(False)


# ---------------------------------------------------------------------- torch.compile

#: Compilers of some versions warn of what they themselves use.
COMPILES = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@COMPILES
def test_a_compiled_model_is_compiled_once() -> None:
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    torch._dynamo.reset()
    # Staggered: in every third step another layer keeps its factors.
    options = {"update_proj_gap": 9, "refresh_schedule": "staggered"}
    eager, compiled = Run(True, options=options), Run(True, options=options)
    model = compiled.model
    compiled.model = torch.compile(model, fullgraph=True, backend=backend)  # type: ignore[assignment]
    losses = eager.train(25), compiled.train(25)
    assert largest_difference(*losses) < SAME_LOSS
    assert len(graphs) == 1
    compiled.model = model
    assert_same_refreshes(eager, compiled, 3)


def trained_blocks(compile_model: Callable[[lowrank_models.Model], Any]) -> tuple[list[float], dict[str, Any]]:
    """Losses and report of blocks with residuals, whose backward pass reuses memory if it is compiled to do so."""
    torch._dynamo.reset()
    model = prepare(lowrank_models.Model(blocks=4), rank=lowrank_models.RANK)
    groups = galore_param_groups(model, update_proj_gap=2)
    optimizer = GaLoreFusedAdam8bit(groups, lr=1e-2)
    compiled = compile_model(model)
    return lowrank_models.run(compiled, optimizer, range(7)), optimizer.subspace_report()


@COMPILES
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # Dynamo's, of inputs
def test_equal_blocks_share_a_graph() -> None:
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    def by_block(model: lowrank_models.Model) -> lowrank_models.Model:
        for block in model.blocks:
            block.compile(backend=backend, fullgraph=True)
        return model

    losses, _ = trained_blocks(by_block)
    assert largest_difference(losses, trained_blocks(lambda model: model)[0]) < SAME_LOSS
    assert len(graphs) == 1


@COMPILES
@pytest.mark.slow
def test_inductor() -> None:
    losses, report = trained_blocks(lambda model: torch.compile(model, fullgraph=True))
    expected_losses, expected = trained_blocks(lambda model: model)
    assert largest_difference(losses, expected_losses) < SAME_LOSS
    # What is kept for a search must not be overwritten by what the backward pass does next.
    for name, layer in expected.items():
        assert report[name]["refreshes"] == layer["refreshes"] == 4
        assert report[name]["captured"] == pytest.approx(layer["captured"], abs=1e-3), name
        assert report[name]["overlap"] == pytest.approx(layer["overlap"], abs=1e-2), name


# ---------------------------------------------------------------------- around


def test_gradients_that_were_given_up_leave_no_factors() -> None:
    for give_up in ("optimizer", "optimizer, in place", "model"):
        run, expected = Run(True, options={"update_proj_gap": 5}), Run(True, options={"update_proj_gap": 5})
        for either in (run, expected):
            either.train(5)
        run.steps = 77
        run.backward()
        if give_up == "model":
            run.model.zero_grad()
        else:
            run.optimizer.zero_grad(set_to_none=give_up == "optimizer")
            assert not run.model.mlp_up.gradient.factors  # type: ignore[union-attr]
        run.steps = 5
        assert run.train(6) == expected.train(6)
        assert run.optimizer.subspace_report() == expected.optimizer.subspace_report()


def test_an_unused_layer_keeps_its_turn() -> None:
    run = Run(True, options={"update_proj_gap": 3})
    model = run.model
    assert isinstance(model, Model)
    forward = model.forward

    def without_square(tokens: Tensor) -> Tensor:
        x = model.embedding(tokens)
        return model.head(x + model.mlp_down(nn.functional.silu(model.mlp_up(x))))

    run.train(3)
    model.forward = without_square  # type: ignore[method-assign]
    run.train(2)
    model.forward = forward  # type: ignore[method-assign]
    run.train(1)
    steps = [run.optimizer.state[param]["step"].item() for param in carriers(model).values()]
    refreshes = [entry["refreshes"] for entry in run.optimizer.subspace_report().values()]
    assert steps == [6, 6, 4]
    assert refreshes == [2, 2, 2]


@pytest.mark.parametrize("first", [True, False], ids=["unprepared", "prepared"])
def test_it_trains_on_the_other_way(first: bool) -> None:
    run = Run(first)
    losses = run.train(15)
    if first:
        unprepare(run.model)
    else:
        prepare(run.model, TARGETS, RANK)
    run.factored = not first
    saved = copy.deepcopy(run.optimizer.state_dict())
    run.optimizer = run.new_optimizer()
    run.optimizer.load_state_dict(saved)  # bases and moments have the same shapes
    for group in run.optimizer.param_groups:
        group["async_refresh"] = first  # the checkpoint's is that of the other way
    losses += run.train(45)
    assert largest_difference(losses, Run(False).train(60)) < SAME_LOSS


def test_the_options_of_prepared_layers_in_sizes_and_words() -> None:
    factored, dense = Run(True, GaLoreFusedAdam8bit), Run(False, GaLoreFusedAdam8bit)
    assert factored.optimizer.state_bytes() == dense.optimizer.state_bytes()
    assert f"3 projected to rank {RANK} (std" in repr(factored.optimizer)
    assert HIDDEN * RANK >= 4096  # these moments are 8-bit


def test_model_parameters_may_be_passed_as_they_are() -> None:
    torch.manual_seed(0)
    model = prepare(Model(), TARGETS, RANK)
    weight = model.mlp_up.weight.clone()
    optimizer = GaLoreFusedAdamW((param for param in model.parameters() if param.requires_grad), lr=1e-2)
    loss_of(model, batch(0)).backward()
    optimizer.step()
    assert optimizer.state[model.mlp_up.lowrank]["basis"].shape == (WIDTH, RANK)  # type: ignore[index]
    assert not torch.equal(model.mlp_up.weight, weight)
