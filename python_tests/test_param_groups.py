"""``galore_param_groups``: choosing a model's matrices by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from galore_kernels import GaLoreFusedAdam8bit, galore_param_groups

transformers = pytest.importorskip("transformers")

LAYERS = 2
ATTENTION = [f"model.layers.{i}.self_attn.{p}_proj.weight" for i in range(LAYERS) for p in "qkvo"]
MLP = [f"model.layers.{i}.mlp.{p}_proj.weight" for i in range(LAYERS) for p in ("gate", "up", "down")]


def llama(*, tied: bool = False) -> nn.Module:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": LAYERS, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=64, **sizes, tie_word_embeddings=tied)
    model = transformers.LlamaForCausalLM(config)
    assert isinstance(model, nn.Module)
    return model


def names(group: dict[str, Any]) -> set[str]:
    return {name for name, _ in group["params"]}


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["attn", "mlp"], ATTENTION + MLP),  # parts of names, the papers' choice
        (("attn",), ATTENTION),
        ([r".*\.[01]\.mlp\.(up|down)_proj"], [n for n in MLP if "gate" not in n]),  # a regular expression in a list
        (r".*layers\.1\..*q_proj", [ATTENTION[4]]),  # one string: for the full name
        ("all-linear", ATTENTION + MLP),  # without lm_head
        (["lm_head"], ["lm_head.weight"]),  # unless it is asked for by name
    ],
)
def test_targets(targets: Any, expected: list[str]) -> None:
    model = llama()
    projected, rest = galore_param_groups(model, targets, rank=8, scale=0.5)
    assert names(projected) == set(expected)
    assert names(projected) | names(rest) == {name for name, _ in model.named_parameters()}
    assert not names(projected) & names(rest)
    assert (projected["rank"], projected["scale"]) == (8, 0.5)
    assert rest.keys() == {"params"}


def test_the_default_targets_are_attention_and_mlp_at_rank_128() -> None:
    projected, _ = galore_param_groups(llama())
    assert names(projected) == set(ATTENTION + MLP)
    assert projected["rank"] == 128


@pytest.mark.parametrize("tied", [False, True])
def test_all_linear_leaves_the_output_head_out_even_if_tied(tied: bool) -> None:
    model = llama(tied=tied)
    groups = galore_param_groups(model, "all-linear", rank=8)
    assert names(groups[0]) == set(ATTENTION + MLP)
    optimizer = GaLoreFusedAdam8bit(groups)  # a tied weight in both groups would be refused
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))


def test_all_linear_knows_the_heads_of_plain_modules() -> None:
    model = nn.ModuleDict({"body": nn.Linear(4, 4), "head": nn.Linear(4, 9)})
    projected, rest = galore_param_groups(model, "all-linear")
    assert names(projected) == {"body.weight"}
    assert names(rest) == {"body.bias", "head.weight", "head.bias"}


def test_a_target_without_a_match_lists_the_layers() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5))
    with pytest.raises(ValueError, match=r"target_modules=\['attention'\].*0, 1"):
        galore_param_groups(model, ["attention"])
    # One string is matched in full: "at" is no layer's whole name.
    with pytest.raises(ValueError, match="q_proj"):
        galore_param_groups(llama(), "attn")
    with pytest.raises(ValueError, match=r"target_modules: '\*\.attn' is no regular expression"):
        galore_param_groups(llama(), ["*.attn"])


def test_frozen_weights_are_left_out() -> None:
    model = llama()
    for name, param in model.named_parameters():
        param.requires_grad_("mlp" in name)
    (projected,) = galore_param_groups(model, ["attn", "mlp"])
    assert names(projected) == set(MLP)
    for param in model.parameters():
        param.requires_grad_(False)
    with pytest.raises(ValueError, match="trainable"):
        galore_param_groups(model, ["attn", "mlp"])


def test_only_the_targets_are_projected_in_training(backend: str) -> None:
    model = llama()
    optimizer = GaLoreFusedAdam8bit(galore_param_groups(model, "all-linear", rank=4), lr=1e-2, backend=backend)
    tokens = torch.randint(64, (2, 8))
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    projected = {name for name, param in model.named_parameters() if "basis" in optimizer.state[param]}
    assert projected == set(ATTENTION + MLP)
