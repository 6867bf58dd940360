"""What a step computes: against plain restatements, against galore_torch, and when the subspace is refreshed."""

from __future__ import annotations

import math
from typing import Any

import pytest
import tolerances
import torch
from compat_cases import observed_projectors, with_positive_pivots
from optimizer_cases import OPTIMIZERS, OPTIONS, SHAPES, clone_params, make_params, set_grads, snapshot, train
from torch import Tensor, nn
from update_cases import assert_same_bits

from galore_kernels import GaLoreFusedAdam8bit, GaLoreFusedAdamW, ops
from galore_kernels.optim import refresh
from galore_kernels.optim.galore import GaLoreAdam
from galore_kernels.subspace import PROJ_TYPES, Subspace, find_subspaces, projection_side, refresh_basis

MATRIX_SHAPES = [(40, 24), (24, 40)]  # tall, wide


def separated_gradient(shape: tuple[int, int], step: int) -> Tensor:
    """A gradient whose singular values fall by 0.7 each, so that its singular vectors are well determined."""
    rng = torch.Generator().manual_seed(step)
    left, right = (torch.linalg.qr(torch.randn(n, 24, generator=rng, dtype=torch.float64)).Q for n in shape)
    return (left * 0.7 ** torch.arange(24) @ right.T).float()


def run(optimizer: torch.optim.Optimizer, weight: nn.Parameter, steps: int) -> Tensor:
    """The weight's change over the given steps."""
    before = weight.detach().clone()
    for step in range(steps):
        weight.grad = separated_gradient((weight.shape[0], weight.shape[1]), step)
        optimizer.step()
    return weight.detach() - before


def assert_parallel_runs(got: Tensor, expected: Tensor) -> None:
    difference = torch.linalg.vector_norm(got.double() - expected.double())
    assert float(difference / torch.linalg.vector_norm(expected.double())) <= tolerances.EXACT_BASES


def galore_in_float64(weight: Tensor, steps: int, proj_type: str, options: dict[str, Any]) -> Tensor:
    """GaLore with Adam written out (arXiv 2403.03507, algorithm 2), in float64: the weight's change."""
    w, rank = weight.double(), options["rank"]
    beta1, beta2 = options["betas"]
    m: Any = 0.0
    v: Any = 0.0
    left, right = torch.eye(w.shape[0], dtype=torch.float64), torch.eye(w.shape[1], dtype=torch.float64)
    side = projection_side(proj_type, *weight.shape)
    for step in range(steps):
        g = separated_gradient((w.shape[0], w.shape[1]), step).double()
        if step % options["update_proj_gap"] == 0:
            u, _, vh = torch.linalg.svd(g)
            if side in ("left", "full"):
                left = with_positive_pivots(u[:, :rank])
            if side in ("right", "full"):
                right = with_positive_pivots(vh[:rank].T)
        r = left.T @ g @ right
        m = beta1 * m + (1 - beta1) * r
        v = beta2 * v + (1 - beta2) * r * r
        size = options["lr"] * math.sqrt(1 - beta2 ** (step + 1)) / (1 - beta1 ** (step + 1))
        w = w - size * options["scale"] * left @ (m / (v.sqrt() + options["eps"])) @ right.T
        w = w * (1 - options["lr"] * options["weight_decay"])
    return w - weight.double()


@pytest.mark.parametrize("shape", MATRIX_SHAPES)
@pytest.mark.parametrize("proj_type", PROJ_TYPES)
def test_equals_galore_in_float64_over_refreshes(backend: str, proj_type: str, shape: tuple[int, int]) -> None:
    options: dict[str, Any] = {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.3, "rank": 6}
    options |= {"update_proj_gap": 3, "scale": 0.7}
    weight = make_params({"w": shape})["w"]
    expected = galore_in_float64(weight.detach().clone(), 8, proj_type, options)  # refreshed at 0, 3 and 6
    optimizer = GaLoreFusedAdamW([weight], **options, proj_type=proj_type, refresh_method="svd", backend=backend)
    assert_parallel_runs(run(optimizer, weight, 8), expected)


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])  # off and on
@pytest.mark.parametrize(
    ("shape", "proj_type"),
    [
        ((40, 24), "std"),
        ((24, 40), "std"),
        ((40, 24), "reverse_std"),  # tall only: galore_torch decides the side anew on the way back
        ((24, 40), "right"),
        ((40, 24), "left"),
        ((24, 40), "full"),
    ],
)
def test_equals_galore_torch_over_refreshes(
    backend: str, shape: tuple[int, int], proj_type: str, weight_decay: float
) -> None:
    params = make_params({"w": shape})
    copied = clone_params(params)
    # A large eps: with "full", R is diagonal after a refresh but for rounding, which a small one turns into steps.
    common: dict[str, Any] = {"lr": 0.02, "betas": (0.9, 0.99), "eps": 1e-3, "weight_decay": weight_decay}
    group = {"rank": 6, "update_proj_gap": 7, "scale": 0.5, "proj_type": proj_type}
    rival = pytest.importorskip("galore_torch").GaLoreAdamW(
        [{"params": [copied["w"]], **group}], **common, no_deprecation_warning=True
    )
    ours = GaLoreFusedAdamW([{"params": [params["w"]], **group}], **common, refresh_method="svd", backend=backend)
    # Moments carried over a refresh belong to the sign of their singular vector, which LAPACK chooses freely.
    with observed_projectors():
        expected = run(rival, copied["w"], 20)  # refreshed at 0, 7 and 14
    assert_parallel_runs(run(ours, params["w"], 20), expected)


@pytest.mark.parametrize("optimizer_class", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_is_bitwise_the_operations_called_by_hand(
    backend: str, optimizer_class: type[GaLoreAdam], dtype: torch.dtype
) -> None:
    params = make_params(dtype=dtype)
    by_hand = clone_params(params)
    lr = 0.013  # as a float32, it would give another step size
    optimizer = optimizer_class(params.values(), **{**OPTIONS, "lr": lr}, refresh_method="svd", backend=backend)
    train(optimizer, params, range(7))
    options = ops.AdamOptions(torch.tensor(lr, dtype=torch.float64), weight_decay=OPTIONS["weight_decay"])
    eight_bit = optimizer_class is GaLoreFusedAdam8bit
    states: dict[str, ops.AdamState] = {}
    bases: dict[str, Tensor] = {}
    for step in range(7):
        set_grads(by_hand, step)
        for name, param in by_hand.items():
            assert param.grad is not None
            weight = param.detach()
            if name in ("table", "bias"):
                large = eight_bit and name == "table"
                state = states.setdefault(name, ops.AdamState.zeros(tuple(param.shape), eight_bit=large))
                ops.adam8bit_update(weight, param.grad, state, options, backend=backend)
                continue
            side = "left" if name == "wide" else "right"
            if step % 3 == 0:
                oriented = param.grad.T if side == "left" else param.grad
                bases[name] = refresh_basis(oriented, 16, method="svd").to(dtype)
            large = eight_bit and name != "small"
            state = states.setdefault(name, ops.AdamState.zeros((max(param.shape), 16), eight_bit=large))
            ops.galore_update(weight, param.grad, bases[name], state, options, side=side, scale=0.25, backend=backend)
    for name, param in by_hand.items():
        assert_same_bits(params[name].detach(), param.detach(), name)
        assert_same_bits(optimizer.state[params[name]]["exp_avg"], states[name].exp_avg, f"{name} exp_avg")
        assert ("exp_avg_absmax" in optimizer.state[params[name]]) == (states[name].exp_avg_absmax is not None)


class RefreshSpy:
    """Counts the refreshes: at which call of ``step`` each took place, and with which seed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.step = 0
        self.calls: list[tuple[int, int]] = []
        monkeypatch.setattr(refresh, "find_subspaces", self)

    def __call__(self, grads: list[Tensor], rank: int, **options: Any) -> list[Subspace]:
        self.calls += [(self.step, seed) for seed in options["seeds"]]
        return find_subspaces(grads, rank, **options)

    def train(self, optimizer: torch.optim.Optimizer, params: dict[str, nn.Parameter], grads: list[float]) -> list[int]:
        """Takes steps with gradients multiplied by ``grads``; returns the steps with a refresh."""
        self.calls.clear()
        for self.step, factor in enumerate(grads):
            set_grads(params, self.step)
            for param in params.values():
                assert param.grad is not None
                param.grad *= factor
            optimizer.step()
        return [step for step, _ in self.calls]


@pytest.mark.parametrize("gap", [1, 3, 4])
def test_refreshes_at_every_multiple_of_the_gap(backend: str, gap: int, monkeypatch: pytest.MonkeyPatch) -> None:
    params = make_params({"w": (40, 30)})
    optimizer = GaLoreFusedAdamW(params.values(), rank=4, update_proj_gap=gap, backend=backend)
    spy = RefreshSpy(monkeypatch)
    assert spy.train(optimizer, params, [1.0] * 9) == list(range(0, 9, gap))
    assert len({seed for _, seed in spy.calls}) == len(spy.calls)


def test_sketches_differ_by_parameter_and_by_the_optimizers_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    spy = RefreshSpy(monkeypatch)
    seeds = []
    for seed in (0, 0, 1):
        params = make_params({"a": (40, 30), "b": (40, 30)})
        spy.train(GaLoreFusedAdamW(params.values(), rank=4, seed=seed), params, [1.0])
        seeds.append([seed for _, seed in spy.calls])
    assert seeds[0] == seeds[1]
    assert len({*seeds[0], *seeds[2]}) == 4


def test_a_zero_first_gradient_finds_its_basis_at_the_next_step(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    params = make_params({"w": (40, 30)})
    before = params["w"].detach().clone()
    optimizer = GaLoreFusedAdamW(params.values(), rank=4, update_proj_gap=5, backend=backend)
    spy = RefreshSpy(monkeypatch)
    assert spy.train(optimizer, params, [0.0, 0.0, 1.0, 1.0, 1.0, 1.0]) == [0, 1, 2, 5]
    assert float(optimizer.state[params["w"]]["step"]) == 6
    assert not torch.equal(params["w"], before)


def test_a_zero_gradient_at_a_refresh_keeps_the_basis(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    params = make_params({"w": (40, 30)})
    optimizer = GaLoreFusedAdamW(params.values(), rank=4, update_proj_gap=2, backend=backend)
    spy = RefreshSpy(monkeypatch)
    spy.train(optimizer, params, [1.0, 1.0])
    basis = optimizer.state[params["w"]]["basis"].clone()
    spy.train(optimizer, params, [0.0])
    assert [step for step, _ in spy.calls] == [0]
    assert_same_bits(optimizer.state[params["w"]]["basis"], basis, "basis")


@pytest.mark.parametrize("optimizer_class", OPTIMIZERS)
@pytest.mark.parametrize("method", ["randomized", "svd"])
def test_noise_columns_of_a_rank_deficient_gradient_move_no_weight(
    backend: str, optimizer_class: type[GaLoreAdam], method: str
) -> None:
    weight = nn.Parameter(torch.zeros(300, 64))
    left, right = torch.randn(300, 2), torch.randn(2, 64)
    optimizer = optimizer_class([weight], rank=16, refresh_method=method, update_proj_gap=2, backend=backend)
    for step in range(4):
        weight.grad = left @ (right * (step + 1.0))
        optimizer.step()
    onto = torch.linalg.qr(right.T).Q
    outside = weight.detach() - weight.detach() @ onto @ onto.T
    # Measured on galore_torch: only 13 % of the update's energy stays in the gradient's subspace.
    assert float(outside.square().sum()) <= 1e-8 * float(weight.detach().square().sum())
    assert float(weight.detach().abs().max()) > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_bases_have_the_weights_dtype_and_moments_their_own(backend: str, dtype: torch.dtype) -> None:
    params = make_params(dtype=dtype)
    optimizer = GaLoreFusedAdam8bit(params.values(), **OPTIONS, backend=backend)
    train(optimizer, params, range(4))
    for name in SHAPES:
        state = optimizer.state[params[name]]
        assert state.get("basis", params[name]).dtype == dtype
        assert state["exp_avg"].dtype == (torch.uint8 if name in ("tall", "wide", "table") else torch.float32)
        assert params[name].dtype == dtype
        assert bool(torch.isfinite(params[name]).all())


def test_stochastic_rounding_is_determined_by_the_seed(backend: str) -> None:
    results = {}
    for key, seed, stochastic in (("a", 0, True), ("b", 0, True), ("other", 1, True), ("nearest", 0, False)):
        params = make_params(dtype=torch.bfloat16)
        optimizer = GaLoreFusedAdamW(
            params.values(), rank=None, seed=seed, stochastic_rounding=stochastic, backend=backend
        )
        train(optimizer, params, range(3))
        results[key] = params["tall"].detach()
    assert_same_bits(results["a"], results["b"], "equal seeds")
    assert not torch.equal(results["a"], results["other"])
    assert not torch.equal(results["a"], results["nearest"])


@pytest.mark.parametrize("rank", [None, 8])
def test_stochastic_rounding_keeps_updates_too_small_for_bfloat16(backend: str, rank: int | None) -> None:
    # Ones whose neighbours are 2^-8 and 2^-7 away, moved by about 1e-4 a step: to nearest, nothing ever happens.
    moved = {}
    for stochastic in (False, True):
        pair = [nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16)) for _ in range(2)]
        optimizer = GaLoreFusedAdamW(
            pair, lr=1e-4, rank=rank, scale=8.0, stochastic_rounding=stochastic, backend=backend
        )
        for _ in range(20):
            for weight in pair:
                weight.grad = torch.ones_like(weight)
            optimizer.step()
        moved[stochastic] = [1 - weight.detach().float() for weight in pair]
    assert float(moved[False][0].abs().max()) == 0
    # Full rank: 20 steps of lr. Projected: the basis is 1/8 everywhere, so a step is lr * 8 * 1/8.
    assert float(moved[True][0].mean()) == pytest.approx(20 * 1e-4, rel=0.15)
    assert not torch.equal(*moved[True])  # two parameters, two streams


@pytest.mark.parametrize("optimizer_class", OPTIMIZERS)
def test_two_runs_are_bitwise_equal_and_leave_the_global_generator_alone(
    backend: str, optimizer_class: type[GaLoreAdam]
) -> None:
    generator = torch.get_rng_state()
    snapshots = []
    for _ in range(2):
        params = make_params()
        optimizer = optimizer_class(params.values(), **OPTIONS, backend=backend)
        train(optimizer, params, range(5))
        snapshots.append(snapshot(optimizer, params))
    for key, value in snapshots[0].items():
        if isinstance(value, Tensor):
            assert_same_bits(snapshots[1][key], value, key)
    assert torch.equal(torch.get_rng_state(), generator)


@pytest.mark.parametrize("optimizer_class", OPTIMIZERS)
def test_trains_a_small_network(backend: str, optimizer_class: type[GaLoreAdam]) -> None:
    x = torch.randn(256, 32)
    y = torch.tanh(x @ torch.randn(32, 16) / 4)
    model = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 16))
    optimizer = optimizer_class(model.parameters(), lr=0.02, rank=8, update_proj_gap=20, scale=1.0, backend=backend)
    losses = []
    for _ in range(200):
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.04 * losses[0]
