"""Adafactor's native call: its sums over several chunks, whatever the threads; its scratch memory; interrupts."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import tolerances
import torch
from interrupts import interrupted
from native_calls import check_guard, guarded
from optimizer_cases import assert_same_snapshot, make_params, set_grads, snapshot, train
from test_adafactor_update import (
    DTYPE_PAIRS,
    FIXED,
    Problem,
    assert_same_state,
    check_against_float64,
    full_rank,
    options,
    projected,
)
from torch import Tensor
from update_cases import assert_same_bits

from galore_kernels import GaLoreFusedAdafactor, _native
from galore_kernels.quantizers import quantize_weight

#: What no small shape reaches.
LARGE: dict[str, Callable[[], Problem]] = {
    "rows of several blocks": lambda: full_rank((70, 530)),
    "several chunks of rows": lambda: full_rank((200, 37), beta1=0.9),
    "matrices of several chunks": lambda: full_rank((3, 130, 40)),
    "many small matrices": lambda: full_rank((40, 30, 3, 3)),
    "a long vector": lambda: full_rank((40_000,), beta1=0.9),
    "16-bit": lambda: full_rank((300, 130), dtypes=DTYPE_PAIRS[1]),
    "right": lambda: projected(300, 130, 33, "right"),
    "left": lambda: projected(130, 300, 33, "left", dtypes=DTYPE_PAIRS[1], beta1=0.9),
    "both": lambda: projected(130, 300, 33, "right", long_rank=70),
}


def of_codes() -> Problem:
    p = projected(130, 600, 33, "left", rounding_seed=11)
    codes, scale = quantize_weight(p.param)
    return replace(p, param=codes, weight_scale=scale)


@pytest.mark.parametrize("make", LARGE.values(), ids=LARGE)
def test_large_shapes_follow_the_paper(make: Callable[[], Problem]) -> None:
    check_against_float64(make(), "cpu")


@pytest.mark.parametrize("make", [*LARGE.values(), of_codes], ids=[*LARGE, "int8"])
def test_threads_and_what_the_scratch_memory_held_change_nothing(
    make: Callable[[], Problem], monkeypatch: pytest.MonkeyPatch
) -> None:
    p = make()
    expected, empty, given = p.solved("cpu"), torch.empty, []

    def allocate(*args: Any, **kwargs: Any) -> Tensor:
        if kwargs.get("dtype") != torch.uint8:
            return empty(*args, **kwargs)
        given.append(guarded(*args))  # NaN and a guard
        return given[-1]

    torch.set_num_threads(3)
    monkeypatch.setattr(torch, "empty", allocate)
    got = p.solved("cpu")
    assert len(given) == 1
    check_guard(given[0])
    assert_same_bits(got.param, expected.param, "param")
    assert_same_state(got.state, expected.state)
    if expected.weight_scale is not None:
        assert got.weight_scale is not None
        assert_same_bits(got.weight_scale, expected.weight_scale, "weight_scale")


def test_the_size_of_a_weight_is_summed_in_double() -> None:
    # The squares of these overflow in float32, and those of others vanish.
    for size in (1e25, 1e-30):
        p = full_rank((70, 530), eps2=0.0)
        p.param = torch.full((70, 530), size)
        got = p.solved("cpu")
        change = float((f := (p.param - got.param).double()).square().mean().sqrt())
        assert math.isfinite(change)
        assert f.count_nonzero() > 30_000
        assert change == pytest.approx(1e-2 * size, rel=1e-3)


def test_moments_that_are_not_finite_change_nothing() -> None:
    for p in (full_rank((200, 37), beta1=0.9), full_rank((7,)), projected(130, 300, 33, "left")):
        for name in ("exp_avg_sq", "exp_avg_sq_row", "exp_avg_sq_col"):
            moment = getattr(p.state, name)
            if moment is None:
                continue
            kept = moment.clone()
            moment.view(-1)[3] = math.inf
            got = p.solved("cpu")
            assert_same_bits(got.param, p.param, "param")
            assert got.state.skipped.item() == 1
            assert_same_state(replace(got.state, skipped=p.state.skipped), p.state)
            moment.copy_(kept)


def test_an_update_whose_size_is_not_finite_changes_nothing() -> None:
    p = full_rank((37, 53), **FIXED, decay_rate=-20.0, step=10**6, beta1=0.9)  # so that the means stay what they are
    row, col = p.state.exp_avg_sq_row, p.state.exp_avg_sq_col
    assert row is not None
    assert col is not None
    row[5], col[7], p.grad[5, 7] = 1e-37, 1e-37, 1e3
    got = p.solved("cpu")
    assert_same_bits(got.param, p.param, "param")
    assert got.state.skipped.item() == 1
    assert_same_state(replace(got.state, skipped=p.state.skipped), p.state)


def test_the_size_of_an_int8_weight_is_that_of_all_its_groups() -> None:
    p = of_codes()
    assert p.weight_scale is not None
    p.weight_scale[:, 1] *= 50
    got, expected = p.solved("cpu"), p.solved("reference")
    assert (got.param == expected.param).float().mean() >= tolerances.EQUAL_INT8_CODES
    assert (expected.param[:, :256] != p.param[:, :256]).float().mean() > 0.5


def test_found_inf_leaves_all_as_it_is() -> None:
    p = full_rank((37, 53))
    p.options = replace(options(**FIXED), found_inf=torch.ones(()))
    got = p.solved("cpu")
    assert_same_bits(got.param, p.param, "param")
    assert_same_state(got.state, p.state)


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("after", [False, True])  # before the native call has begun, and while it runs
def test_an_interrupted_step_is_neither_lost_nor_taken_twice(
    grouped: bool, after: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = {"first": (400, 60), "second": (400, 60), "norm": (50,)}
    undisturbed, params = make_params(shapes), make_params(shapes)
    if not grouped:
        for own in (undisturbed, params):  # which no backend updates together
            for name in ("first", "second"):
                own[name].data = own[name].data.T.contiguous().T
    options: dict[str, Any] = {"rank": 16, "beta1": 0.9, "backend": "cpu"}
    expected, optimizer = (GaLoreFusedAdafactor(own.values(), **options) for own in (undisturbed, params))
    train(expected, undisturbed, range(4))
    train(optimizer, params, range(3))
    assert optimizer._plan is not None
    assert [len(group.members) for group in optimizer._plan.groups] == ([2, 1] if grouped else [1])
    # The norm's call is the first of the strided ones' step: then one is interrupted by itself, and one is left.
    ends = 1 if grouped else 2
    set_grads(params, 3)
    with interrupted(_native, "cpu_adafactor_update", monkeypatch, after=after):
        for _ in range(ends if after else 1):
            with pytest.raises(KeyboardInterrupt):
                optimizer.step()
    optimizer.step()
    assert_same_snapshot(snapshot(optimizer, params), snapshot(expected, undisturbed))
