"""Prepared layers with int8 weights and gradients of full size, which APOLLO scales (Q-APOLLO), or GaLore projects."""

from __future__ import annotations

import copy
import io
from functools import partial
from typing import Any

import numpy as np
import oracle
import pytest
import tolerances
import torch
from compat_cases import llama, mean_of_last
from compat_cases import train as train_llama
from grouping import install
from lowrank_models import RANK, Model, backward_passes, batch, loss_of, run
from optimizer_cases import EVERY_OPTIMIZER, OptimizerClass, assert_same_snapshot, snapshot
from test_int8_linear import layers_of
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from update_cases import assert_codes_almost_equal, assert_same_bits, f64

from galore_kernels import (
    APOLLOFusedAdam8bit,
    APOLLOFusedAdamW,
    GaLoreFusedAdam8bit,
    LayerwiseOptimizer,
    galore_param_groups,
    ops,
    plain_state_dict,
    prepare,
)
from galore_kernels.nn import Int8Linear
from galore_kernels.optim.base import LowRankOptimizer

MINI: dict[str, Any] = {"rank": 1, "scale_type": "tensor", "scale": 128.0}

#: Of the projected group: APOLLO's kinds.
KINDS: dict[str, dict[str, Any]] = {
    "channel": {},
    "Mini": MINI,
    "rademacher": {"proj": "rademacher", "proj_type": "reverse_std"},
    "svd": {"proj": "svd"},
}


def prepared(dtype: torch.dtype = torch.float32) -> Model:
    return prepare(Model(dtype=dtype), rank=None, weights="int8")


def optimizer_of(
    model: nn.Module, kind: OptimizerClass = APOLLOFusedAdam8bit, backend: str = "auto", **options: Any
) -> LowRankOptimizer:
    groups = galore_param_groups(model, **{"rank": RANK, "update_proj_gap": 4, "weight_decay": 0.01, **options})
    return kind(groups, lr=1e-2, backend=backend)


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    inner = optimizer.optimizer if isinstance(optimizer, LayerwiseOptimizer) else optimizer
    return snapshot(inner, dict(model.state_dict()))


def dequantized(model: nn.Module) -> Model:
    """The plain model that a prepared one stands for."""
    plain = Model()
    plain.load_state_dict(plain_state_dict(model))
    return plain


def matrices(model: nn.Module) -> dict[str, Tensor]:
    """The projected parameters of a plain model."""
    return {name: p for name, p in model.named_parameters() if ("mlp" in name or "attn" in name) and p.dim() == 2}


def assert_same_gradients(model: nn.Module, plain: nn.Module) -> None:
    expected = {name: param.grad for name, param in plain.named_parameters()}
    got = {name.replace(".dense", ".weight"): p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert got.keys() == expected.keys()
    for name, grad in expected.items():
        assert isinstance(grad, Tensor)
        given = got[name]
        assert given is not None
        assert_same_bits(given, grad, name)


# ---------------------------------------------------------------------- gradients


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_gradient_is_that_of_the_plain_model(dtype: torch.dtype, autocast: bool) -> None:
    model = prepared(dtype)
    plain = dequantized(model).to(dtype)
    for own in (model, plain):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = loss_of(own, batch(0))
        loss.backward()
        backward_passes(own, 2)  # is added
    assert_same_gradients(model, plain)
    of_all = [torch.nn.utils.clip_grad_norm_(own.parameters(), 0.1) for own in (model, plain)]
    torch.testing.assert_close(of_all[0], of_all[1])  # of the same tensors, in another order
    assert of_all[0] > 0.1


def test_activations_may_be_computed_again() -> None:
    model = prepared()
    plain = dequantized(model)
    for own in (model, plain):
        x = own.embedding(batch(0))
        for block in own.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        own.head(x).square().sum().backward()
    assert_same_gradients(model, plain)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # some versions' compilers warn of what they use
def test_a_compiled_model_trains_as_an_eager_one() -> None:
    torch._dynamo.reset()
    losses = []
    for compiled in (False, True):
        model = prepared()
        optimizer = optimizer_of(model)
        own = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
        losses.append(run(own, optimizer, range(8)))  # type: ignore[arg-type]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-4, atol=0)
    assert losses[0][-1] < 0.5 * losses[0][0]


# ---------------------------------------------------------------------- steps


@pytest.mark.parametrize("kind", ["channel", "Mini", "rademacher"])
def test_steps_are_the_papers_in_float64_rounded_by_the_seed(kind: str, backend: str) -> None:
    model = prepared()
    optimizer = optimizer_of(model, APOLLOFusedAdamW, backend, **KINDS[kind])
    group = optimizer.param_groups[0]
    layers = layers_of(model)
    moments = {name: (np.zeros(()), np.zeros(()), 0.0) for name in layers}
    updates = {update.name: update for update in optimizer.listed()}
    for step in range(6):
        backward_passes(model, step)
        before = {name: (f64(layer.weight), f64(layer.weight_scale)) for name, layer in layers.items()}
        optimizer.step()
        for index, (name, layer) in enumerate(layers.items()):
            state, grad = optimizer.state[layer.dense], layer.dense.grad
            assert grad is not None
            update = next(u for u in updates.values() if u.param is layer.dense)
            assert update.layout.side is not None
            short = update.layout.short
            drawn = ops.RandomBasis(update.layout.rank or 0, state["basis_seed"], ops_family(group["proj"]))
            basis = f64(ops.random_basis(short, drawn)) / np.sqrt(drawn.rank)
            options = oracle.Apollo(group["scale"], group["scale_type"] == "tensor")
            scalars = oracle.Adam(step=step + 1, lr=1e-2, weight_decay=0.01)
            m, v, norm = moments[name]
            weight, m, v, norm = oracle.apollo(
                before[name][0], f64(grad), basis, m, v, norm, scalars, options, update.layout.side
            )
            moments[name] = m, v, norm
            seed = update.rounding_seed(state)
            assert seed is not None
            bits16 = oracle.random_bits16(seed, step + 1, weight.size).reshape(weight.shape)
            codes, scale = oracle.requantize_weight(weight, before[name][1], bits16)
            what = f"{name}, step {step}, layer {index}"
            assert_codes_almost_equal(layer.weight_codes, codes, tolerances.EQUAL_INT8_CODES, what)
            np.testing.assert_allclose(f64(layer.weight_scale), scale, rtol=1e-5)
            assert not np.array_equal(weight, before[name][0])
        optimizer.zero_grad()


def ops_family(proj: str) -> str:
    return {"random": "gaussian"}.get(proj, proj)


@pytest.mark.parametrize("layerwise", [False, True])
@pytest.mark.parametrize("kind", EVERY_OPTIMIZER)
def test_groups_and_layers_make_the_same_step(
    kind: OptimizerClass, layerwise: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    grouping = install(monkeypatch)
    results = []
    for backend in ("reference", "cuda"):
        model = prepared()
        optimizer = optimizer_of(model, kind, backend)
        stepped = LayerwiseOptimizer(optimizer) if layerwise and backend == "cuda" else optimizer
        losses = run(model, stepped, range(9))
        results.append((losses, state_of(model, stepped)))
    assert results[1][0] == results[0][0]
    assert_same_snapshot(results[1][1], results[0][1])
    operations = {operation for operation, _, _ in grouping.calls}
    assert operations.isdisjoint({"lowrank_update"})
    if "Adafactor" not in kind.__name__:
        assert operations & {"apollo_update", "galore_update"}


# Under accumulation a basis is found in the first of several gradients.
@pytest.mark.parametrize(("kind", "accumulation"), [*((kind, 1) for kind in KINDS), ("channel", 2), ("Mini", 2)])
def test_layerwise_updates_are_those_of_whole_steps(kind: str, accumulation: int) -> None:
    results = []
    for layerwise in (False, True):
        model = prepared()
        optimizer = optimizer_of(model, refresh_schedule="staggered", **KINDS[kind])
        stepped = LayerwiseOptimizer(optimizer, accumulation_steps=accumulation) if layerwise else optimizer
        losses = run(model, stepped, range(9), accumulate=accumulation)
        results.append((losses, state_of(model, stepped)))
    assert results[1][0] == results[0][0]
    assert_same_snapshot(results[1][1], results[0][1])


def test_galore_adds_up_projections() -> None:
    losses = []
    for layerwise in (False, True):
        model = prepared()
        optimizer = optimizer_of(model, GaLoreFusedAdam8bit)
        run(model, optimizer, [0])  # one basis for both
        stepped = LayerwiseOptimizer(optimizer, accumulation_steps=3) if layerwise else optimizer
        losses.append(run(model, stepped, range(1, 20), accumulate=3))
    # Sums of projections are projections of sums but for roundings, which may turn a code another way.
    torch.testing.assert_close(losses[1], losses[0], rtol=0, atol=0.02 * losses[0][0])


def test_exact_clipping_is_that_of_all_gradients() -> None:
    results = []
    for layerwise in (False, True):
        model = prepared()
        optimizer: torch.optim.Optimizer = optimizer_of(model, APOLLOFusedAdamW, norm_growth_limit=None)
        if layerwise:
            optimizer = LayerwiseOptimizer(optimizer, max_grad_norm=0.05, clipping="exact")  # type: ignore[arg-type]
        losses = []
        for step in range(4):
            if layerwise:
                losses.append(float(optimizer.step(partial(backward_passes, model, step))))  # type: ignore[arg-type]
            else:
                losses.append(float(backward_passes(model, step)))
                torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 0.05)
                optimizer.step()
            optimizer.zero_grad()
        results.append(losses)
    torch.testing.assert_close(results[1], results[0], rtol=1e-3, atol=0)


def test_a_gradient_scaler_s_factor_is_taken_off() -> None:
    results = []
    for scale in (None, 1024.0):
        model = prepared()
        optimizer = optimizer_of(model)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
        for step in range(5):
            scaler.scale(loss_of(model, batch(step))).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        results.append(state_of(model, optimizer))
    assert_same_snapshot(results[1], results[0])


def test_a_gradient_that_is_not_finite_leaves_codes_and_scales() -> None:
    model = prepared()
    optimizer = optimizer_of(model)
    run(model, optimizer, range(2))
    layer = model.blocks[0].mlp_up
    assert isinstance(layer, Int8Linear)
    before = layer.weight_codes.clone(), layer.weight_scale.clone()

    def spoil() -> None:
        assert layer.dense.grad is not None
        layer.dense.grad[3, 5] = torch.nan

    with pytest.warns(UserWarning, match=r"mlp_up\.dense.*its step was skipped"):
        run(model, optimizer, [2], before_step=spoil)
    assert torch.equal(layer.weight_codes, before[0])
    assert torch.equal(layer.weight_scale, before[1])
    assert list(optimizer.skipped_steps().values()) == [1]


# ---------------------------------------------------------------------- training


@pytest.mark.parametrize("kind", EVERY_OPTIMIZER)
def test_training_follows_that_of_plain_weights(kind: OptimizerClass) -> None:
    plain = Model()
    expected = run(plain, optimizer_of(plain, kind), range(60))
    model = prepared()
    losses = run(model, optimizer_of(model, kind), range(60))
    assert expected[-1] < 0.2 * expected[0]
    assert abs(sum(losses[-15:]) - sum(expected[-15:])) / 15 < 0.01 * expected[0]


@pytest.mark.parametrize("kind", ["channel", "Mini"])
def test_a_llama_learns_as_with_plain_weights(kind: str) -> None:
    options = {"rank": 8, "update_proj_gap": 60, **KINDS[kind]}
    last: list[float] = []
    for quantized in (False, True):
        model = llama()
        if quantized:
            prepare(model, rank=None, weights="int8")
        optimizer = APOLLOFusedAdam8bit(galore_param_groups(model, **options), lr=1e-2)
        losses = train_llama(model, optimizer, range(120))
        last.append(mean_of_last(losses))
    assert last[0] < losses[0] - 1
    assert abs(last[1] - last[0]) < 0.05 * (losses[0] - last[0])


@pytest.mark.parametrize("layerwise", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_resuming_gives_the_run_that_was_not_interrupted(kind: str, layerwise: bool) -> None:
    def made() -> tuple[Model, torch.optim.Optimizer]:
        model = prepared(torch.bfloat16)
        optimizer = optimizer_of(model, refresh_schedule="staggered", **KINDS[kind])
        return model, LayerwiseOptimizer(optimizer) if layerwise else optimizer

    model, whole = made()
    run(model, whole, range(5))
    file = io.BytesIO()
    torch.save((model.state_dict(), whole.state_dict()), file)
    file.seek(0)
    run(model, whole, range(5, 10))
    other, resumed = made()
    saved = torch.load(file, weights_only=True)
    other.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    run(other, resumed, range(5, 10))
    assert_same_snapshot(state_of(other, resumed), state_of(model, whole))


def test_copies_train_apart() -> None:
    model = prepared()
    optimizer = optimizer_of(model)
    run(model, optimizer, range(2))
    other, copied = copy.deepcopy((model, optimizer))
    before = copy.deepcopy(model.state_dict())
    run(other, copied, range(2, 4))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    run(model, optimizer, range(2, 4))
    assert_same_snapshot(state_of(other, copied), state_of(model, optimizer))
