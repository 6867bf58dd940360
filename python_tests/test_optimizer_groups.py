"""Which parameters are projected, and what the optimizer tells of it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from optimizer_cases import (
    OF_PROJECTIONS,
    SHAPES,
    OptimizerClass,
    clone_params,
    make_params,
    ranks,
    set_grads,
    snapshot,
    train,
)
from torch import Tensor, nn
from update_cases import assert_same_bits

from galore_kernels import GaLoreFusedAdam8bit, GaLoreFusedAdamW
from galore_kernels.subspace import PROJ_TYPES

MATRICES = {
    "large": (40, 30),
    "equal": (16, 40),  # min(m, n) equals the rank 16: nothing to gain
    "above": (17, 40),  # one more
    "narrow": (40, 1),  # rank 1 at most
    "vector": (40,),
    "conv": (20, 3, 2, 3),  # 20 x 18 as a matrix
}


def test_an_iterable_projects_matrices_above_the_rank(backend: str) -> None:
    params = make_params(MATRICES)
    optimizer = GaLoreFusedAdamW(params.values(), rank=16, backend=backend)
    expected = {"large": 16, "equal": None, "above": 16, "narrow": None, "vector": None, "conv": None}
    assert ranks(optimizer, params) == expected


def test_groups_with_a_rank_project_theirs_alone_and_clamp(backend: str) -> None:
    params = make_params(MATRICES)
    with_rank, without = ["equal", "narrow", "vector", "conv"], ["large", "above"]
    groups = [
        {"params": [params[name] for name in without]},
        {"params": [params[name] for name in with_rank], "rank": 32},
    ]
    optimizer = GaLoreFusedAdamW(groups, rank=4, backend=backend)
    expected = {"large": None, "above": None, "equal": 16, "narrow": 1, "vector": None, "conv": None}
    assert ranks(optimizer, params) == expected


def test_groups_without_any_rank_inherit_the_constructors(backend: str) -> None:
    params = make_params({"large": (40, 30), "other": (50, 20), "vector": (9,)})
    groups = [{"params": [params["large"], params["vector"]], "weight_decay": 0.1}, {"params": [params["other"]]}]
    optimizer = GaLoreFusedAdamW(groups, rank=16, backend=backend)
    assert ranks(optimizer, params) == {"large": 16, "other": 16, "vector": None}


def test_rank_none_means_full_rank(backend: str) -> None:
    params = make_params({"a": (40, 30), "b": (30, 40)})
    assert ranks(GaLoreFusedAdamW(params.values(), rank=None, backend=backend), params) == {"a": None, "b": None}
    groups = [{"params": [params["a"]], "rank": None}, {"params": [params["b"]], "rank": 8}]
    assert ranks(GaLoreFusedAdamW(groups, rank=16, backend=backend), params) == {"a": None, "b": 8}


@pytest.mark.parametrize("first_has_rank", [False, True])
def test_a_group_added_later_follows_the_same_rule(backend: str, first_has_rank: bool) -> None:
    params = make_params({"first": (40, 30), "inheriting": (40, 30), "naming": (40, 10)})
    first: dict[str, Any] = {"params": [params["first"]], **({"rank": 8} if first_has_rank else {})}
    optimizer = GaLoreFusedAdamW([first], rank=16, backend=backend)
    optimizer.add_param_group({"params": params["inheriting"]})  # a bare tensor, as torch.optim allows
    optimizer.add_param_group({"params": [params["naming"]], "rank": 12, "lr": 0.5})
    inherited = None if first_has_rank else 16
    assert ranks(optimizer, params) == {"first": 8 if first_has_rank else 16, "inheriting": inherited, "naming": 10}
    assert [group["lr"] for group in optimizer.param_groups] == [1e-3, 1e-3, 0.5]


def test_group_values_override_the_constructors(backend: str) -> None:
    own: dict[str, Any] = {"lr": 0.03, "betas": (0.7, 0.95), "eps": 1e-3, "weight_decay": 0.2, "rank": 5, "scale": 2.0}
    own |= {"update_proj_gap": 2, "proj_type": "left", "refresh_method": "svd", "maximize": True, "seed": 9}
    shape = {"w": (40, 30)}
    in_group, alone = make_params(shape), make_params(shape)
    by_group = GaLoreFusedAdamW([{"params": [in_group["w"]], **own}], lr=1.0, scale=9.0, backend=backend)
    by_constructor = GaLoreFusedAdamW([alone["w"]], **own, backend=backend)
    train(by_group, in_group, range(5))
    train(by_constructor, alone, range(5))
    assert_same_bits(in_group["w"], alone["w"], "w")
    assert not torch.equal(in_group["w"], make_params(shape)["w"])


@pytest.mark.parametrize("key", ["lr", "betas", "eps", "weight_decay", "rank", "scale", "proj_type", "maximize"])
def test_every_option_of_a_group_acts(backend: str, key: str) -> None:
    other = {"lr": 0.5, "betas": (0.5, 0.5), "eps": 1.0, "weight_decay": 0.5, "rank": 3, "scale": 2.0}
    other |= {"proj_type": "reverse_std", "maximize": True}
    params = make_params({"plain": (40, 30)})
    changed = clone_params(params)
    for current, options in ((params, {}), (changed, {key: other[key]})):
        group = {"params": [current["plain"]], "rank": 8, **options}
        train(GaLoreFusedAdamW([group], backend=backend), current, range(3))
    assert not torch.equal(params["plain"], changed["plain"])


def test_named_parameters_name_errors_and_survive_the_state_dict(backend: str) -> None:
    model = nn.Sequential(nn.Linear(30, 40), nn.Linear(40, 20))
    optimizer = GaLoreFusedAdamW(model.named_parameters(), rank=8, backend=backend)
    assert optimizer.param_groups[0]["param_names"] == ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == ["0.weight", "0.bias", "1.weight", "1.bias"]
    model[1].weight.grad = torch.zeros(20, 40).to_sparse()
    with pytest.raises(ValueError, match=r'param group 0, parameter 2 \("1.weight"\)'):
        optimizer.step()


def test_galore_torchs_group_keys_work_verbatim(backend: str) -> None:
    params = make_params({"w": (30, 40), "norm": (40,)})
    # The README of galore_torch passes these two groups.
    groups = [
        {"params": [params["norm"]]},
        {"params": [params["w"]], "rank": 128, "update_proj_gap": 200, "scale": 0.25, "proj_type": "std"},
    ]
    optimizer = GaLoreFusedAdam8bit(groups, lr=0.01, backend=backend)
    assert ranks(optimizer, params) == {"w": 30, "norm": None}


@pytest.mark.parametrize("proj_type", PROJ_TYPES)
@pytest.mark.parametrize("shape", [(30, 20), (20, 30), (20, 20)])  # tall, wide, square
def test_proj_types_keep_the_side_their_name_says(backend: str, proj_type: str, shape: tuple[int, int]) -> None:
    params = make_params({"w": shape})
    nn.init.zeros_(params["w"])  # so that the weight is the change, unrounded
    optimizer = GaLoreFusedAdamW(params.values(), rank=4, proj_type=proj_type, backend=backend)
    train(optimizer, params, [0])
    rows, cols = shape
    state = optimizer.state[params["w"]]
    tall = rows >= cols
    right = {"std": tall, "reverse_std": not tall, "right": True, "left": False, "full": True}[proj_type]
    assert state["basis"].shape == (cols if right else rows, 4)
    long = rows if right else cols
    assert state["exp_avg"].shape == ((4, 4) if proj_type == "full" else (long, 4))
    assert ("long_basis" in state) == (proj_type == "full")
    change = params["w"].detach()
    assert torch.linalg.matrix_rank(change, rtol=1e-4) == 4
    # The change lies in the basis' space: projecting it there changes nothing.
    along = change @ state["basis"] @ state["basis"].T if right else state["basis"] @ state["basis"].T @ change
    torch.testing.assert_close(along, change, rtol=0, atol=1e-5 * float(change.abs().max()))


def channels_last(module: nn.Module) -> nn.Module:
    for param in module.parameters():
        if param.dim() == 4:
            param.data = param.data.to(memory_format=torch.channels_last)
    return module


CONVOLUTIONS: dict[str, tuple[Callable[[], nn.Module], tuple[int, int]]] = {
    "3-D": (lambda: nn.Conv1d(6, 20, 5), (20, 30)),
    "4-D": (lambda: nn.Conv2d(4, 20, 3), (20, 36)),
    "channels_last": (lambda: channels_last(nn.Conv2d(4, 20, 3)), (20, 36)),
}


@pytest.mark.parametrize("kind", CONVOLUTIONS)
@pytest.mark.parametrize("optimizer_class", OF_PROJECTIONS)
def test_convolutions_are_projected_as_matrices(backend: str, kind: str, optimizer_class: OptimizerClass) -> None:
    build, shape = CONVOLUTIONS[kind]
    weight = build().weight
    assert isinstance(weight, nn.Parameter)
    strides, address = weight.stride(), weight.data_ptr()
    flat = nn.Parameter(weight.detach().reshape(shape).clone())
    nd = optimizer_class([weight], rank=6, project_nd=True, update_proj_gap=2, weight_decay=0.1, backend=backend)
    matrix = optimizer_class([flat], rank=6, update_proj_gap=2, weight_decay=0.1, backend=backend)
    for step in range(5):
        set_grads({"flat": flat}, step)
        assert flat.grad is not None
        weight.grad = flat.grad.reshape(weight.shape).clone(memory_format=torch.preserve_format)
        nd.step()
        matrix.step()
    assert nd.state[weight]["basis"].shape == (20, 6)
    assert_same_bits(weight.detach().reshape(shape), flat.detach(), kind)
    assert (weight.stride(), weight.data_ptr()) == (strides, address)


def test_convolutions_take_full_rank_unless_asked(backend: str) -> None:
    params = make_params({"conv": (20, 4, 3, 3)})
    groups = [{"params": [params["conv"]], "rank": 6}]
    assert ranks(GaLoreFusedAdamW(groups, backend=backend), params) == {"conv": None}
    assert ranks(GaLoreFusedAdamW([{**groups[0], "project_nd": True}], backend=backend), params) == {"conv": 6}


def test_repr_names_the_backend_and_what_each_group_does(backend: str) -> None:
    params = make_params()
    groups = [
        {"params": [params["tall"], params["small"]], "rank": 32, "lr": 0.01, "proj_type": "reverse_std", "scale": 2.0},
        {"params": [params["bias"]], "weight_decay": 0.5},
    ]
    text = repr(GaLoreFusedAdam8bit(groups, update_proj_gap=77, refresh_method="svd", backend=backend))
    head, first, second = text.splitlines()
    assert "GaLoreFusedAdam8bit" in head
    assert "8-bit" in head
    assert f"backend {backend}" in head
    for part in ("group 0", "2 projected to rank 20, 32", "reverse_std", "scale 2", "77", "svd", "lr 0.01"):
        assert part in first
    assert "full rank" not in first
    for part in ("group 1", "1 at full rank", "weight_decay 0.5"):
        assert part in second
    assert "projected" not in second


def test_repr_says_what_auto_chose() -> None:
    params = make_params({"w": (8, 8)})
    assert "backend auto -> cpu" in repr(GaLoreFusedAdamW(params.values(), rank=2))
    meta = [nn.Parameter(torch.empty(8, 8, device="meta"))]
    assert "auto" in repr(GaLoreFusedAdamW(meta, rank=2))


@pytest.mark.parametrize("optimizer_class", OF_PROJECTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("proj_type", ["std", "full"])
def test_state_bytes_are_counted_before_they_are_held(
    backend: str, optimizer_class: OptimizerClass, dtype: torch.dtype, proj_type: str
) -> None:
    shapes = {**SHAPES, "conv": (20, 4, 3, 3), "nothing": (0, 5), "large": (96, 90)}
    options: dict[str, Any] = {"rank": 70 if proj_type == "full" else 16, "proj_type": proj_type, "project_nd": True}
    params = make_params(shapes, dtype)
    meta = [nn.Parameter(torch.empty(shape, dtype=dtype, device="meta")) for shape in shapes.values()]
    promised = optimizer_class(meta, **options).state_bytes()
    optimizer = optimizer_class(params.values(), **options, backend=backend)
    assert optimizer.state_bytes() == promised
    train(optimizer, {name: param for name, param in params.items() if param.numel()}, range(2))
    held = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    assert optimizer.state_bytes() == promised == sum(value.numel() * value.element_size() for value in held)


def test_state_bytes_of_one_matrix_by_hand() -> None:
    weight = nn.Parameter(torch.empty(1000, 512, dtype=torch.bfloat16, device="meta"))
    moments, blocks, scalars = 1000 * 128, 500, 4 + 8  # step float32, skipped int64
    basis = 512 * 128 * 2
    assert GaLoreFusedAdam8bit([weight]).state_bytes() == basis + 2 * moments + 2 * 4 * blocks + scalars
    assert GaLoreFusedAdamW([weight]).state_bytes() == basis + 2 * 4 * moments + scalars


@pytest.mark.parametrize("optimizer_class", OF_PROJECTIONS)
def test_a_copied_optimizer_leads_its_own_life(backend: str, optimizer_class: OptimizerClass) -> None:
    params = make_params()
    optimizer = optimizer_class(params.values(), rank=16, backend=backend)
    train(optimizer, params, range(2))
    both = copy.deepcopy((optimizer, params))
    before = snapshot(*both)
    train(optimizer, params, range(2, 4))
    assert snapshot(*both).keys() == before.keys()
    assert all(torch.equal(v, before[k]) for k, v in snapshot(*both).items() if isinstance(v, Tensor))
    train(both[0], both[1], range(2, 4))
    for name, param in params.items():
        assert_same_bits(both[1][name], param, name)
