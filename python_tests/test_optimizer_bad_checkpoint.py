"""State dicts that don't fit or are damaged: refused by name, and the optimizer is bitwise as before."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from optimizer_cases import (
    EVERY_OPTIMIZER,
    OF_PROJECTIONS,
    OPTIONS,
    SHAPES,
    OptimizerClass,
    assert_same_snapshot,
    make_params,
    set_grads,
    snapshot,
    train,
)
from torch import Tensor, nn

from galore_kernels import GaLoreFusedAdam8bit, GaLoreFusedAdamW
from galore_kernels.optim.base import LowRankOptimizer
from galore_kernels.optim.checksum import state_checksum
from galore_kernels.optim.multi_tensor import PlannedGroup

StateDict = dict[str, Any]
Damage = Callable[[StateDict], object]


def trained(
    optimizer_class: OptimizerClass = GaLoreFusedAdam8bit, steps: int = 4, **options: Any
) -> tuple[LowRankOptimizer, dict[str, nn.Parameter]]:
    params = make_params()
    optimizer = optimizer_class(list(params.items()), **{**OPTIONS, **options})
    train(optimizer, params, range(steps))
    return optimizer, params


def assert_refused(
    optimizer: LowRankOptimizer, params: dict[str, nn.Parameter], saved: StateDict, message: str
) -> None:
    """Fails unless loading raises ValueError with ``message``, the optimizer is as before, and so is its next step."""
    before = snapshot(optimizer, params)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved)
    assert_same_snapshot(snapshot(optimizer, params), before)


def with_right_checksums(saved: StateDict) -> StateDict:
    """As if the damage had been there when it was saved: what is left are the checks of the values themselves."""
    saved["galore_kernels"]["checksums"] = {key: state_checksum(state) for key, state in saved["state"].items()}
    return saved


# ---------------------------------------------------------------------- of something else


@pytest.mark.parametrize("optimizer_class", OF_PROJECTIONS)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 8}, "param group 0: rank=8, the optimizer was built with rank=16"),
        ({"rank": None}, "param group 0: rank=None, the optimizer was built with rank=16"),
        ({"proj_type": "left"}, "param group 0: proj_type='left'"),
        ({"proj_type": "full"}, "param group 0: proj_type='full'"),
        ({"project_nd": True}, "param group 0: project_nd=True"),
    ],
)
def test_of_other_options(optimizer_class: OptimizerClass, options: dict[str, Any], message: str) -> None:
    saved = trained(optimizer_class, **options)[0].state_dict()
    assert_refused(*trained(optimizer_class), saved, message)


def test_of_another_optimizer() -> None:
    saved = [trained(optimizer_class)[0] for optimizer_class in EVERY_OPTIMIZER]
    names = [type(optimizer).__name__ for optimizer in saved]
    for optimizer_class, own in zip(EVERY_OPTIMIZER, names, strict=True):
        for optimizer, name in zip(saved, names, strict=True):
            if name != own:
                assert_refused(
                    *trained(optimizer_class), optimizer.state_dict(), f"saved by {name}, not {own}; construct"
                )


@pytest.mark.parametrize("name", SHAPES)
def test_of_other_shapes(name: str) -> None:
    shapes = {**SHAPES, name: tuple(size + 3 for size in SHAPES[name])}
    params = make_params(shapes)
    other = GaLoreFusedAdam8bit(list(params.items()), **OPTIONS)
    train(other, params, range(2))
    assert_refused(*trained(), other.state_dict(), rf'\("{name}"\): \w+ has shape .*, expected')


def test_of_another_order() -> None:
    # Two layers of one shape that changed places fit each other's state in everything but the name.
    params = make_params({"first": (40, 30), "second": (40, 30)})
    swapped = GaLoreFusedAdamW(list(reversed(params.items())), **OPTIONS)
    train(swapped, params, [0])
    optimizer = GaLoreFusedAdamW(list(params.items()), **OPTIONS)
    message = 'parameter 0 is "second" there and "first" here; pass the parameters in the order'
    assert_refused(optimizer, params, swapped.state_dict(), message)


def test_of_groups_of_other_sizes() -> None:
    params = make_params()
    items = list(params.items())
    split = GaLoreFusedAdam8bit([{"params": items[:2]}, {"params": items[2:]}], **OPTIONS)
    train(split, params, [0])
    message = r"param groups of \[2, 3\] parameters, the optimizer has \[5\]; build it with the same groups"
    assert_refused(*trained(), split.state_dict(), message)
    fewer = GaLoreFusedAdam8bit(items[:4], **OPTIONS)
    assert_refused(*trained(), fewer.state_dict(), r"param groups of \[4\] parameters")


def test_of_a_group_that_names_its_rank_where_the_other_inherits_it() -> None:
    # Rank 16 either way, but only the group that names it projects a 16 x 40 matrix.
    params = make_params({"w": (16, 40)})
    explicit = GaLoreFusedAdamW([{"params": list(params.items()), "rank": 16}])
    train(explicit, params, [0])
    inheriting = GaLoreFusedAdamW(list(params.items()), rank=16)
    assert_refused(inheriting, params, explicit.state_dict(), r'\("w"\): the state\'s fields don\'t fit.*basis')


def test_of_torchs_adamw() -> None:
    params = make_params()
    theirs = torch.optim.AdamW(params.values())
    train(theirs, params, [0])
    message = "not saved by a galore_kernels optimizer"
    assert_refused(*trained(), theirs.state_dict(), message)


def test_of_galore_torch() -> None:
    galore_torch = pytest.importorskip("galore_torch")
    params = make_params()
    group = {"params": [params["tall"]], "rank": 16, "update_proj_gap": 3, "scale": 0.25, "proj_type": "std"}
    theirs = galore_torch.GaLoreAdamW([group], no_deprecation_warning=True)
    train(theirs, params, [0])
    assert_refused(*trained(), theirs.state_dict(), "not saved by a galore_kernels optimizer")


# ---------------------------------------------------------------------- damaged


def without_header(state_dict: dict[str, Any], origin: str | None) -> None:
    """As ``torch.distributed.checkpoint`` leaves it: what saved it is in the groups alone."""
    del state_dict["galore_kernels"]
    for group in state_dict["param_groups"]:
        group["galore_kernels"] = origin


STRUCTURE: dict[str, tuple[Damage, str]] = {
    "no state": (lambda s: s.pop("state"), r"keys \['state'\] are missing"),
    "no groups": (lambda s: s.pop("param_groups"), r"keys \['param_groups'\] are missing"),
    "no header": (lambda s: without_header(s, None), "not saved by a galore_kernels optimizer, or not whole"),
    "another optimizer's groups": (lambda s: without_header(s, "Lion, format 2"), "saved by Lion"),
    "later groups": (lambda s: without_header(s, "GaLoreFusedAdam8bit, format 3"), "version 3, this release reads 2"),
    "state is a list": (lambda s: s.update(state=[]), "not built as a state dict"),
    "groups are a dict": (lambda s: s.update(param_groups={}), "not built as a state dict"),
    "header is a number": (lambda s: s.update(galore_kernels=1), "not built as a state dict"),
    "later version": (lambda s: s["galore_kernels"].update(format_version=3), "version 3, this release reads 2"),
    "no version": (lambda s: s["galore_kernels"].pop("format_version"), "version None, this release reads 2"),
    "no optimizer": (lambda s: s["galore_kernels"].pop("optimizer"), "saved by None"),
    "no checksums": (lambda s: s["galore_kernels"].pop("checksums"), "checksums are missing"),
    "one checksum gone": (lambda s: s["galore_kernels"]["checksums"].pop(1), "damaged"),
    "one checksum wrong": (lambda s: s["galore_kernels"]["checksums"].update({1: 5}), r'\("wide"\).*checksum'),
    "one state gone": (lambda s: s["state"].pop(1), "damaged"),
    "one state too many": (lambda s: s["state"].update({9: s["state"][1]}), "damaged"),
    "a state that is no dict": (lambda s: s["state"].update({1: 5}), r'\("wide"\): its state is a int'),
    "two states exchanged": (
        lambda s: s["state"].update({0: s["state"][1], 1: s["state"][0]}),
        r'\("tall"\): .*(shape|checksum)',
    ),
    "group without params": (lambda s: s["param_groups"][0].pop("params"), "not built as a state dict"),
    "group without lr": (lambda s: s["param_groups"][0].pop("lr"), r"param group 0: the keys \['lr'\] are missing"),
    "group without rank": (lambda s: s["param_groups"][0].pop("rank"), r"keys \['rank'\] are missing"),
    "group without seed": (lambda s: s["param_groups"][0].pop("seed"), r"keys \['seed'\] are missing"),
    "group with a bad lr": (lambda s: s["param_groups"][0].update(lr=math.nan), "lr=nan in state_dict, param group 0"),
    "group with bad betas": (lambda s: s["param_groups"][0].update(betas=(0.9, 1.5)), "betas=.*state_dict"),
    "a parameter twice": (lambda s: s["param_groups"][0]["params"].__setitem__(2, 1), "damaged"),
}


@pytest.mark.parametrize("kind", STRUCTURE)
def test_a_damaged_structure(kind: str) -> None:
    optimizer, params = trained()
    saved = copy.deepcopy(optimizer.state_dict())
    damage, message = STRUCTURE[kind]
    damage(saved)
    train(optimizer, params, [4])
    assert_refused(optimizer, params, saved, message)


def fill(key: str, value: float, index: int = 0) -> Damage:
    return lambda s: s["state"][index][key].view(-1)[-1:].fill_(value)


VALUES: dict[str, tuple[Damage, str]] = {
    "missing field": (lambda s: s["state"][0].pop("exp_avg"), "missing.*exp_avg"),
    "missing absmax": (lambda s: s["state"][0].pop("exp_avg_absmax"), "missing.*exp_avg_absmax"),
    "missing counter": (lambda s: s["state"][0].pop("refreshes"), "missing.*refreshes"),
    "unexpected field": (lambda s: s["state"][0].update(extra=1), "unexpected.*extra"),
    "nan in a basis": (fill("basis", math.nan), "basis holds NaN or Inf; go back"),
    "inf in a basis": (fill("basis", math.inf), "basis holds NaN or Inf"),
    "nan in an absmax": (fill("exp_avg_absmax", math.nan), "exp_avg_absmax holds NaN or Inf"),
    "nan in v's absmax": (fill("exp_avg_sq_absmax", math.nan), "exp_avg_sq_absmax holds NaN or Inf"),
    "negative absmax": (fill("exp_avg_absmax", -1.0), "exp_avg_absmax holds negative values"),
    "negative v's absmax": (fill("exp_avg_sq_absmax", -1.0), "exp_avg_sq_absmax holds negative values"),
    "nan in m": (fill("exp_avg", math.nan, 2), "exp_avg holds NaN or Inf"),
    "nan in v": (fill("exp_avg_sq", math.nan, 2), "exp_avg_sq holds NaN or Inf"),
    "negative v": (fill("exp_avg_sq", -1e-20, 2), "exp_avg_sq holds negative values"),
    "fractional step": (fill("step", 2.5), "step is 2.5, expected a whole number"),
    "negative step": (fill("step", -1.0), "step holds negative values"),
    "nan step": (fill("step", math.nan), "step holds NaN or Inf"),
    "negative skips": (fill("skipped", -1), "skipped holds negative values"),
    "negative refreshes": (lambda s: s["state"][0].update(refreshes=-1), "refreshes is -1"),
    "negative share": (lambda s: s["state"][0].update(captured=-0.5), "captured is -0.5"),
    "endless interval": (lambda s: s["state"][0].update(interval=math.inf), "interval is inf"),
    "share that is no number": (lambda s: s["state"][0].update(overlap=math.nan), "overlap is nan"),
    "fractional refreshes": (lambda s: s["state"][0].update(refreshes=0.5), "refreshes is 0.5"),
    "other block size": (
        lambda s: s["state"][0].update(block_size=128),
        "block_size is 128, expected a number like 256",
    ),
    "cast codes": (lambda s: s["state"][0].update(exp_avg=s["state"][0]["exp_avg"].float()), "the state was cast"),
    "cast absmax": (
        lambda s: s["state"][0].update(exp_avg_absmax=s["state"][0]["exp_avg_absmax"].bfloat16()),
        "exp_avg_absmax has dtype torch.bfloat16, expected torch.float32; the state was cast",
    ),
    "double basis": (lambda s: s["state"][0].update(basis=s["state"][0]["basis"].double()), "the state was cast"),
    "no tensor": (lambda s: s["state"][0].update(step=3), "step has shape int"),
    "transposed basis": (lambda s: s["state"][0].update(basis=s["state"][0]["basis"].T), "basis has shape"),
    "truncated absmax": (
        lambda s: s["state"][0].update(exp_avg_absmax=s["state"][0]["exp_avg_absmax"][:-1]),
        "exp_avg_absmax has shape",
    ),
}


@pytest.mark.parametrize("kind", VALUES)
def test_damaged_values_are_found_even_under_right_checksums(kind: str) -> None:
    optimizer, params = trained()
    saved = copy.deepcopy(optimizer.state_dict())
    damage, message = VALUES[kind]
    damage(saved)
    train(optimizer, params, [4])
    assert_refused(optimizer, params, with_right_checksums(saved), rf'parameter [02] \("(tall|small)"\): .*{message}')


# The state after four steps of every kind of parameter; made once, since each example only reads it.
_SAVED: dict[OptimizerClass, tuple[LowRankOptimizer, dict[str, nn.Parameter], StateDict]] = {}


def saved_by(optimizer_class: OptimizerClass) -> tuple[LowRankOptimizer, dict[str, nn.Parameter], StateDict]:
    if optimizer_class not in _SAVED:
        optimizer, params = trained(optimizer_class)
        _SAVED[optimizer_class] = optimizer, params, copy.deepcopy(optimizer.state_dict())
    return _SAVED[optimizer_class]


def flip(tensor: Tensor, bit: int) -> Tensor:
    """A copy with one bit changed."""
    raw = tensor.detach().clone().reshape(-1).view(torch.uint8)
    raw[bit // 8] ^= 1 << (bit % 8)
    return raw.view(tensor.dtype).view(tensor.shape)


@pytest.mark.parametrize("optimizer_class", EVERY_OPTIMIZER)
@given(data=st.data())
def test_a_flipped_bit_anywhere_in_the_state(optimizer_class: OptimizerClass, data: st.DataObject) -> None:
    optimizer, params, pristine = saved_by(optimizer_class)
    index = data.draw(st.sampled_from(sorted(pristine["state"])))
    state = pristine["state"][index]
    key = data.draw(st.sampled_from(sorted(k for k, v in state.items() if isinstance(v, Tensor))))
    bit = data.draw(st.integers(0, 8 * state[key].numel() * state[key].element_size() - 1))
    damaged = {**pristine, "state": {**pristine["state"], index: {**state, key: flip(state[key], bit)}}}
    assert_refused(optimizer, params, damaged, rf'parameter {index} \("{list(SHAPES)[index]}"\): ')


@pytest.mark.parametrize("optimizer_class", EVERY_OPTIMIZER)
def test_a_flipped_bit_at_both_ends_of_every_tensor(optimizer_class: OptimizerClass) -> None:
    optimizer, _, pristine = saved_by(optimizer_class)
    for index, state in pristine["state"].items():
        for key, value in state.items():
            tensor = value if isinstance(value, Tensor) else torch.tensor([value])
            for bit in (0, 8 * tensor.numel() * tensor.element_size() - 1):
                flipped = flip(tensor, bit)
                changed = flipped if isinstance(value, Tensor) else flipped.item()
                damaged = {**pristine, "state": {**pristine["state"], index: {**state, key: changed}}}
                with pytest.raises(ValueError, match=rf'parameter {index} \("{list(SHAPES)[index]}"\): '):
                    optimizer.load_state_dict(damaged)
    optimizer.load_state_dict(pristine)  # whole, it loads


def test_a_refused_checkpoint_does_not_disturb_a_step_that_is_to_be_retried(monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer, params = trained()
    expected, expected_params = trained(steps=5)
    set_grads(params, 4)
    calls = []
    run = PlannedGroup.run

    def fails_third(self: PlannedGroup, *args: Any) -> None:
        calls.append(args)
        if len(calls) == 3:
            raise MemoryError
        run(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(PlannedGroup, "run", fails_third)
        with pytest.raises(MemoryError):
            optimizer.step()
    with pytest.raises(ValueError, match="missing"):
        optimizer.load_state_dict({})
    optimizer.step()
    assert_same_snapshot(snapshot(optimizer, params), snapshot(expected, expected_params))
