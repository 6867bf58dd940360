"""The device backends where they belong: on a GPU, with its streams, graphs, memory and several tensors at a time."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import tolerances
import torch
from device_cases import (
    BF16,
    Case,
    assert_same,
    enough_for_one_pass,
    on_the,
    options_on,
    update_together,
)
from test_galore_update import SIDES
from torch import Tensor
from update_cases import (
    assert_almost_same,
    assert_close,
    assert_codes_almost_equal,
    assert_same_bits,
    assert_same_state,
    clone,
    f64,
    options,
    warm_state,
)

from galore_kernels import GaLoreFusedAdam8bit, _native, backend_info
from galore_kernels.backends.batch import Batch
from galore_kernels.backends.cuda import CudaStages
from galore_kernels.backends.pipeline import Pipeline
from galore_kernels.ops import (
    AdafactorOptions,
    AdafactorState,
    AdamState,
    adafactor_update,
    adam8bit_update,
    galore_adafactor_update,
    registry,
    rotate_moments,
)
from galore_kernels.ops.group import UpdateGroup
from galore_kernels.quantizers import BASIS_FORMATS, BLOCK_SIZE

#: A basis of the weight's dtype, and the quantized ones.
BASES = [None, *BASIS_FORMATS]

#: Long and short dimension and rank; what every test of this file may take, in one launch or in four. Each short
#: dimension is one whose sums are never split, so that a matrix gives the same bits alone and in any group.
SHAPES = [
    (4096, 960, 128),  # whole tiles
    (4040, 1000, 120),  # tails of both dimensions and of the rank, in whole chunks of 16 bytes
    (1037, 515, 33),  # of no chunk: four launches, single elements
]


@pytest.fixture
def device() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device on this machine")
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture(params=["cuda", "triton"])
def name(request: pytest.FixtureRequest, device: torch.device) -> str:
    """Each backend that serves the device."""
    try:
        registry.select("galore_update", request.param, device)
    except (ValueError, RuntimeError) as error:
        pytest.skip(str(error))
    return str(request.param)


class OnePass:
    """The CUDA backend's stages, from which the one-pass kernel can be taken."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._pipeline = Pipeline(CudaStages(_native, "cuda"))
        self._monkeypatch = monkeypatch

    def takes(self, batch: Batch) -> bool:
        return self._pipeline.stages.in_one_pass(self._pipeline.tabled(batch))

    def take_away(self) -> None:
        self._monkeypatch.setattr(CudaStages, "in_one_pass", lambda stages, batch: False)


@pytest.fixture
def one_pass(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> OnePass:
    if not backend_info()["cuda"]["available"]:
        pytest.skip("built without CUDA")
    return OnePass(monkeypatch)


# --- several at a time


@pytest.mark.parametrize("basis_format", BASES)
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_group_is_its_matrices_to_the_bit(
    device: torch.device, name: str, shape: tuple[int, int, int], side: str, basis_format: str | None
) -> None:
    cases = [Case(*shape, side, seed, basis_format=basis_format).on(device) for seed in range(5)]
    alone = [case.on(device) for case in cases]
    o = options_on(device, weight_decay=0.1, grad_scale=3.0)
    for _ in range(2):
        update_together(cases, o, name)
        for i, case in enumerate(alone):
            case.update(o, name)
            assert_same(cases[i], case, f"{i}")


@pytest.mark.parametrize("side", SIDES)
def test_a_matrix_whose_sums_are_split_when_it_is_alone(device: torch.device, name: str, side: str) -> None:
    cases = [Case(2048, 2048, 128, side, seed).on(device) for seed in range(9)]
    alone = [case.on(device) for case in cases]
    o = options_on(device, weight_decay=0.1, grad_scale=3.0)
    update_together(cases, o, name)
    for i, case in enumerate(alone):
        case.update(o, name)
        assert_almost_same(cases[i].param, cases[i].state, case.param, case.state, f"{i}")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_bad_gradient_in_a_group_stops_its_own_matrix_alone(
    device: torch.device, name: str, shape: tuple[int, int, int], value: float
) -> None:
    count = enough_for_one_pass(shape[0], device)
    cases = [Case(*shape, "right", seed).on(device) for seed in range(count)]
    cases[1].grad[-1, -1] = value
    before = [case.on(device) for case in cases]
    o = options_on(device, weight_decay=0.1)
    update_together(cases, o, name)
    for i, (case, old) in enumerate(zip(cases, before, strict=True)):
        if i == 1:
            old.state.skipped.add_(1)
            assert_same(case, old, "of the bad gradient")
        else:
            assert int(case.state.step) == int(old.state.step) + 1
            assert int(case.state.skipped) == 0
            assert not torch.equal(case.param, old.param)
            assert bool(case.param.isfinite().all())


def test_a_full_rank_group_is_its_tensors_to_the_bit(device: torch.device, name: str) -> None:
    shape = (1000, 1037)  # a last block of 8
    rng = torch.Generator().manual_seed(1)
    weights = [torch.randn(shape, generator=rng).to(device, BF16) for _ in range(4)]
    grads = [torch.randn(shape, generator=rng).to(device, BF16) for _ in range(4)]
    states = [on_the(device, warm_state(shape, eight_bit=True, seed=i)) for i in range(4)]
    grads[2][-1, -1] = torch.nan
    alone = [(weight.clone(), clone(state)) for weight, state in zip(weights, states, strict=True)]
    o = options_on(device, weight_decay=0.1)
    make = registry.select("adam8bit_update", name, device).group
    assert make is not None
    make(UpdateGroup("adam8bit_update", tuple(weights), tuple(states)))(grads, o)
    for weight, state, grad, (expected, expected_state) in zip(weights, states, grads, alone, strict=True):
        adam8bit_update(expected, grad, expected_state, o, backend=name)
        assert_same_bits(weight, expected, "param")
        assert_same_state(state, expected_state)
    assert [int(state.skipped) for state in states] == [0, 0, 1, 0]


# --- the same bits every time


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("shape", SHAPES)
def test_results_are_the_same_from_run_to_run_stream_to_stream_and_place_to_place(
    device: torch.device, name: str, shape: tuple[int, int, int], side: str
) -> None:
    case = Case(*shape, side, 1)
    o = options_on(device, weight_decay=0.1)
    expected = case.on(device)
    expected.update(o, name)
    streams = [torch.cuda.current_stream(device), torch.cuda.Stream(device)]
    for attempt in range(6):
        # What is allocated in between moves the scratch memory.
        kept = torch.empty((attempt + 1) * 100_003, dtype=torch.uint8, device=device)
        got = case.on(device)
        stream = streams[attempt % 2]
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            got.update(o, name)
        stream.synchronize()
        assert_same(got, expected, f"attempt {attempt}, {kept.numel()} bytes apart")


@pytest.mark.parametrize("shape", SHAPES)
def test_work_is_queued_on_the_current_stream(device: torch.device, name: str, shape: tuple[int, int, int]) -> None:
    case, o = Case(*shape, "left", 1), options_on(device)
    expected = case.on(device)
    expected.update(o, name)
    got = case.on(device)
    fresh = got.grad.clone()
    got.grad.fill_(torch.nan)  # what an update on any other stream would see
    torch.cuda.synchronize(device)
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # about 50 ms
        got.grad.copy_(fresh)
        got.update(o, name)
        got.grad.fill_(torch.nan)
    stream.synchronize()
    assert_same(got, expected)


# --- CUDA graphs


def replays_like_eager(
    device: torch.device,
    step: Callable[[Any], None],
    captured: Any,
    eager: Any,
    lr: Tensor,
    compare: Callable[[], None],
) -> None:
    """Captures ``step(captured)``, then replays it with other learning rates beside ``step(eager)``."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        step(captured)
    for value in (0.01, 0.003, 0.05):
        lr.fill_(value)
        graph.replay()
        step(eager)
        torch.cuda.synchronize(device)
        compare()


@pytest.mark.parametrize("shape", SHAPES)
def test_a_captured_galore_update_replays_with_the_learning_rate_of_the_day(
    device: torch.device, name: str, shape: tuple[int, int, int]
) -> None:
    case, o = Case(*shape, "right", 1), options_on(device, weight_decay=0.1)
    case.on(device).update(o, name)  # what a first launch loads can't be loaded during a capture
    captured, eager = case.on(device), case.on(device)
    replays_like_eager(device, lambda c: c.update(o, name), captured, eager, o.lr, lambda: assert_same(captured, eager))
    assert int(captured.state.step) == int(case.state.step) + 3


def test_a_captured_adam8bit_update_replays_with_the_learning_rate_of_the_day(device: torch.device, name: str) -> None:
    case, o = Case(1000, 1037, 1, "right", 1), options_on(device, weight_decay=0.1)
    case.state = warm_state(case.shape, eight_bit=True)

    def step(c: Case) -> None:
        adam8bit_update(c.param, c.grad, c.state, o, backend=name)

    step(case.on(device))
    captured, eager = case.on(device), case.on(device)
    replays_like_eager(device, step, captured, eager, o.lr, lambda: assert_same(captured, eager))


#: A model in small: two shapes of several matrices, one that is alone, and what is not projected.
MODEL = [(512, 512)] * 4 + [(1376, 512)] * 2 + [(512, 1376), (512,), (4096,)]


def model_and_optimizer(device: torch.device, name: str, lr: Tensor) -> tuple[list[torch.nn.Parameter], Any]:
    """A trained model: every state there, every first refresh done."""
    rng = torch.Generator().manual_seed(1)
    params = [torch.nn.Parameter(torch.randn(shape, generator=rng).to(device, BF16)) for shape in MODEL]
    for param in params:
        param.grad = torch.randn(param.shape, generator=rng).to(device, BF16)
    optimizer = GaLoreFusedAdam8bit(
        params, lr=lr, rank=64, update_proj_gap=10_000, weight_decay=0.1, backend=name, stochastic_rounding=True
    )
    for _ in range(3):
        optimizer.step()
    return params, optimizer


def assert_same_models(got: tuple[Any, Any], expected: tuple[Any, Any]) -> None:
    for i, (mine, theirs) in enumerate(zip(got[0], expected[0], strict=True)):
        assert_same_bits(mine, theirs, f"param {i}")
        for key, value in expected[1].state[theirs].items():
            if isinstance(value, Tensor):
                assert_same_bits(got[1].state[mine][key], value, f"{key} of {i}")


def test_a_captured_optimizer_step_replays_with_the_learning_rate_of_the_day(device: torch.device, name: str) -> None:
    lr = torch.tensor(0.01, device=device)
    captured, eager = (model_and_optimizer(device, name, lr) for _ in range(2))
    assert_same_models(captured, eager)
    replays_like_eager(
        device, lambda model: model[1].step(), captured, eager, lr, lambda: assert_same_models(captured, eager)
    )


@contextlib.contextmanager
def waiting_is_an_error() -> Iterator[None]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch tells that it doesn't see every kind of waiting
            torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_steady_step_waits_for_nothing(device: torch.device, name: str) -> None:
    params, optimizer = model_and_optimizer(device, name, torch.tensor(0.01, device=device))
    before = [param.detach().clone() for param in params]
    with waiting_is_an_error():
        optimizer.step()
    assert not any(torch.equal(param, old) for param, old in zip(params, before, strict=True))


@pytest.mark.parametrize("given", [{"lr": 0.01, "relative_step": False, "scale_parameter": False}, {"beta1": 0.9}])
def test_adafactors_updates_wait_for_nothing(device: torch.device, name: str, given: dict[str, Any]) -> None:
    scalars = {**given, "lr": torch.tensor(given["lr"], device=device)} if "lr" in given else given
    o = AdafactorOptions(**scalars, rounding_seed=3, weight_decay=0.1, found_inf=torch.zeros((), device=device))
    basis = torch.linalg.qr(torch.randn(512, 64, device=device))[0].to(BF16).contiguous()
    shapes, calls, params = [(1376, 64), (1376, 512)], [], []  # of R, and of a weight at full rank
    for shape in shapes:
        param, grad = (torch.randn((1376, 512), device=device).to(BF16) for _ in range(2))
        state = AdafactorState.zeros(shape, first_moment=o.beta1 is not None, device=device)
        params.append(param)
        if shape == (1376, 512):
            calls.append(partial(adafactor_update, param, grad, state, o))
        else:
            calls.append(
                partial(galore_adafactor_update, param, grad, basis, state, o, side="right", scale=0.25, backend=name)
            )
    for call in calls:
        call()
    before = [param.clone() for param in params]
    with waiting_is_an_error():
        for call in calls:
            call()
    assert not any(torch.equal(param, old) for param, old in zip(params, before, strict=True))


# --- one pass against four launches


@pytest.mark.parametrize("basis_format", BASES)
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("shape", SHAPES[:2])
def test_one_pass_and_four_launches_agree(
    device: torch.device, one_pass: OnePass, shape: tuple[int, int, int], side: str, basis_format: str | None
) -> None:
    count = enough_for_one_pass(shape[0], device)
    cases = [Case(*shape, side, seed, basis_format=basis_format) for seed in range(count)]
    o, cpu_options = options_on(device, weight_decay=0.1), options(weight_decay=0.1)
    results = []
    for split in (False, True):
        if split:
            one_pass.take_away()
        there = [case.on(device) for case in cases]
        batch = update_together(there, o, "cuda")
        assert one_pass.takes(batch) is not split, "the shapes don't take the path that this is about"
        results.append(there)
    for i in (0, count - 1):
        exact, bound = cases[i].exact(cpu_options)
        for there in results:
            assert_close(there[i].param.cpu(), exact, bound, f"param {i}")
    for together, split_up in zip(*results, strict=True):
        for key in ("exp_avg", "exp_avg_sq"):
            codes = [getattr(case.state, key).cpu() for case in (together, split_up)]
            assert_codes_almost_equal(codes[0], codes[1], tolerances.EQUAL_CODES, key)


@pytest.mark.parametrize("basis_format", BASES)
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("shape", [*SHAPES, (2048, 1024, 256), (2048, 1024, 1024)])  # several tiles of the basis
def test_a_device_follows_float64_and_the_reference(
    device: torch.device, name: str, shape: tuple[int, int, int], side: str, basis_format: str | None
) -> None:
    case, o = Case(*shape, side, 1, basis_format=basis_format), options(weight_decay=0.1)
    exact, bound = case.exact(o)
    got, reference = case.on(device), case.on(torch.device("cpu"))
    got.update(options_on(device, weight_decay=0.1), name)
    reference.update(o, "reference")
    assert_close(got.param.cpu(), exact, bound, "param")
    for key in ("exp_avg", "exp_avg_sq"):
        codes = getattr(reference.state, key)
        assert_codes_almost_equal(getattr(got.state, key).cpu(), codes, tolerances.EQUAL_CODES, key)


# --- moments in another basis


@pytest.mark.parametrize("ranks", [(128, 128), (33, 129), (1024, 512)])  # of the old basis and of the new one
@pytest.mark.parametrize("eight_bit", [True, False])
def test_rotated_moments_are_the_references_and_nothing_waits(
    device: torch.device, name: str, ranks: tuple[int, int], eight_bit: bool
) -> None:
    rng = torch.Generator().manual_seed(1)
    old, new = (torch.linalg.qr(torch.randn(2048, rank, generator=rng))[0] for rank in ranks)
    rotation, state = (old.T @ new).contiguous(), warm_state((1037, ranks[0]), eight_bit=eight_bit)
    expected = rotate_moments(state, rotation, beta1=0.9, beta2=0.999, backend="reference")
    there, turn = on_the(device, state), rotation.to(device)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.cuda.set_sync_debug_mode("error")
        got = rotate_moments(there, turn, beta1=0.9, beta2=0.999, backend=name)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for key in ("exp_avg", "exp_avg_sq"):
        value, reference = getattr(got, key).cpu(), getattr(expected, key)
        if eight_bit:
            assert_codes_almost_equal(value, reference, tolerances.EQUAL_CODES, key)
        else:
            assert_close(value, f64(reference), 1e-5 * float(reference.abs().max()), key)


# --- size


def test_more_elements_than_a_32_bit_index_reaches(device: torch.device, name: str) -> None:
    count = 2**31 + BLOCK_SIZE + 1  # a last block of one element
    if torch.cuda.mem_get_info(device)[0] < 20e9:
        pytest.skip("needs 20 GB of free device memory")
    param = torch.empty(count, dtype=BF16, device=device).normal_()
    grad = torch.empty(count, dtype=BF16, device=device).normal_()
    state = AdamState.zeros((count,), eight_bit=True, device=device)
    o = options_on(device, weight_decay=0.1)
    # Blocks at the ends, and where 2^30 and 2^31 elements are passed.
    windows = [slice(at, min(at + 4 * BLOCK_SIZE, count)) for at in (0, 2**30 - 512, 2**31 - 512)]
    alone = [param[window].clone() for window in windows]
    adam8bit_update(param, grad, state, o, backend=name)
    for window, expected in zip(windows, alone, strict=True):
        expected_state = AdamState.zeros((expected.numel(),), eight_bit=True, device=device)
        adam8bit_update(expected, grad[window].clone(), expected_state, o, backend=name)
        assert_same_bits(param[window], expected, f"param from {window.start}")
        for key in ("exp_avg", "exp_avg_sq"):
            assert_same_bits(getattr(state, key)[window], getattr(expected_state, key), f"{key} from {window.start}")
            blocks = slice(window.start // BLOCK_SIZE, -(-window.stop // BLOCK_SIZE))
            absmax, expected_absmax = (getattr(s, f"{key}_absmax") for s in (state, expected_state))
            assert_same_bits(absmax[blocks], expected_absmax, f"{key}_absmax from {window.start}")


# --- errors


def test_tensors_on_two_devices_are_refused_before_anything_changes(device: torch.device, name: str) -> None:
    cpu = torch.device("cpu")
    for stray in ("grad", "basis", "state"):
        case = Case(*SHAPES[2], "right", 1)
        there = case.on(device)
        setattr(there, stray, getattr(case.on(cpu), stray))
        with pytest.raises(ValueError, match=r"must be on cuda"):
            there.update(options_on(device), name)
        assert_same(there, case, stray)
    there = Case(*SHAPES[2], "right", 1).on(device)
    with pytest.raises(ValueError, match=r"lr must be on cuda"):
        there.update(options(), name)
    assert_same(there, Case(*SHAPES[2], "right", 1))


def test_a_backend_refuses_the_other_device(device: torch.device, name: str) -> None:
    case = Case(*SHAPES[2], "right", 1)
    there = case.on(device)
    with pytest.raises(RuntimeError, match="cpu tensors only"):
        there.update(options_on(device), "cpu")
    here = case.on(torch.device("cpu"))
    with pytest.raises(RuntimeError, match=f"{name}: "):
        here.update(options(), name)
    assert_same(there, case)
    assert_same(here, case)
