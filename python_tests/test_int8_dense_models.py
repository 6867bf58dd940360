"""Models of int8 weights with gradients of full size: memory, the plain models they stand for, what is refused."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lowrank_models import RANK, Model, backward_passes, batch, loss_of, run
from test_int8_dense import KINDS, dequantized, optimizer_of, prepared
from test_int8_linear import Large, layers_of
from torch import Tensor, nn

from galore_kernels import (
    APOLLOFusedAdam8bit,
    APOLLOFusedAdamW,
    GaLoreFusedAdam8bit,
    LayerwiseOptimizer,
    galore_param_groups,
    plain_state_dict,
    prepare,
    save_safetensors,
    unprepare,
)
from galore_kernels.nn import Int8Linear, carried_gradient_of
from galore_kernels.quantizers import GROUP_SIZE, dequantize_weight

# ---------------------------------------------------------------------- memory


def held(model: nn.Module) -> int:
    """Bytes of all memory that parameters lie in."""
    storages = {param.untyped_storage()._cdata: param.untyped_storage().nbytes() for param in model.parameters()}
    return sum(storages.values())


def expected(model: nn.Module, element: int) -> int:
    """A byte for each int8 weight and its scales; of a carrier, a row and a column."""
    layers = layers_of(model).values()
    groups = sum(layer.out_features * -(-layer.in_features // GROUP_SIZE) for layer in layers)
    sizes = sum(layer.in_features * layer.out_features for layer in layers)
    carriers = sum(layer.in_features + layer.out_features - 1 for layer in layers)
    carried = {id(layer.dense) for layer in layers} | {id(layer.weight_codes) for layer in layers}
    carried |= {id(layer.weight_scale) for layer in layers}
    rest = sum(param.numel() for param in model.parameters() if id(param) not in carried)
    return sizes + 4 * groups + element * (carriers + rest)


def test_carriers_hold_no_weights_whatever_is_done_to_a_model(tmp_path: Path) -> None:
    model = prepared()
    assert held(model) == expected(model, 4)
    optimizer = optimizer_of(model)
    run(model, optimizer, range(2))
    assert held(model) == expected(model, 4)
    for other in (copy.deepcopy(model), pickled(model)):
        assert held(other) == expected(model, 4)
        run(other, optimizer_of(other), range(2))
        assert held(other) == expected(model, 4)
    model.to(torch.bfloat16)
    assert held(model) == expected(model, 2)
    with torch.device("meta"):
        empty = prepared()
    empty.to_empty(device="cpu").load_state_dict(prepared().state_dict())
    assert held(empty) == expected(empty, 4)
    run(empty, optimizer_of(empty), range(2))
    with torch.device("meta"):
        assigned = prepared()
    assigned.load_state_dict(prepared().state_dict(), assign=True)
    assert held(assigned) == expected(assigned, 4)
    run(assigned, optimizer_of(assigned), range(2))


def pickled(model: Model) -> Model:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert isinstance(loaded, Model)
    return loaded


@pytest.mark.parametrize("layerwise", [False, True])
def test_layerwise_updates_hold_one_layers_gradient(layerwise: bool) -> None:
    torch.manual_seed(0)
    width, layers = 512, 4
    stack = nn.Sequential()
    for index in range(layers):
        stack.add_module(f"mlp{index}", nn.Linear(width, width, bias=False))
    prepare(stack, rank=None, weights="int8")
    optimizer: Any = APOLLOFusedAdam8bit(galore_param_groups(stack, rank=8), backend="cpu")
    if layerwise:
        optimizer = LayerwiseOptimizer(optimizer)
    x = torch.randn(4, width)
    for _ in range(3):
        with Large(width * width * torch.float32.itemsize) as counted:
            stack(x).square().sum().backward()
            optimizer.step()
        optimizer.zero_grad()
        # Or a weight that is dequantized, beside the gradients that are there.
        assert counted.alive_at_most == (1 if layerwise else layers)


@pytest.mark.parametrize("kind", KINDS)
def test_the_state_takes_the_bytes_that_are_foretold(kind: str) -> None:
    with torch.device("meta"):
        foretold = optimizer_of(prepared(), **KINDS[kind]).state_bytes()
    model = prepared()
    optimizer = optimizer_of(model, **KINDS[kind])
    run(model, optimizer, range(1))
    assert optimizer.state_bytes() == foretold
    assert foretold == sum(v.nbytes for s in optimizer.state.values() for v in s.values() if isinstance(v, Tensor))
    assert foretold == optimizer_of(Model(), **KINDS[kind]).state_bytes()  # that of a plain model


# ---------------------------------------------------------------------- the plain model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unprepared_it_is_the_plain_model(dtype: torch.dtype, tmp_path: Path) -> None:
    model = prepared(dtype)
    run(model, optimizer_of(model), range(3))
    plain, tokens = dequantized(model).to(dtype), batch(0)
    with torch.no_grad():
        assert torch.equal(plain(tokens), model(tokens))
    load_file = pytest.importorskip("safetensors.torch").load_file
    save_safetensors(model, tmp_path / "model.safetensors")
    assert load_file(tmp_path / "model.safetensors").keys() == plain.state_dict().keys()
    unprepare(model)
    assert {name for name, _ in model.named_parameters()} == {name for name, _ in plain.named_parameters()}
    assert all(param.requires_grad for param in model.parameters())
    assert all(type(module) is nn.Linear for module in model.modules() if isinstance(module, nn.Linear))
    with torch.no_grad():
        assert torch.equal(model(tokens), plain(tokens))


def test_layers_that_share_a_weight_share_its_gradient() -> None:
    def tied() -> Model:
        model = Model()
        model.blocks[1].attn_mix.weight = model.blocks[0].attn_mix.weight  # type: ignore[union-attr]
        return model

    model = prepare(tied(), rank=None, weights="int8")
    first, second = (block.attn_mix for block in model.blocks)
    assert isinstance(first, Int8Linear)
    assert isinstance(second, Int8Linear)
    assert first.dense is second.dense
    plain = tied()
    plain.load_state_dict(plain_state_dict(model))
    for own in (model, plain):
        backward_passes(own, 0)
    shared = plain.blocks[0].attn_mix.weight.grad  # type: ignore[union-attr]
    assert first.dense.grad is not None
    assert isinstance(shared, Tensor)
    assert torch.equal(first.dense.grad, shared)
    model.zero_grad()
    run(model, LayerwiseOptimizer(optimizer_of(model)), range(3))
    assert first.weight_codes is second.weight_codes
    unprepare(model)
    assert first.weight is second.weight


def test_a_factored_models_checkpoint_is_no_other_than_a_dense_ones() -> None:
    """Weights move between both; so do the optimizer's names."""
    factored = prepare(Model(), rank=RANK, weights="int8")
    trained = GaLoreFusedAdam8bit(galore_param_groups(factored, update_proj_gap=4), lr=1e-2)
    run(factored, trained, range(3))
    model = prepared()
    model.load_state_dict(factored.state_dict())
    optimizer = optimizer_of(model, GaLoreFusedAdam8bit, weight_decay=0.0)
    optimizer.load_state_dict(trained.state_dict())
    assert torch.equal(model(batch(0)), factored(batch(0)))
    assert run(model, optimizer, range(3, 9))[-1] < float(loss_of(prepared(), batch(0)).detach())


# ---------------------------------------------------------------------- what is refused


def test_all_parameters_may_be_given_to_the_optimizer() -> None:
    model = prepared()
    optimizer = APOLLOFusedAdamW(model.parameters(), rank=RANK, lr=1e-2)
    before = {name: layer.weight_codes.clone() for name, layer in layers_of(model).items()}
    run(model, optimizer, range(3))
    assert all(not torch.equal(layer.weight_codes, before[name]) for name, layer in layers_of(model).items())


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "plain weights": (
        lambda: prepare(Model(), rank=None),
        'rank=None with weights=None: expected weights="int8", for plain layers have full gradients as they are',
    ),
    "a side": (
        lambda: prepare(Model(), rank=None, weights="int8", proj_type="left"),
        "proj_type='left' with rank=None: nothing is projected here; give it to the optimizer's groups",
    ),
    "full rank": (
        lambda: APOLLOFusedAdam8bit(prepared().parameters(), rank=None),
        "rank=None in param group 0: a layer of shape .* has int8 weights, which no full-rank update takes; give it a "
        "group with a rank",
    ),
    "too large a rank": (lambda: GaLoreFusedAdam8bit(prepared().parameters(), rank=64), "rank=64 in param group 0"),
    "prepared with a rank": (
        lambda: optimizer_of(prepare(Model(), rank=RANK, weights="int8")),
        'prepared with rank 32, and its full gradient is never there.*prepare it with rank=None, weights="int8"',
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_can_not_be_is_refused(case: str) -> None:
    make, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        make()


def test_another_optimizer_beside_ours_is_noticed() -> None:
    model = prepared()
    optimizer = optimizer_of(model)
    other = torch.optim.AdamW([param for param in model.parameters() if param.requires_grad])
    backward_passes(model, 0)
    other.step()
    optimizer.zero_grad()
    with pytest.raises(RuntimeError, match="give the prepared model to a galore_kernels optimizer and to no other"):
        backward_passes(model, 1)


@pytest.mark.parametrize("layerwise", [False, True])
def test_the_optimizer_of_a_model_that_was_unprepared_is_told(layerwise: bool) -> None:
    model = prepared()
    optimizer: Any = optimizer_of(model)
    if layerwise:
        optimizer = LayerwiseOptimizer(optimizer)
    run(model, optimizer, range(2))
    unprepare(model)
    with pytest.raises(RuntimeError, match=r"is unprepared; .* make a new optimizer after unprepare"):
        run(model, optimizer, range(1))
    if layerwise:
        optimizer.detach()
    run(model, optimizer_of(model), range(2))


def test_a_gradient_needs_no_optimizer() -> None:
    model = prepared()
    backward_passes(model, 0)
    dense = [param for param in model.parameters() if carried_gradient_of(param) is not None]
    assert len(dense) == len(layers_of(model))
    assert all(param.grad is not None and bool(param.grad.any()) for param in dense)


def test_a_dequantized_weight_is_the_layers() -> None:
    layer = prepared().blocks[0].mlp_up
    assert isinstance(layer, Int8Linear)
    assert torch.equal(layer.weight, dequantize_weight(layer.weight_codes, layer.weight_scale, torch.float32))
    assert "dense gradient" in repr(layer)


@pytest.mark.parametrize("layerwise", [False, True])
@pytest.mark.parametrize("by", ["data", "assign"])
def test_scales_that_lie_elsewhere_are_found(by: str, layerwise: bool) -> None:
    def trained(*, moves: bool) -> dict[str, torch.Tensor]:
        model = prepared()
        optimizer = optimizer_of(model)
        stepped = LayerwiseOptimizer(optimizer) if layerwise else optimizer
        run(model, stepped, range(3))
        old = {name: p for name, p in model.named_parameters() if name.endswith("weight_scale")}
        before = {name: scale.detach().clone() for name, scale in old.items()}
        if moves and by == "data":
            kept = [scale.data for scale in old.values()]
            for scale in old.values():
                scale.data = scale.data.clone()
        elif moves:
            kept = list(old.values())
            model.load_state_dict({k: v.clone() for k, v in before.items()}, strict=False, assign=True)
        run(model, stepped, range(3, 6))
        if moves:
            assert all(torch.equal(a, b) for a, b in zip(kept, before.values(), strict=True)), "written where it was"
        return dict(model.state_dict())

    moved, stayed = trained(moves=True), trained(moves=False)
    assert all(torch.equal(moved[name], value) for name, value in stayed.items())
