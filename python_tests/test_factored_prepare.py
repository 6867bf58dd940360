"""What prepare refuses, that prepared models are plain ones to others, and optimizers that aren't theirs."""

from __future__ import annotations

import copy
import gc
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from factored_cases import RANK, TARGETS, Model, batch, carriers, loss_of
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import weight_norm
from update_cases import assert_same_bits

from galore_kernels import GaLoreFusedAdamW, galore_param_groups, prepare, unprepare
from galore_kernels.nn import lowrank_gradient, lowrank_gradient_of


class Sub(nn.Linear):
    pass


class Wrapper(nn.Module):
    """As PEFT's adapters are built."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = layer
        self.lora = nn.Linear(layer.in_features, 2)


def modified(change: Callable[[Model], Any]) -> Model:
    model = Model()
    change(model)
    return model


def share_with_embedding(model: Model) -> None:
    model.mlp_square = nn.Linear(40, 32)
    model.mlp_square.weight = model.embedding.weight


def share_with_head(model: Model) -> None:
    model.mlp_square = nn.Linear(40, 32)
    model.mlp_square.weight = model.head.weight


REFUSED: dict[str, tuple[Callable[[Model], Any], dict[str, Any], str]] = {
    "wrapper": (lambda m: setattr(m, "mlp_up", Wrapper(m.mlp_up)), {}, r"mlp_up: Wrapper wraps a layer \(base_layer\)"),
    "subclass": (lambda m: setattr(m, "mlp_up", Sub(40, 260)), {}, "mlp_up: expected a torch.nn.Linear, got Sub"),
    "twice": (lambda m: prepare(m, ["mlp_up"], 4), {}, "mlp_up: it is prepared already; unprepare"),
    "embedding": (share_with_embedding, {}, r"mlp_square: its weight is also embedding's \(Embedding\)"),
    "head": (share_with_head, {}, r"mlp_square: its weight is also head's \(Linear\)"),
    "double": (lambda m: m.double(), {}, "mlp_up: expected a float32, bfloat16 or float16 weight, got torch.float64"),
    "empty": (lambda m: setattr(m, "mlp_up", nn.Linear(40, 0)), {}, "mlp_up: its weight is empty"),
    "pruned": (
        lambda m: prune.l1_unstructured(m.mlp_square, "weight", 3),
        {},
        "mlp_square: expected its weight to be a plain torch.nn.Parameter, got Tensor",
    ),
    "parametrized": (
        lambda m: weight_norm(m.mlp_square),
        {},
        "mlp_square: expected a torch.nn.Linear, got ParametrizedLinear",
    ),
    "nothing": (lambda m: None, {"target_modules": ["attn"]}, r"target_modules=\['attn'\] matches no trainable"),
    "all frozen": (lambda m: m.requires_grad_(False), {}, "matches no trainable linear layer"),
    "no rank": (lambda m: None, {"rank": 0}, "rank=0: expected an integer >= 1"),
    "auto rank": (lambda m: None, {"rank": "auto"}, "rank='auto': expected an integer >= 1"),
    "bool rank": (lambda m: None, {"rank": True}, "rank=True: expected an integer >= 1"),
    "full": (lambda m: None, {"proj_type": "full"}, 'proj_type="full": expected one side'),
    "misspelt": (lambda m: None, {"proj_type": "rigth"}, 'did you mean "right"'),
    "regex": (lambda m: None, {"target_modules": "mlp("}, "no regular expression"),
}


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_prepared_is_refused_and_left_as_it_was(case: str) -> None:
    change, options, message = REFUSED[case]
    model = modified(change)
    kinds = {name: type(module) for name, module in model.named_modules()}
    before = {name: (param.requires_grad, param.shape) for name, param in model.named_parameters()}
    with pytest.raises(ValueError, match=message):
        prepare(model, **{"target_modules": TARGETS, "rank": RANK, **options})
    assert kinds == {name: type(module) for name, module in model.named_modules()}
    assert before == {name: (param.requires_grad, param.shape) for name, param in model.named_parameters()}


def test_prepared_layers_keep_names_hooks_and_shapes() -> None:
    model = Model()
    called = []
    model.mlp_up.register_forward_hook(lambda *_: called.append("hook"))
    plain = copy.deepcopy(model.state_dict())
    weight = model.mlp_up.weight
    assert prepare(model, TARGETS, RANK) is model
    assert model.mlp_up.weight is weight
    assert list(model.state_dict()) == list(plain)
    assert {name: param.shape for name, param in carriers(model).items()} == {
        "mlp_up.lowrank": (260, RANK),  # (L, r) of (260, 40), right
        "mlp_down.lowrank": (260, RANK),  # of (40, 260), left
        "mlp_square.lowrank": (40, RANK),
    }
    assert "side=right, rank=16" in repr(model.mlp_up)
    assert "side=left, rank=16" in repr(model.mlp_down)
    model(batch(0)[0])
    assert called
    unprepare(model)
    assert type(model.mlp_up) is nn.Linear
    assert model.mlp_up.weight is weight
    assert all(param.requires_grad for param in model.parameters())
    assert not carriers(model)
    assert "lowrank" not in repr(model)


def test_ranks_are_clamped_and_sides_chosen() -> None:
    model = prepare(Model(), TARGETS, 100, proj_type="reverse_std")
    assert {name: tuple(param.shape) for name, param in carriers(model).items()} == {
        "mlp_up.lowrank": (40, 40),
        "mlp_down.lowrank": (40, 40),
        "mlp_square.lowrank": (40, 40),
    }
    assert model.mlp_up.gradient.side == "left"  # type: ignore[union-attr]


def test_frozen_layers_are_left_alone() -> None:
    model = Model()
    model.mlp_up.weight.requires_grad_(False)
    model.mlp_extra = Sub(4, 4).requires_grad_(False)
    prepare(model, TARGETS, RANK)
    assert set(carriers(model)) == {"mlp_down.lowrank", "mlp_square.lowrank"}
    assert type(model.mlp_up) is nn.Linear


def test_state_dicts_are_plain_ones() -> None:
    plain, prepared = Model(), prepare(Model(), TARGETS, RANK)
    weight = prepared.mlp_up.weight
    for assign in (False, True):
        torch.manual_seed(assign)
        nn.init.normal_(plain.mlp_up.weight)
        prepared.load_state_dict(copy.deepcopy(plain.state_dict()), strict=True, assign=assign)
        assert not prepared.mlp_up.weight.requires_grad
        assert lowrank_gradient_of(prepared.mlp_up.lowrank).weight is prepared.mlp_up.weight  # type: ignore[union-attr, arg-type]
        assert (prepared.mlp_up.weight is weight) != assign
        for name, value in plain.state_dict().items():
            assert_same_bits(prepared.state_dict()[name], value, name)
    file = io.BytesIO()
    torch.save(prepared.state_dict(), file)
    file.seek(0)
    Model().load_state_dict(torch.load(file, weights_only=True), strict=True)
    with pytest.raises(RuntimeError, match=r"mlp_up\.weight"):
        prepared.load_state_dict({k: v for k, v in plain.state_dict().items() if k != "mlp_up.weight"})


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_are_prepared_and_apart(how: str) -> None:
    model = prepare(Model(), TARGETS, RANK)
    optimizer = GaLoreFusedAdamW(galore_param_groups(model, TARGETS), lr=1e-2)
    loss_of(model, batch(0)).backward()
    optimizer.step()
    if how == "deepcopy":
        other = copy.deepcopy(model)
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    for name, param in carriers(other).items():
        gradient = lowrank_gradient_of(param)
        assert gradient is not None
        assert gradient.weight is other.get_submodule(name.rpartition(".")[0]).weight
    other.zero_grad()
    with pytest.raises(RuntimeError, match="no optimizer has"):
        loss_of(other, batch(0)).backward()
    again = GaLoreFusedAdamW(galore_param_groups(other, TARGETS), lr=1e-2)
    before = model.mlp_up.weight.clone()
    loss_of(other, batch(1)).backward()
    again.step()
    assert torch.equal(model.mlp_up.weight, before)
    optimizer.zero_grad()
    loss_of(model, batch(1)).backward()
    optimizer.step()


def test_nothing_keeps_a_model_that_is_gone() -> None:
    model = prepare(Model(), TARGETS, RANK)
    key = int(model.mlp_up.gradient.key)  # type: ignore[union-attr, arg-type]
    assert key in lowrank_gradient._by_key
    del model
    gc.collect()
    assert key not in lowrank_gradient._by_key


@pytest.mark.parametrize("how", ["to_empty", "assign"])
def test_a_model_prepared_on_the_meta_device_can_be_made_real(how: str) -> None:
    with torch.device("meta"):
        model = prepare(Model(), TARGETS, RANK)
    weights = Model().state_dict()
    if how == "to_empty":
        model.to_empty(device="cpu").load_state_dict(weights)
    else:
        model.load_state_dict(weights, assign=True)
    straight = Model()
    straight.load_state_dict(weights)
    prepare(straight, TARGETS, RANK)
    for either in (model, straight):
        optimizer = GaLoreFusedAdamW(galore_param_groups(either, TARGETS), lr=1e-2)
        loss_of(either, batch(0)).backward()
        optimizer.step()
    for name, value in straight.state_dict().items():
        assert_same_bits(model.state_dict()[name], value, name)


def test_a_model_cast_after_prepare() -> None:
    model = prepare(Model(), TARGETS, RANK).bfloat16()
    optimizer = GaLoreFusedAdamW(galore_param_groups(model, TARGETS), lr=1e-2)
    loss_of(model, batch(0)).backward()
    optimizer.step()
    assert optimizer.state[model.mlp_up.lowrank]["basis"].dtype == torch.bfloat16  # type: ignore[index]


# ---------------------------------------------------------------------- optimizers that aren't its own


def test_a_backward_pass_without_an_optimizer_is_refused() -> None:
    model = prepare(Model(), TARGETS, RANK)
    with pytest.raises(RuntimeError, match="no optimizer has: make the optimizer from the prepared model"):
        loss_of(model, batch(0)).backward()
    # AdamW would move what carries gradients, and no weight.
    torch.optim.AdamW(model.parameters())
    with pytest.raises(RuntimeError, match="no optimizer has"):
        loss_of(model, batch(0)).backward()


@pytest.mark.parametrize("options", [{}, {"foreach": True}], ids=str)
def test_another_optimizer_beside_ours_is_noticed(options: dict[str, Any]) -> None:
    model = prepare(Model(), TARGETS, RANK)
    optimizer = GaLoreFusedAdamW(galore_param_groups(model, TARGETS), lr=1e-2)
    other = torch.optim.AdamW(model.parameters(), **options)
    loss_of(model, batch(0)).backward()
    other.step()
    optimizer.zero_grad()
    with pytest.raises(RuntimeError, match="give the prepared model to a galore_kernels optimizer and to no other"):
        loss_of(model, batch(0)).backward()


CONFLICTS: dict[str, tuple[dict[str, Any], str]] = {
    "rank": ({"rank": 8}, "rank=8 in param group 0: a layer of shape .* was prepared with rank 16"),
    "auto": ({"rank": "auto", "rank_budget": 10**6}, 'rank="auto" in param group 0: a prepared layer has the rank 16'),
    "side": ({"proj_type": "left"}, "proj_type='left' in param group 0: .* was prepared for side right"),
    "full": ({"proj_type": "full"}, "proj_type='full' in param group 0: .* was prepared for side right"),
}


@pytest.mark.parametrize("case", CONFLICTS)
def test_options_that_contradict_the_layers_are_refused(case: str) -> None:
    options, message = CONFLICTS[case]
    model = prepare(Model(), TARGETS, RANK)
    with pytest.raises(ValueError, match=message):
        GaLoreFusedAdamW(galore_param_groups(model, TARGETS, **options))


def test_a_construction_that_fails_leaves_layers_to_their_optimizer() -> None:
    model = prepare(Model(), TARGETS, RANK)
    optimizer = GaLoreFusedAdamW(galore_param_groups(model, TARGETS), lr=1e-2)
    loss_of(model, batch(0)).backward()
    basis = model.mlp_up.gradient.basis  # type: ignore[union-attr]
    assert isinstance(basis, Tensor)
    up, down = model.mlp_up.lowrank, model.mlp_down.lowrank
    with pytest.raises(ValueError, match="param group 1"):
        GaLoreFusedAdamW([{"params": [up], "rank": RANK}, {"params": [down], "rank": 3}])
    gc.collect()
    assert model.mlp_up.gradient.basis is basis  # type: ignore[union-attr]
    optimizer.step()
    loss_of(model, batch(1)).backward()


def test_an_optimizer_whose_layers_have_another_since_may_not_step() -> None:
    model = prepare(Model(), TARGETS, RANK)
    groups = galore_param_groups(model, TARGETS)
    first = GaLoreFusedAdamW(groups, lr=1e-2)
    loss_of(model, batch(0)).backward()
    first.step()
    first.zero_grad()
    second = GaLoreFusedAdamW(galore_param_groups(model, TARGETS), lr=1e-2)
    loss_of(model, batch(1)).backward()
    weight = model.mlp_up.weight.clone()
    with pytest.raises(RuntimeError, match="has another optimizer now"):
        first.step()
    assert torch.equal(model.mlp_up.weight, weight)
    second.step()
    assert not torch.equal(model.mlp_up.weight, weight)
    first.load_state_dict(first.state_dict())
    first.zero_grad()
    loss_of(model, batch(2)).backward()
    first.step()
    unprepare(model)
    with pytest.raises(RuntimeError, match="unprepared"):
        first.step()
