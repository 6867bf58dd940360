"""The CPU backend's groups: many tensors in one native call, as if each were updated by itself."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from grouping import KINDS, Make, adafactor, apollo, compare, mixed, plain, steps
from optimizer_cases import clone_params, make_params, set_grads, train
from torch import nn

from galore_kernels import (
    GaLoreFusedAdafactor,
    GaLoreFusedAdam8bit,
    GaLoreFusedAdamW,
    NonFiniteGradientWarning,
    _native,
    prepare,
)
from galore_kernels.optim.multi_tensor import Plan


def adamw(params: dict[str, nn.Parameter], backend: str) -> Any:
    return plain(params, backend, GaLoreFusedAdamW)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [plain, adamw, mixed, apollo, adafactor])
def test_groups_are_bitwise_one_tensor_at_a_time(
    make: Make, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds = {**KINDS, "conv": (20, 3, 3, 3)}
    params = make_params({f"{kind}{i}": shape for i in range(4) for kind, shape in kinds.items()}, dtype)
    alone = clone_params(params)
    together, one_by_one = (make(params, "cpu"), params), (make(alone, "cpu"), alone)
    steps([together], range(7))
    assert together[0]._plan is not None
    assert max(len(group.members) for group in together[0]._plan.groups) >= 2
    with monkeypatch.context() as patch:
        patch.setattr(Plan, "reason_to_be_alone", lambda self, update, states: "the test says so")
        steps([one_by_one], range(7))
    compare((together, one_by_one))


@pytest.mark.parametrize(
    ("optimizer_class", "calls"),
    [
        (GaLoreFusedAdam8bit, ("cpu_adam_update", "cpu_galore_update")),
        (GaLoreFusedAdafactor, ("cpu_adafactor_update",)),
    ],
)
def test_a_step_is_one_call_for_each_kind(
    optimizer_class: Any, calls: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes: dict[str, tuple[int, ...]] = {f"{kind}{i}": shape for i in range(3) for kind, shape in KINDS.items()}
    params = make_params(shapes)
    optimizer = optimizer_class(params.values(), rank=8, backend="cpu")
    train(optimizer, params, range(2))
    counts: list[int] = []
    for name in calls:
        original = getattr(_native, name)

        def counted(batch: Any, gradients: list[int], *args: Any, original: Any = original) -> None:
            counts.append(len(gradients))
            original(batch, gradients, *args)

        monkeypatch.setattr(_native, name, counted)
    set_grads(params, 2)
    optimizer.step()
    assert counts == [3] * len(KINDS)


@pytest.mark.parametrize("optimizer_class", [GaLoreFusedAdam8bit, GaLoreFusedAdafactor])
def test_one_of_a_group_is_skipped_and_the_others_are_not(optimizer_class: Any) -> None:
    params = make_params({f"tall{i}": (300, 20) for i in range(3)})
    optimizer = optimizer_class(list(params.items()), rank=8, backend="cpu")
    train(optimizer, params, range(3))
    before = {name: param.detach().clone() for name, param in params.items()}
    set_grads(params, 3)
    params["tall1"].grad = torch.full((300, 20), math.inf)
    with pytest.warns(NonFiniteGradientWarning, match="tall1"):
        optimizer.step()
    assert optimizer.skipped_steps() == {'param group 0, parameter 1 ("tall1")': 1}
    assert [torch.equal(param, before[name]) for name, param in params.items()] == [False, True, False]
    assert [int(optimizer.state[param]["step"]) for param in params.values()] == [4, 3, 4]


def test_prepared_layers_of_int8_weights_are_one_group(monkeypatch: pytest.MonkeyPatch) -> None:
    def trained(*, alone: bool) -> tuple[list[torch.Tensor], int]:
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(3)))
        prepare(model, [".*"], rank=8, weights="int8")
        optimizer = GaLoreFusedAdamW(model.parameters(), lr=0.01, rank=8, update_proj_gap=100, backend="cpu")
        with monkeypatch.context() as patch:
            if alone:
                patch.setattr(Plan, "reason_to_be_alone", lambda self, update, states: "the test says so")
            for _ in range(4):
                model(torch.randn(16, 64)).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
        sizes = [len(group.members) for group in optimizer._plan.groups] if optimizer._plan is not None else []
        return [tensor.clone() for tensor in model.state_dict().values()], sum(sizes)

    together, members = trained(alone=False)
    by_themselves, none = trained(alone=True)
    assert (members, none) == (3, 0)
    assert all(torch.equal(a, b) for a, b in zip(together, by_themselves, strict=True))
