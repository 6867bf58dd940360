"""Prepared layers with int8 weights: what they compute, how they train, and the plain model that they stand for."""

from __future__ import annotations

import copy
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from lowrank_models import RANK, Model, backward_passes, batch, run
from optimizer_cases import OF_PROJECTIONS, OptimizerClass, assert_same_snapshot, snapshot
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from galore_kernels import (
    GaLoreFusedAdam8bit,
    LayerwiseOptimizer,
    galore_param_groups,
    plain_state_dict,
    prepare,
    save_safetensors,
    unprepare,
)
from galore_kernels.nn import Int8Linear, LowRankGradient
from galore_kernels.optim.base import LowRankOptimizer
from galore_kernels.quantizers import GROUP_SIZE, dequantize_weight, quantize_weight


def prepared(dtype: torch.dtype = torch.float32) -> Model:
    return prepare(Model(dtype=dtype), rank=RANK, weights="int8")


def optimizer_of(model: nn.Module, kind: OptimizerClass = GaLoreFusedAdam8bit, **options: Any) -> LowRankOptimizer:
    return kind(galore_param_groups(model, update_proj_gap=4, **options), lr=1e-2)


def layers_of(model: nn.Module) -> dict[str, Int8Linear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, Int8Linear)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_computes_with_the_weight_that_its_codes_stand_for(dtype: torch.dtype) -> None:
    # Beyond one group, and none whole.
    for width in (GROUP_SIZE + 44, 40):
        plain = nn.Linear(width, 33).to(dtype)
        codes, scale = quantize_weight(plain.weight)
        layer = prepare(nn.ModuleDict({"mlp": copy.deepcopy(plain)}), rank=8, weights="int8")["mlp"]
        assert isinstance(layer, Int8Linear)
        with torch.no_grad():
            plain.weight.copy_(dequantize_weight(codes, scale, dtype))
        x = torch.randn(5, width, dtype=dtype, requires_grad=True)
        y = torch.randn(5, width, dtype=dtype).copy_(x.detach()).requires_grad_()
        optimizer = GaLoreFusedAdam8bit(layer.parameters())
        layer(x).square().sum().backward()
        plain(y).square().sum().backward()
        assert torch.equal(layer(x), plain(y))
        assert x.grad is not None
        assert y.grad is not None
        assert torch.equal(x.grad, y.grad)
        assert plain.weight.grad is not None
        # R is the dense gradient, projected.
        assert isinstance(layer.gradient, LowRankGradient)
        basis = optimizer.state[layer.lowrank]["basis"]
        oriented = plain.weight.grad if layer.gradient.side == "right" else plain.weight.grad.T
        rounding = 1e-5 if dtype == torch.float32 else 3e-2
        torch.testing.assert_close(layer.lowrank.grad, oriented @ basis, rtol=rounding, atol=rounding)


class Large(TorchDispatchMode):
    """Counts the pieces of memory of some size that are taken and live."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.alive_at_most = size, 0
        self._seen: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.untyped_storage().nbytes() >= self.size:
            self._seen.append(weakref.ref(result.untyped_storage()))
        alive = {id(storage) for ref in self._seen if (storage := ref()) is not None}
        self.alive_at_most = max(self.alive_at_most, len(alive))
        return result


def test_one_layers_weight_is_dequantized_at_a_time_and_not_kept() -> None:
    torch.manual_seed(0)
    width = 512
    stack = nn.Sequential()
    for index in range(4):
        stack.add_module(f"mlp{index}", nn.Linear(width, width, bias=False))
    prepare(stack, rank=8, weights="int8")
    optimizer = GaLoreFusedAdam8bit(stack.parameters())
    x = torch.randn(4, width)
    with Large(width * width * torch.float32.itemsize) as counted:
        stack(x).square().sum().backward()
        optimizer.step()
    assert counted.alive_at_most == 1


def test_a_frozen_layer_keeps_no_copy_either() -> None:
    layer = prepare(nn.Sequential(nn.Linear(300, 300)), "all-linear", rank=8, weights="int8")[0]
    assert isinstance(layer, Int8Linear)
    layer.lowrank.requires_grad_(False)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    x = torch.randn(4, 300, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(x).sum().backward()
    assert max(tensor.nbytes for tensor in kept) == layer.weight_codes.nbytes  # the codes themselves
    assert x.grad is not None
    torch.testing.assert_close(x.grad, layer.weight.sum(dim=0).expand_as(x))


def test_unmoved_weights_keep_their_codes() -> None:
    model = prepared()
    optimizer = optimizer_of(model)
    run(model, optimizer, range(2))
    before = {name: layer.weight_codes.clone() for name, layer in layers_of(model).items()}
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    run(model, optimizer, range(2, 12))
    for name, layer in layers_of(model).items():
        assert torch.equal(layer.weight_codes, before[name]), name


@pytest.mark.parametrize("options", [{}, {"basis_format": "int4", "refresh_schedule": "staggered"}], ids=str)
@pytest.mark.parametrize("kind", OF_PROJECTIONS)
def test_training_follows_that_of_plain_weights(kind: OptimizerClass, options: dict[str, Any]) -> None:
    plain = prepare(Model(), rank=RANK)
    expected = run(plain, optimizer_of(plain, kind, **options), range(150))
    model = prepared()
    losses = run(model, optimizer_of(model, kind, **options), range(150))
    assert expected[-1] < 0.2 * expected[0]
    # Of the way that the loss goes, averaged over the last tenth, less than a hundredth.
    difference = sum(losses[-15:]) / 15 - sum(expected[-15:]) / 15
    assert abs(difference) < 0.01 * expected[0]


@pytest.mark.parametrize("layerwise", [False, True])
def test_resuming_gives_the_run_that_was_not_interrupted(layerwise: bool) -> None:
    def made() -> tuple[Model, torch.optim.Optimizer]:
        model = prepared(torch.bfloat16)
        optimizer = optimizer_of(model, refresh_schedule="staggered")
        return model, LayerwiseOptimizer(optimizer) if layerwise else optimizer

    model, whole = made()
    run(model, whole, range(5))
    saved = copy.deepcopy((model.state_dict(), whole.state_dict()))
    run(model, whole, range(5, 10))
    other, resumed = made()
    other.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    run(other, resumed, range(5, 10))
    inner = [o.optimizer if isinstance(o, LayerwiseOptimizer) else o for o in (whole, resumed)]
    assert_same_snapshot(snapshot(inner[1], dict(other.state_dict())), snapshot(inner[0], dict(model.state_dict())))


def test_the_seed_decides_the_rounding() -> None:
    codes = []
    for seed in (0, 0, 1):
        model = prepared()
        run(model, optimizer_of(model, seed=seed, refresh_method="svd"), range(3))
        codes.append(torch.cat([layer.weight_codes.flatten() for layer in layers_of(model).values()]))
    assert torch.equal(codes[0], codes[1])
    assert not torch.equal(codes[0], codes[2])


# ---------------------------------------------------------------------- the plain model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_plain_state_dict_is_that_of_a_plain_model(dtype: torch.dtype) -> None:
    model = prepared(dtype)
    run(model, optimizer_of(model), range(3))
    plain = Model(dtype=dtype)
    assert [(key, value.shape, value.dtype) for key, value in plain_state_dict(model).items()].sort() == [
        (key, value.shape, value.dtype) for key, value in plain.state_dict().items()
    ].sort()
    plain.load_state_dict(plain_state_dict(model))
    tokens = batch(0)
    with torch.no_grad():
        assert torch.equal(plain(tokens), model(tokens))
    unprepare(model)
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert all(type(module) is nn.Linear for module in model.modules() if isinstance(module, nn.Linear))
    assert all(param.requires_grad for param in model.parameters())
    with torch.no_grad():
        assert torch.equal(model(tokens), plain(tokens))


def test_a_plain_state_dict_is_quantized_when_it_is_loaded() -> None:
    plain, model = Model(), prepared()
    nn.init.normal_(plain.get_submodule("blocks.0.mlp_up").weight)  # type: ignore[arg-type]
    model.load_state_dict(plain.state_dict())
    for name, layer in layers_of(model).items():
        codes, scale = quantize_weight(plain.get_submodule(name).weight)  # type: ignore[arg-type]
        assert torch.equal(layer.weight_codes, codes), name
        assert torch.equal(layer.weight_scale, scale), name


def test_codes_are_not_taken_for_a_plain_models_weights() -> None:
    with pytest.raises(RuntimeError, match="weight_codes"):
        Model().load_state_dict(prepared().state_dict())


@pytest.mark.parametrize("tied", [False, True])
def test_safetensors_hold_the_plain_model(tmp_path: Path, tied: bool) -> None:
    load_file = pytest.importorskip("safetensors.torch").load_file
    model = Model(dtype=torch.bfloat16)
    if tied:
        model.head.weight = model.embedding.weight
    prepare(model, rank=RANK, weights="int8")
    save_safetensors(model, tmp_path / "model.safetensors")
    loaded = load_file(tmp_path / "model.safetensors")
    expected = plain_state_dict(model)
    assert expected.keys() - loaded.keys() == ({"head.weight"} if tied else set())
    assert all(torch.equal(value, expected[key]) for key, value in loaded.items())
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_codes_that_are_assigned_are_codes_still() -> None:
    model, other = prepared(), prepared()
    run(model, optimizer_of(model), range(2))
    other.load_state_dict(model.state_dict(), assign=True)
    GaLoreFusedAdam8bit(other.parameters(), rank=RANK)
    with torch.no_grad():
        assert torch.equal(other(batch(0)), model(batch(0)))


def test_layers_that_share_a_weight_share_its_codes() -> None:
    model = Model()
    model.blocks[1].attn_mix.weight = model.blocks[0].attn_mix.weight  # type: ignore[union-attr]
    prepare(model, rank=RANK, weights="int8")
    first, second = (block.attn_mix for block in model.blocks)
    optimizer = optimizer_of(model)
    run(model, optimizer, range(3))
    assert first.weight_codes is second.weight_codes  # type: ignore[union-attr]
    plain = plain_state_dict(model)
    assert plain["blocks.0.attn_mix.weight"].data_ptr() == plain["blocks.1.attn_mix.weight"].data_ptr()
    unprepare(model)
    assert first.weight is second.weight  # type: ignore[union-attr]


# ---------------------------------------------------------------------- what models go through


def test_a_cast_leaves_codes_and_scales() -> None:
    model = prepared()
    scales = {name: layer.weight_scale.clone() for name, layer in layers_of(model).items()}
    model.to(torch.bfloat16)
    for name, layer in layers_of(model).items():
        assert layer.weight_codes.dtype == torch.int8
        assert torch.equal(layer.weight_scale, scales[name])
        assert layer.weight.dtype == torch.bfloat16
    run(model, optimizer_of(model), range(2))


def test_all_parameters_may_be_given_to_the_optimizer() -> None:
    model = prepared()
    optimizer = GaLoreFusedAdam8bit(model.parameters(), rank=RANK, lr=1e-2)
    codes = {name: layer.weight_codes.clone() for name, layer in layers_of(model).items()}
    run(model, optimizer, range(3))
    assert all(not torch.equal(layer.weight_codes, codes[name]) for name, layer in layers_of(model).items())
    assert optimizer.state_bytes() == sum(
        value.nbytes for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)
    )


def test_copies_train_apart() -> None:
    model = prepared()
    optimizer = optimizer_of(model)
    run(model, optimizer, range(2))
    other, copied = copy.deepcopy((model, optimizer))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    run(other, copied, range(2, 4))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    run(model, optimizer, range(2, 4))
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in model.state_dict().items())


def test_evaluation_needs_no_optimizer() -> None:
    model = prepared().eval()
    with torch.inference_mode():
        assert bool(model(batch(0)).isfinite().all())
    with pytest.raises(RuntimeError, match="no optimizer has"):
        backward_passes(model, 0)


def test_unknown_weights_are_refused() -> None:
    with pytest.raises(ValueError, match="weights='int4': expected None or \"int8\""):
        prepare(Model(), rank=RANK, weights="int4")
