"""What is the Triton kernels' own: tables, conversions, tiles, splits and groups. Parity is tested with the operations.

On a machine with a GPU they run there, else in Triton's interpreter.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from torch import Tensor
from triton_device import BACKEND, DEVICE, galore_update, group_update, moved_options, moved_state
from update_cases import assert_same_bits, assert_same_state, bits, clone, options, warm_state

from galore_kernels import ops
from galore_kernels.backends import pipeline
from galore_kernels.backends.batch import make_batch, new_control, with_gradients
from galore_kernels.backends.triton import code_tables, configuration
from galore_kernels.backends.triton.stages import TritonStages
from galore_kernels.ops import AdamOptions, AdamState
from galore_kernels.ops.group import UpdateGroup
from galore_kernels.quantizers import rounding_thresholds

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(BACKEND.refuses(DEVICE) is not None, reason=str(BACKEND.refuses(DEVICE)))

SIDES = ["left", "right"]
FLOATS = [torch.float32, torch.bfloat16, torch.float16]


# --- the 8-bit code's buckets


@pytest.mark.parametrize("signed", [True, False])
def test_no_bucket_holds_two_thresholds(signed: bool) -> None:
    lowest = code_tables.lowest_of_buckets()
    magnitudes = bits(lowest) & 0x7FFFFFFF
    positive = lowest > 0
    highest = torch.where(positive, magnitudes | 0xFFFF, magnitudes & ~0xFFFF).view(torch.float32)
    highest = torch.where(positive, highest, -highest)
    thresholds = rounding_thresholds(signed)
    steps = torch.bucketize(highest, thresholds) - torch.bucketize(lowest, thresholds)
    assert set(steps.tolist()) == {0, 1}


@pytest.mark.parametrize("signed", [True, False])
def test_what_is_below_the_buckets_has_the_first_ones_code(signed: bool) -> None:
    smallest = float(code_tables.lowest_of_buckets()[0])
    assert smallest == 2.0**-23
    tiny = torch.tensor([0.0, 2.0**-149, smallest])
    assert len(torch.bucketize(torch.cat([tiny, -tiny]) if signed else tiny, rounding_thresholds(signed)).unique()) == 1


# --- conversions


def _conversion_kernel() -> Any:
    from conversion_kernel import convert_kernel

    return convert_kernel


def special_floats() -> Tensor:
    """Every bfloat16 as a float32, the float32 around the midpoints between them, and float16's edges."""
    upper = torch.arange(2**16, dtype=torch.int64) << 16
    patterns = torch.cat([upper, upper | 0x7FFF, upper | 0x8000, upper | 0x8001, upper | 0x1000, upper | 0x1001])
    return (patterns - ((patterns >> 31) << 32)).to(torch.int32).view(torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_conversions_are_torchs_to_the_bit(dtype: torch.dtype) -> None:
    x = special_floats()
    narrow = torch.empty(x.shape, dtype=dtype, device=DEVICE)
    wide = torch.empty(x.shape, dtype=torch.float32, device=DEVICE)
    from galore_kernels.backends.triton.dtypes import triton_dtype
    from galore_kernels.backends.triton.launch import launch

    block = 2**14
    launch(
        _conversion_kernel(),
        x.numel() // block,
        DEVICE,
        x.to(DEVICE),
        narrow,
        wide,
        DTYPE=triton_dtype(dtype),
        BLOCK=block,
        warps=4,
    )
    expected = x.to(dtype)
    if dtype == torch.float16:
        assert_same_bits(narrow.cpu(), expected, "float32 -> float16")
    else:  # every NaN becomes the quiet one, as in csrc/core/rounding.h; torch keeps signs and payloads of some
        assert_same_bits(narrow.cpu()[~x.isnan()], expected[~x.isnan()], "float32 -> bfloat16")
        assert (bits(narrow.cpu()[x.isnan()]) == 0x7FC0).all()
    there = ~x.isnan()
    assert_same_bits(wide.cpu()[there], expected.float()[there], "and back")


# --- prepare


def control_of(step: int, o: AdamOptions, scale: float = 1.0) -> np.ndarray[Any, np.dtype[np.float32]]:
    """The control row as 16 float32."""
    state = AdamState.zeros((4,), eight_bit=False, device=DEVICE)
    state.step.fill_(step)
    param = torch.zeros(4, device=DEVICE)
    batch = with_gradients(make_batch(UpdateGroup("adam8bit_update", (param,), (state,))), (param,))
    control = new_control(batch)
    TritonStages().prepare(batch, control, moved_options(o), scale)
    return control.cpu().view(torch.float32).numpy()[0]


@pytest.mark.parametrize(
    "step",
    [
        0,
        1,
        2,
        999,
        10**6,
        2**24,  # the last that float32 counts to
    ],
)
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.0), (0.7, 0.95), (0.999, 0.99999)])
def test_coefficients_are_rounded_once_from_double(step: int, betas: tuple[float, float]) -> None:
    o = options(lr=1e-3, lr_dtype=torch.float64, weight_decay=0.1, eps=1e-7, grad_scale=3.0)
    o = replace(o, beta1=betas[0], beta2=betas[1])
    row, t = control_of(step, o, 0.25), step + 1
    # numpy's pow errs by an ulp of double, the kernel's squaring by up to t of them: both vanish in float32's.
    correction1, correction2 = 1.0 - betas[0] ** t, 1.0 - betas[1] ** t
    step_size = 1e-3 * np.sqrt(correction2) / correction1 * 0.25
    exact = [1 / 3.0, betas[0], 1 - betas[0], betas[1], 1 - betas[1], 1e-7, step_size, 1.0 - 1e-3 * 0.1]
    assert row[:8].tolist() == [float(np.float32(x)) for x in exact]
    words = row.view(np.int32)
    assert words[8:10].tolist() == [0, 0]
    assert row[10:12].view(np.int64)[0] == t


def test_maximizing_negates_and_found_inf_flags() -> None:
    o = replace(options(grad_scale=2.0), maximize=True, found_inf=torch.tensor(0.5, dtype=torch.float64))
    row = control_of(0, o)
    assert row[0] == -0.5
    assert row.view(np.int32)[8] == 2
    assert control_of(0, replace(o, found_inf=torch.zeros(1))).view(np.int32)[8] == 0


# --- tiles


def problem(
    rows: int, cols: int, rank: int, side: str, dtype: torch.dtype = torch.float32, **scalars: Any
) -> tuple[Tensor, Tensor, Tensor, AdamState, AdamOptions]:
    """Weight, gradient, basis, state and options, in which R is the same whatever the order of its sums."""
    long, short = (rows, cols) if side == "right" else (cols, rows)
    return (
        torch.randn(rows, cols).to(dtype),
        torch.randint(-4, 5, (rows, cols)).to(dtype),
        (torch.randint(-4, 5, (short, rank)) / 8).to(dtype),
        warm_state((long, rank), eight_bit=True),
        options(weight_decay=0.1, **scalars),
    )


def reference(
    param: Tensor, grad: Tensor, basis: Tensor, state: AdamState, o: AdamOptions, side: str, scale: float
) -> tuple[Tensor, AdamState]:
    """The operation by the reference, on copies."""
    param, state = param.clone(), clone(state)
    ops.galore_update(param, grad, basis, state, o, side=side, scale=scale, backend="reference")
    return param, state


SMALL = {"rows": 16, "columns": 32, "depth": 16}


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize(
    ("shape", "rank"),
    [
        ((48, 64), 32),  # whole tiles, aligned
        ((40, 72), 24),  # aligned, with tails
        ((37, 51), 19),  # neither
    ],
)
def test_many_small_tiles_and_parts(shape: tuple[int, int], rank: int, side: str, dtype: torch.dtype) -> None:
    inputs = problem(*shape, rank, side, dtype)
    expected, expected_state = reference(*inputs, side, 0.25)
    for splits in (1, 2, 5):  # five: more than the short side has steps on some, so that parts are empty
        with configuration.override(
            project=SMALL,
            back_project_update=SMALL,
            lowrank_adam={"blocks": 2},
            scale_and_check={"blocks": 1},
            splits=splits,
        ):
            got, got_state = galore_update(*inputs, side, 0.25)
        assert_same_state(got_state, expected_state)
        # The change is a sum of `rank` products of about 1 x lr: rounded in another order, and then to the dtype.
        ulp = {torch.float32: 2.0**-22, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}[dtype]
        assert (got.float() - expected.float()).abs().max() <= ulp * expected.float().abs().max()


@pytest.mark.parametrize("side", SIDES)
def test_64bit_offsets_within_a_tile(monkeypatch: pytest.MonkeyPatch, side: str) -> None:
    # Rows of more than 2^24 elements need them, and more memory than a test has.
    from triton import language as tl

    from galore_kernels.backends.triton import back_project_update, dtypes, project

    tile = configuration.Tile(128, 128, 64, 8, 3)
    assert dtypes.offset_dtype(tile, 2**24 - 1) == tl.int32
    assert dtypes.offset_dtype(tile, 2**24) == tl.int64
    inputs = problem(40, 72, 24, side)
    expected, expected_state = galore_update(*inputs, side, 0.25)
    for module in (project, back_project_update):
        monkeypatch.setattr(module, "offset_dtype", lambda tile, pitch: tl.int64)
    got, got_state = galore_update(*inputs, side, 0.25)
    assert_same_bits(got, expected, "param")
    assert_same_state(got_state, expected_state)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("rank", [257, 1024])  # one past the largest tile; the largest of the papers
def test_ranks_of_several_tiles(rank: int, side: str) -> None:
    inputs = problem(24, 40, rank, side)
    expected, expected_state = reference(*inputs, side, 0.25)
    got, got_state = galore_update(*inputs, side, 0.25)
    assert_same_state(got_state, expected_state)
    assert (got - expected).abs().max() <= rank * 2.0**-24 * expected.abs().max()


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("shape", [(0, 24), (24, 0), (0, 0)])
def test_empty_weights_still_take_their_step(shape: tuple[int, int], side: str) -> None:
    inputs = problem(*shape, 3, side)
    expected, expected_state = reference(*inputs, side, 0.25)
    got, got_state = galore_update(*inputs, side, 0.25)
    assert_same_bits(got, expected, "param")
    assert_same_state(got_state, expected_state)  # R is 0: moments decay
    assert got_state.step == 4


@pytest.mark.parametrize("cols", [64, 72, 61])  # whole groups of eight elements with and without tails; none
def test_random_bits_go_by_the_elements_index_in_every_tile(cols: int) -> None:
    seed = 2**40 + 3
    param, grad, basis, state, o = problem(40, cols, 8, "right", torch.bfloat16)
    exact, _ = galore_update(param.float(), grad, basis, state, o, "right", 0.25)
    with configuration.override(back_project_update=SMALL):
        got, _ = galore_update(param, grad, basis, state, replace(o, rounding_seed=seed), "right", 0.25)
    random = oracle.random_bits16(seed, 4, exact.numel()).reshape(exact.shape)
    expected = ((exact.numpy().view(np.uint32) + random) >> np.uint32(16)).astype(np.uint16)
    assert np.array_equal(got.view(torch.int16).numpy().view(np.uint16), expected)


# --- groups


def group_of(count: int, side: str, dtype: torch.dtype, **facts: Any) -> tuple[UpdateGroup, list[Tensor], AdamOptions]:
    inputs = [problem(24, 40, 8, side, dtype) for _ in range(count)]
    params, grads, bases, states, o = zip(*inputs, strict=True)
    group = UpdateGroup("galore_update", params, states, bases, side, 0.25, **facts)
    return group, list(grads), o[0]


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("workspace", [None, 1])  # all at once; one at a time
def test_a_group_is_its_members(monkeypatch: pytest.MonkeyPatch, workspace: int | None, side: str) -> None:
    if workspace is not None:
        monkeypatch.setattr(pipeline, "WORKSPACE_BYTES", workspace)
    group, grads, o = group_of(3, side, torch.bfloat16, rounding_seeds=(7, 2**31 + 5, 2**62))
    grads[1][5, 5] = torch.nan
    assert group.rounding_seeds is not None
    for i, (got, got_state) in enumerate(group_update(group, grads, o)):
        own = replace(o, rounding_seed=group.rounding_seeds[i])
        basis = group.bases[i]
        assert isinstance(basis, Tensor)
        expected, expected_state = galore_update(group.params[i], grads[i], basis, group.states[i], own, side, 0.25)
        assert_same_bits(got, expected, f"param {i}")
        assert_same_state(got_state, expected_state)
        assert got_state.skipped == (i == 1)


def test_a_group_at_full_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    params = tuple(torch.randn(24, 40) for _ in range(3))
    states = tuple(warm_state((24, 40), eight_bit=True, seed=i) for i in range(3))
    grads, o = [torch.randn(24, 40) for _ in params], options(weight_decay=0.1)
    grads[2][0, 0] = torch.inf
    with configuration.override(adam_update={"blocks": 1}, check_gradient={"blocks": 2}):
        results = group_update(UpdateGroup("adam8bit_update", params, states), grads, o, steps=2)
    for i, (got, got_state) in enumerate(results):
        param, state = params[i].clone(), clone(states[i])
        for _ in range(2):
            ops.adam8bit_update(param, grads[i], state, o, backend="reference")
        assert_same_bits(got, param, f"param {i}")
        assert_same_state(got_state, state)
        assert got_state.skipped == (2 if i == 2 else 0)


@pytest.mark.parametrize("count", [1, 16, 17, 35])  # a launch takes sixteen
def test_columns_of_the_table(count: int) -> None:
    table = torch.zeros((count, 10), dtype=torch.int64, device=DEVICE)
    values = [2**62 - 7 * i if i % 3 else 2**31 + i for i in range(count)]
    TritonStages().write_column(table, 4, values)
    expected = torch.zeros((count, 10), dtype=torch.int64)
    expected[:, 4] = torch.tensor(values)
    assert_same_bits(table.cpu(), expected, "table")


def test_the_table_of_another_batch_is_not_used() -> None:
    # The stages keep the table of the last single tensor: two whose stages alternate, as threads' may, find their own.
    stages = TritonStages()
    moved = []
    for seed in (1, 2):
        state = warm_state((600,), eight_bit=True, seed=seed)
        param, grad = torch.randn(600), torch.randn(600)
        expected, expected_state = param.clone(), clone(state)
        ops.adam8bit_update(expected, grad, expected_state, options(), backend="reference")
        weight, there = param.to(DEVICE), moved_state(state)
        gradient = grad.to(DEVICE)
        batch = with_gradients(make_batch(UpdateGroup("adam8bit_update", (weight,), (there,))), (gradient,))
        moved.append((batch, new_control(batch), weight, there, expected, expected_state, gradient))
    for batch, control, *_ in moved:
        stages.prepare(batch, control, moved_options(options()), 1.0)
    for batch, control, weight, there, expected, expected_state, _ in moved:
        stages.adam_update(batch, control)
        assert_same_bits(weight.cpu(), expected, "param")
        assert_same_state(moved_state(there, torch.device("cpu")), expected_state)
