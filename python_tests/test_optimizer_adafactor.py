"""``GaLoreFusedAdafactor``: galore_torch's training, its own options, and what its state consists of."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from compat_cases import (
    ADAFACTOR_OPTIONS,
    IMPORT_AT,
    PARITY,
    RANK,
    STEPS,
    differences,
    galore_groups,
    galore_torch_run,
    injected,
    llama,
    mean_of_last,
    weights,
)
from compat_cases import train as train_llama
from optimizer_cases import SHAPES, assert_same_snapshot, clone_params, make_params, set_grads, snapshot, train
from torch import nn
from update_cases import assert_same_bits

from galore_kernels import GaLoreFusedAdafactor, LayerwiseOptimizer, ops
from galore_kernels.compat import import_state_dict
from galore_kernels.compat.galore_torch import GaLoreAdafactor
from galore_kernels.subspace import refresh_basis

#: Everything is a default of Adafactor's: the step sizes too.
OWN: dict[str, Any] = {"rank": 16, "update_proj_gap": 3, "weight_decay": 0.1}

GIVEN: dict[str, Any] = {"lr": 1e-2, "relative_step": False, "scale_parameter": False}

# ---------------------------------------------------------------------- parity


@pytest.mark.parametrize(
    ("rank", "case"), [(RANK, "given"), (RANK, "relative"), pytest.param(None, "given", marks=pytest.mark.slow)]
)
def test_300_steps_end_at_galore_torchs_weights(rank: int | None, case: str) -> None:
    theirs, model = galore_torch_run(rank, case), llama()
    optimizer = GaLoreAdafactor(galore_groups(model, rank), **ADAFACTOR_OPTIONS[case])
    with injected(theirs.bases) as found:
        losses = train_llama(model, optimizer, range(STEPS))
    assert len(found) == len(theirs.bases) == (0 if rank is None else 5 * 14)  # 5 refreshes of 14 matrices
    assert max(differences(weights(model), theirs.weights[STEPS])) <= PARITY
    assert min(differences(theirs.weights[0], theirs.weights[STEPS])) >= 1000 * PARITY
    assert mean_of_last(losses) < losses[0] - 1


@pytest.mark.parametrize("case", [pytest.param("given", marks=pytest.mark.slow), "relative"])
def test_a_run_that_moves_over_ends_at_galore_torchs_weights(case: str) -> None:
    theirs, model = galore_torch_run(RANK, case), llama(seed=1)
    model.load_state_dict(theirs.model)
    # With other options than theirs, which become theirs.
    optimizer = GaLoreFusedAdafactor(galore_groups(model, RANK), beta1=0.5, lr=1.0, relative_step=False)
    import_state_dict(optimizer, theirs.optimizer)
    with injected(theirs.bases[theirs.found_before :]):
        train_llama(model, optimizer, range(IMPORT_AT, STEPS))
    assert max(differences(weights(model), theirs.weights[STEPS])) <= PARITY


@pytest.mark.parametrize(
    ("case", "wrong"),
    [
        ("given", {"clip_threshold": 0.98}),
        ("given", {"decay_rate": -0.79}),
        ("relative", {"beta1": 0.89}),
        ("relative", {"eps": (1e-30, 0.11)}),
    ],
    ids=str,
)
def test_the_comparison_sees_other_settings(case: str, wrong: dict[str, Any]) -> None:
    theirs, model = galore_torch_run(RANK, case), llama()
    optimizer = GaLoreAdafactor(galore_groups(model, RANK), **{**ADAFACTOR_OPTIONS[case], **wrong})
    with injected(theirs.bases):
        train_llama(model, optimizer, range(IMPORT_AT))
    assert max(differences(weights(model), theirs.weights[IMPORT_AT])) > PARITY


# ---------------------------------------------------------------------- steps


@pytest.mark.parametrize("options", [{}, {**GIVEN, "beta1": 0.9, "clip_threshold": 0.5}], ids=["own", "given"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_is_bitwise_the_operations_called_by_hand(backend: str, dtype: torch.dtype, options: dict[str, Any]) -> None:
    params = make_params(dtype=dtype)
    by_hand = clone_params(params)
    optimizer = GaLoreFusedAdafactor(params.values(), **OWN, **options, refresh_method="svd", backend=backend)
    train(optimizer, params, range(5))
    given = {key: value for key, value in options.items() if key != "lr"}
    lr = torch.tensor(options["lr"], dtype=torch.float64) if "lr" in options else None
    scalars = ops.AdafactorOptions(lr, weight_decay=0.1, **given)
    states: dict[str, ops.AdafactorState] = {}
    bases: dict[str, torch.Tensor] = {}
    for step in range(5):
        set_grads(by_hand, step)
        for name, param in by_hand.items():
            weight, grad, first = param.detach(), param.grad, "beta1" in options
            assert grad is not None
            if param.dim() == 1:
                state = states.setdefault(name, ops.AdafactorState.zeros(tuple(param.shape), first_moment=first))
                ops.adafactor_update(weight, grad, state, scalars, backend=backend)
                continue
            side = "right" if param.shape[0] >= param.shape[1] else "left"
            if step % 3 == 0:
                oriented = grad if side == "right" else grad.T
                bases[name] = refresh_basis(oriented, 16, method="svd").to(dtype)
            state = states.setdefault(name, ops.AdafactorState.zeros((max(param.shape), 16), first_moment=first))
            ops.galore_adafactor_update(
                weight, grad, bases[name], state, scalars, side=side, scale=0.25, backend=backend
            )
    for name, param in by_hand.items():
        assert_same_bits(params[name].detach(), param.detach(), name)


def test_options_are_the_groups_own() -> None:
    params = make_params({"a": (40, 20), "b": (40, 20)})
    groups = [{"params": [params["a"]], "beta1": 0.9, "lr": 0.1, "relative_step": False}, {"params": [params["b"]]}]
    optimizer = GaLoreFusedAdafactor(groups, **OWN)
    train(optimizer, params, range(2))
    assert "exp_avg" in optimizer.state[params["a"]]
    assert "exp_avg" not in optimizer.state[params["b"]]
    assert "lr 0.1; " in repr(optimizer)
    assert "lr by the step; " in repr(optimizer)


def test_schedulers_need_a_learning_rate() -> None:
    params = make_params()
    with pytest.raises(TypeError):
        torch.optim.lr_scheduler.LambdaLR(GaLoreFusedAdafactor(params.values()), lambda _: 0.5)
    halved, constant = clone_params(params), clone_params(params)
    optimizer = GaLoreFusedAdafactor(halved.values(), **OWN, **GIVEN)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 0.5)
    expected = GaLoreFusedAdafactor(constant.values(), **OWN, **{**GIVEN, "lr": torch.tensor(0.005)})
    train(optimizer, halved, range(3))
    train(expected, constant, range(3))
    for name, param in constant.items():
        torch.testing.assert_close(halved[name], param)


@pytest.mark.parametrize("options", [{}, {"beta1": 0.9, "warmup_init": True}], ids=["own", "warm-up"])
def test_its_own_step_sizes_resume_bitwise(options: dict[str, Any]) -> None:
    params = make_params()
    optimizer = GaLoreFusedAdafactor(list(params.items()), **OWN, **options, seed=3)
    train(optimizer, params, range(4))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    copies = clone_params(params)
    # Whether there is a first moment comes back with the state, as every option does.
    resumed = GaLoreFusedAdafactor(list(copies.items()), rank=16, beta1=0.5)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for own, own_params in ((optimizer, params), (resumed, copies)):
        train(own, own_params, range(4, 8))
    assert_same_snapshot(snapshot(resumed, copies), snapshot(optimizer, params))


@pytest.mark.parametrize("options", [OWN, {**OWN, **GIVEN, "beta1": 0.9}], ids=["own", "given"])
def test_layerwise_sums_of_projections_make_the_steps_of_sums_of_gradients(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 60, bias=False), nn.Tanh(), nn.Linear(60, 40, bias=False))
    ends = []
    for layerwise in (False, True):
        own = copy.deepcopy(model)
        plain: Any = GaLoreFusedAdafactor(own.parameters(), **options)
        optimizer = LayerwiseOptimizer(plain, accumulation_steps=2) if layerwise else plain
        for step in range(7):
            inputs = torch.randn(16, 40, generator=torch.Generator().manual_seed(step))
            for _ in range(2):  # the same: a first basis is found in the first alone
                own(inputs).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        ends.append(dict(own.named_parameters()))
    for name, param in ends[0].items():
        torch.testing.assert_close(ends[1][name], param, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(param, model.get_parameter(name), atol=1e-3)


@pytest.mark.parametrize(("options", "lr"), [({}, 0.1), (GIVEN, None)])
def test_a_learning_rate_that_does_not_belong_there_is_seen_in_every_step(options: dict[str, Any], lr: Any) -> None:
    params = make_params()
    optimizer = GaLoreFusedAdafactor(params.values(), **OWN, **options)
    train(optimizer, params, range(5))
    before = snapshot(optimizer, params)
    optimizer.param_groups[0]["lr"] = lr
    with pytest.raises(ValueError, match=r"lr=.* in param group 0: expected .* relative_step"):
        optimizer.step()
    optimizer.param_groups[0]["lr"] = options.get("lr")
    assert_same_snapshot(snapshot(optimizer, params), before)
    optimizer.step()


# ---------------------------------------------------------------------- state


def test_the_second_moment_takes_a_row_and_a_column() -> None:
    params = make_params()
    optimizer = GaLoreFusedAdafactor(params.values(), **OWN)
    promised = optimizer.state_bytes()
    train(optimizer, params, [0])
    assert optimizer.state_bytes() == promised
    for name, shape in SHAPES.items():
        state = optimizer.state[params[name]]
        moments = {key: tuple(value.shape) for key, value in state.items() if key.startswith("exp_avg")}
        if len(shape) == 1:
            assert moments == {"exp_avg_sq": shape}
        else:
            assert moments == {"exp_avg_sq_row": (max(shape),), "exp_avg_sq_col": (16,)}
    # 300 + 16 numbers and a basis of 64 x 16, against two moments of 300 x 16 more.
    assert promised < 40_000


def test_chosen_ranks_follow_the_budget() -> None:
    params = make_params({"tall": (300, 64), "wide": (64, 300)})
    optimizer = GaLoreFusedAdafactor(params.values(), rank="auto", rank_budget=20_000, update_proj_gap=3)
    train(optimizer, params, range(4))
    assert optimizer.state_bytes() <= 20_000
    assert {entry["rank"] % 16 for entry in optimizer.subspace_report().values()} == {0}


def test_full_rank_convolutions_keep_means_over_the_last_two_dimensions() -> None:
    params = make_params({"kernel": (4, 3, 5, 6)})
    optimizer = GaLoreFusedAdafactor(params.values(), rank=None)
    train(optimizer, params, range(2))
    state = optimizer.state[params["kernel"]]
    assert state["exp_avg_sq_row"].shape == (4, 3, 5)
    assert state["exp_avg_sq_col"].shape == (4, 3, 6)


# ---------------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 0.1}, r"lr=0\.1 in .*: expected None with relative_step=True; pass relative_step=False"),
        ({"relative_step": False}, "lr=None in .*: expected a learning rate with relative_step=False"),
        ({**GIVEN, "lr": -1.0}, r"lr=-1\.0 in .*: expected a finite number >= 0"),
        ({**GIVEN, "warmup_init": True}, "warmup_init=True in .*: expected False with relative_step=False"),
        ({"scale_parameter": 1}, "scale_parameter=1 in .*: expected True or False"),
        ({"eps": 1e-30}, "eps=1e-30 in .*: expected two numbers >= 0"),
        ({"eps": (1e-30, -1.0)}, "eps=.* in .*: expected two numbers >= 0"),
        ({"clip_threshold": 0.0}, r"clip_threshold=0\.0 in .*: expected a number > 0"),
        ({"decay_rate": 0.8}, r"decay_rate=0\.8 in .*: expected a finite number <= 0"),
        ({"beta1": 1.0}, r"beta1=1\.0 in .*: expected a number in \[0, 1\), or None"),
        ({"betas": (0.9, 0.99)}, "betas"),
        ({"moments_on_refresh": "rotate", **GIVEN}, "moments_on_refresh='rotate' in .*: expected 'keep' or 'reset'"),
        ({"moments_on_refresh": "reset"}, "moments_on_refresh='reset' in .*: expected 'keep'; "),
        ({"moments_on_refresh": "kept"}, "moments_on_refresh='kept' in .*: expected one of keep"),
        ({"proj_type": "rigth"}, 'proj_type=.*did you mean "right"'),
    ],
)
def test_a_bad_option(options: dict[str, Any], message: str) -> None:
    error = TypeError if "betas" in options else ValueError
    with pytest.raises(error, match=message):
        GaLoreFusedAdafactor([nn.Parameter(torch.zeros(2))], **options)
    if error is ValueError:
        optimizer = GaLoreFusedAdafactor([nn.Parameter(torch.zeros(2))])
        with pytest.raises(ValueError, match="param group 1"):
            optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))], **options})


def test_a_device_backend_says_that_it_does_not_serve_the_cpu() -> None:
    params = make_params()
    optimizer = GaLoreFusedAdafactor(params.values(), backend="triton")
    set_grads(params, 0)
    with pytest.raises(RuntimeError, match="'triton' can't serve galore_adafactor_update on cpu"):
        optimizer.step()
