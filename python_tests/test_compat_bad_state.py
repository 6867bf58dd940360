"""Others' optimizer state that doesn't fit ours: refused by name, and nothing has changed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from compat_cases import groups_of, ours, trained_theirs
from optimizer_cases import assert_same_snapshot, clone_params, make_params, snapshot, train

from galore_kernels import GaLoreFusedAdam8bit, GaLoreFusedAdamW, LayerwiseOptimizer
from galore_kernels.compat import import_state_dict

# Their indices: table 0, bias 1, tall 2, wide 3, small 4.

Damage = Callable[[dict[str, Any]], Any]


def of(index: int, **values: Any) -> Damage:
    return lambda state_dict: state_dict["state"][index].update(values)


def of_projector(index: int, **values: Any) -> Damage:
    return lambda state_dict: vars(state_dict["state"][index]["projector"]).update(values)


def of_group(index: int, **values: Any) -> Damage:
    return lambda state_dict: state_dict["param_groups"][index].update(values)


WIDE = "param group 1, parameter 1"

FLOAT: dict[str, tuple[Damage, str]] = {
    "no state": (lambda s: s.pop("state"), 'expected a dict with "state" and "param_groups"'),
    "groups no list": (lambda s: s.update(param_groups={}), 'expected a dict with "state" and "param_groups"'),
    "group without params": (lambda s: s["param_groups"][0].pop("params"), 'expected a dict with "state"'),
    "groups exchanged": (lambda s: s["param_groups"].reverse(), r"\[3, 2\] parameters, the optimizer has \[2, 3\]"),
    "state too many": (lambda s: s["state"].update({9: {}}), "does not belong to its param_groups"),
    "index twice": (lambda s: s["param_groups"][0]["params"].reverse() or s["param_groups"][0].update(params=[0, 0]),
                    "does not belong to its param_groups"),
    "other rank": (of_group(1, rank=8), "rank=8, the optimizer was built with rank=16"),
    "full rank": (lambda s: s["param_groups"][1].pop("rank"), "rank=None, the optimizer was built with rank=16"),
    "other proj_type": (of_group(1, proj_type="left"), "proj_type='left', the optimizer was built with proj_type"),
    "no bias correction": (of_group(0, correct_bias=False), "param group 0: correct_bias=False, expected True"),
    "amsgrad": (of_group(0, amsgrad=True), "param group 0: amsgrad=True, expected False"),
    "coupled decay": (of_group(0, decoupled_weight_decay=False), "param group 0: expected decoupled weight decay"),
    "bad lr": (of_group(0, lr=-1.0), "lr=-1.0 in state_dict, param group 0"),
    "state no dict": (lambda s: s["state"].update({3: 5}), f"{WIDE}: expected a state with a count of steps"),
    "no step": (lambda s: s["state"][3].pop("step"), f"{WIDE}: expected a state with a count of steps"),
    "half a step": (of(3, step=0.5), f"{WIDE}: expected a state with a count of steps, got step=0.5"),
    "no moment": (lambda s: s["state"][3].pop("exp_avg_sq"), f"{WIDE}: exp_avg_sq of the state: .*got NoneType"),
    "Adafactor's": (lambda s: s["state"][0].pop("exp_avg"), "parameter 0: state1 of the state: expected a tensor"),
    "other shape": (of(3, exp_avg=torch.zeros(300, 16)), rf"{WIDE}: exp_avg .*\(16, 300\), got shape \(300, 16\)"),
    "NaN": (lambda s: s["state"][3]["exp_avg"].fill_(torch.nan), f"{WIDE}: exp_avg of the state holds NaN"),
    "negative square": (lambda s: s["state"][3]["exp_avg_sq"].neg_(), f"{WIDE}: exp_avg_sq .* negative square"),
    "no projector": (lambda s: s["state"][3].pop("projector"), f"{WIDE}: the state holds no projector"),
    "projector too many": (of(1, projector={}), "parameter 1: the state is of a projected matrix"),
    "projector's rank": (of_projector(3, rank=8), f"{WIDE}: its projector has rank=8, its group 16"),
    "projector's gap": (of_projector(3, update_proj_gap=8), f"{WIDE}: its projector has update_proj_gap=8"),
    "projector's scale": (of_projector(3, scale=1.0), f"{WIDE}: its projector has scale=1.0, its group 0.25"),
    "projector's type": (of_projector(3, proj_type="left"), f"{WIDE}: its projector has proj_type='left'"),
    "no basis": (of_projector(3, ortho_matrix=None), f"{WIDE}: ortho_matrix of the state: .* got NoneType"),
    "basis' shape": (of_projector(3, ortho_matrix=torch.eye(64)), rf"{WIDE}: .*\(64, 16\), got shape \(64, 64\)"),
    "basis' length": (of_projector(3, ortho_matrix=torch.ones(64, 16)), f"{WIDE}: ortho_matrix .* got 8 to 8"),
    "basis is NaN": (of_projector(3, ortho_matrix=torch.full((64, 16), torch.nan)), f"{WIDE}: ortho_matrix"),
    "two bases": (of_projector(3, ortho_matrix=[torch.eye(64, 16)] * 2), f"{WIDE}: ortho_matrix .* got list"),
}  # fmt: skip


def hidden(index: int, **values: Any) -> Damage:
    return lambda state_dict: state_dict["state"][index]["__bnb_optimizer_quant_state__"].update(values)


EIGHT_BIT: dict[str, tuple[Damage, str]] = {
    "no qmap": (hidden(3, qmap1=None), f"{WIDE}: qmap1 of the state: expected a tensor"),
    "other qmap": (hidden(3, qmap2=torch.linspace(0, 1, 256)), f"{WIDE}: qmap2 and absmax2"),
    "cast absmax": (hidden(3, absmax1=torch.zeros(19, dtype=torch.bfloat16)), f"{WIDE}: qmap1 and absmax1"),
    "larger blocks": (hidden(3, absmax1=torch.zeros(3)), rf"{WIDE}: absmax1 .*\(19,\), got shape \(3,\)"),
    "NaN absmax": (hidden(3, absmax2=torch.full((19,), torch.nan)), f"{WIDE}: exp_avg_sq of the state holds NaN"),
    "NaN absmax, kept": (hidden(0, absmax1=torch.full((17,), torch.nan)), "parameter 0: exp_avg_absmax holds NaN"),
    "strided": (hidden(3, state1=torch.zeros(300, 16, dtype=torch.uint8).T), f"{WIDE}: state1 .* contiguous uint8"),
    "one cast": (hidden(3, state2=torch.zeros(16, 300)), f"{WIDE}: state2 .* uint8 codes, got torch.float32"),
}


@pytest.mark.parametrize(
    ("eight_bit", "damage", "message"),
    [
        pytest.param(eight_bit, *case, id=name)
        for eight_bit, cases in ((False, FLOAT), (True, EIGHT_BIT))
        for name, case in cases.items()
    ],
)
def test_what_does_not_fit_changes_nothing(eight_bit: bool, damage: Damage, message: str) -> None:
    theirs, params = trained_theirs(eight_bit, 2)
    state_dict = copy.deepcopy(theirs.state_dict())
    damage(state_dict)
    optimizer, copies = ours(eight_bit, params)
    train(optimizer, copies, [0])
    before = snapshot(optimizer, copies)
    with pytest.raises(ValueError, match=message):
        import_state_dict(optimizer, state_dict)
    assert_same_snapshot(snapshot(optimizer, copies), before)


def test_optimizers_of_other_packages_and_wrappers_are_refused() -> None:
    params = make_params()
    for optimizer in (torch.optim.AdamW(params.values()), LayerwiseOptimizer(GaLoreFusedAdamW(params.values()))):
        with pytest.raises(TypeError, match=f"got {type(optimizer).__name__}; pass the one that a wrapper wraps"):
            import_state_dict(optimizer, {})  # type: ignore[arg-type]


def test_our_own_state_dict_is_for_load_state_dict() -> None:
    optimizer, _ = ours(False, make_params())
    with pytest.raises(ValueError, match="pass it to load_state_dict"):
        import_state_dict(optimizer, optimizer.state_dict())


def test_a_projected_matrix_at_full_rank_here_says_what_to_do() -> None:
    theirs, params = trained_theirs(False, 1)
    state_dict = theirs.state_dict()
    state_dict["param_groups"][1]["rank"] = None
    copies = clone_params(params)
    groups = [{"params": group["params"]} for group in groups_of(copies)]
    with pytest.raises(
        ValueError, match=f"{WIDE[:-1]}0: the state is of a projected matrix.*give its group the key rank"
    ):
        import_state_dict(GaLoreFusedAdam8bit(groups, rank=None), state_dict)


def test_names_are_compared_where_both_have_them() -> None:
    params = make_params({"a": (30, 20), "b": (30, 20)})
    theirs = torch.optim.AdamW(params.items())
    train(theirs, params, [0])
    import_state_dict(GaLoreFusedAdamW(params.values(), rank=None), theirs.state_dict())
    named = GaLoreFusedAdamW(params.items(), rank=None)
    import_state_dict(named, theirs.state_dict())
    assert named.param_groups[0]["param_names"] == ["a", "b"]
    exchanged = GaLoreFusedAdamW(reversed(params.items()), rank=None)
    with pytest.raises(ValueError, match='parameter 0 is "a" there and "b" here'):
        import_state_dict(exchanged, theirs.state_dict())
