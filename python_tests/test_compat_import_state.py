"""Others' optimizer state in ours: training goes on as theirs would."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from compat_cases import (
    IMPORT_AT,
    MATRICES,
    OPTIONS,
    PARITY,
    RANK,
    STEPS,
    Params,
    as_plain,
    differences,
    galore_groups,
    galore_torch_class,
    galore_torch_run,
    groups_of,
    injected,
    llama,
    observed_projectors,
    ours,
    trained_theirs,
    weights,
)
from compat_cases import train as train_llama
from optimizer_cases import assert_same_snapshot, clone_params, flatten, make_params, set_grads, snapshot, train
from torch import Tensor, nn

from galore_kernels import GaLoreFusedAdam8bit, GaLoreFusedAdamW
from galore_kernels.compat import import_state_dict
from galore_kernels.compat.galore_torch import GaLoreAdamW, GaLoreAdamW8bit
from galore_kernels.ops import dequantize_blockwise
from galore_kernels.optim import refresh
from galore_kernels.optim.galore import GaLoreAdam
from galore_kernels.quantizers import dequantize_basis
from galore_kernels.subspace import Subspace, find_subspaces


def through_a_file(state_dict: dict[str, Any]) -> dict[str, Any]:
    buffer = io.BytesIO()
    torch.save(state_dict, buffer)
    buffer.seek(0)
    loaded: dict[str, Any] = torch.load(buffer, weights_only=False)
    return loaded


# ---------------------------------------------------------------------- moving over in mid-run


@pytest.mark.parametrize(("rank", "form"), [(RANK, through_a_file), (RANK, as_plain), (None, through_a_file)])
def test_a_run_that_moves_over_ends_at_galore_torchs_weights(
    rank: int | None, form: Callable[[dict[str, Any]], dict[str, Any]]
) -> None:
    theirs, model = galore_torch_run(rank), llama(seed=1)
    model.load_state_dict(theirs.model)
    optimizer = GaLoreAdamW(galore_groups(model, rank), lr=1.0)
    optimizer.load_state_dict(form(theirs.optimizer))
    with injected(theirs.bases[theirs.found_before :]) as found:
        train_llama(model, optimizer, range(IMPORT_AT, STEPS))
    assert len(found) == len(theirs.bases) - theirs.found_before
    assert max(differences(weights(model), theirs.weights[STEPS])) <= PARITY
    assert min(differences(theirs.weights[IMPORT_AT], theirs.weights[STEPS])) >= 100 * PARITY


def test_an_8_bit_run_that_moves_over_stays_within_what_8_bits_differ_by() -> None:
    pytest.importorskip("bitsandbytes")
    theirs_model = llama(hidden=64, intermediate=256)
    theirs = galore_torch_class(True)(galore_groups(theirs_model, 16), **OPTIONS[RANK])
    model = llama(hidden=64, intermediate=256, seed=1)
    with observed_projectors():
        train_llama(theirs_model, theirs, range(50), 100)
        start = weights(theirs_model)
        model.load_state_dict(theirs_model.state_dict())
        optimizer = GaLoreAdamW8bit(galore_groups(model, 16), lr=1.0)
        optimizer.load_state_dict(theirs.state_dict())
        expected = train_llama(theirs_model, theirs, range(50, 100), 100)
    got = train_llama(model, optimizer, range(50, 100), 100)
    assert got[0] == expected[0]
    assert max(abs(a - b) for a, b in zip(got, expected, strict=True)) <= 0.02
    each = differences(weights(model), weights(theirs_model))
    moved = differences(start, weights(theirs_model))
    assert sum(each) <= sum(moved) / 10


@pytest.mark.parametrize("eight_bit", [False, True])
@pytest.mark.parametrize("proj_type", ["std", "reverse_std", "left", "right", "full"])
def test_the_next_step_is_theirs(eight_bit: bool, proj_type: str) -> None:
    # galore_torch fails with reverse_std where the weight is wide and the rank not below its rows.
    theirs, params = trained_theirs(eight_bit, proj_type=proj_type)
    optimizer, copies = ours(eight_bit, params, proj_type=proj_type)
    before = {name: param.detach().clone() for name, param in copies.items()}
    import_state_dict(optimizer, theirs.state_dict())
    for own in (params, copies):
        set_grads(own, 7)  # no refresh
    theirs.step()
    optimizer.step()
    for name, param in params.items():
        change = torch.linalg.vector_norm(param.detach() - before[name])
        difference = torch.linalg.vector_norm(param.detach() - copies[name].detach())
        # Codes that are turned are rounded once more, half a code of some 2 %.
        assert difference <= (0.02 if eight_bit else 1e-4) * change, name


@pytest.mark.parametrize("steps", [1, 4, 5, 6, 10, 11])  # around the gap of 5
def test_the_next_refresh_is_when_theirs_would_be(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs, params = trained_theirs(False, steps)
    optimizer, copies = ours(False, params)
    import_state_dict(optimizer, theirs.state_dict())
    found: list[int] = []

    def counted(*args: Any, **options: Any) -> list[Subspace]:
        found.append(1)
        return find_subspaces(*args, **options)

    monkeypatch.setattr(refresh, "find_subspaces", counted)
    for step in range(steps, steps + 11):
        found.clear()
        train(optimizer, copies, [step])
        assert len(found) == (len(MATRICES) if step % 5 == 0 else 0), step


def test_options_become_theirs() -> None:
    theirs, params = trained_theirs(False)
    torch.optim.lr_scheduler.ExponentialLR(theirs, 0.9)
    theirs.param_groups[1].update(lr=0.003)
    optimizer, _ = ours(False, params, update_proj_gap=9, refresh_method="randomized")
    import_state_dict(optimizer, theirs.state_dict())
    rest, projected = optimizer.param_groups
    assert {key: rest[key] for key in ("lr", "initial_lr", "weight_decay", "rank")} == {
        "lr": 0.01, "initial_lr": 0.01, "weight_decay": 0.1, "rank": None,
    }  # fmt: skip
    expected = {"lr": 0.003, "update_proj_gap": 5, "rank": 16, "refresh_method": "randomized", "eps": 1e-6}
    assert {key: projected[key] for key in expected} == expected
    assert not {"correct_bias", "param_names"} & projected.keys()


def test_theirs_is_left_alone_and_ours_saved_and_loaded_as_ever() -> None:
    theirs, params = trained_theirs(True)
    saved = theirs.state_dict()
    kept = flatten(as_plain(saved))
    optimizer, copies = ours(True, params)
    optimizer.load_state_dict(saved)
    train(optimizer, copies, [7, 8])
    assert_same_snapshot(flatten(as_plain(saved)), kept)
    again, _ = ours(True, copies)
    again.load_state_dict(through_a_file(optimizer.state_dict()))
    assert_same_snapshot(snapshot(again, copies), snapshot(optimizer, copies))


def test_staggered_matrices_get_turns_of_their_own() -> None:
    shapes = dict.fromkeys(MATRICES, (40, 20))
    theirs, params = trained_theirs(False, 9, shapes, update_proj_gap=6)
    optimizer, copies = ours(False, params, update_proj_gap=6, refresh_schedule="staggered")
    import_state_dict(optimizer, theirs.state_dict())
    turns = [optimizer.state[copies[name]]["next_refresh"] for name in MATRICES]
    # Theirs was at 6: the second's turn, a third of the gap later, has passed at 9, or not quite.
    assert turns == [12, 14, 10]
    train(optimizer, copies, range(9, 15))
    assert {report["refreshes"] for report in optimizer.subspace_report().values()} == {2}


def test_a_first_warm_search_that_captures_little_is_followed_by_a_cold_one() -> None:
    theirs, params = trained_theirs(False, 5)
    optimizer, copies = ours(False, params, warm_start=True, refresh_method="randomized")
    import_state_dict(optimizer, theirs.state_dict())
    copies["tall"].grad = torch.randn(
        300, 64, generator=torch.Generator().manual_seed(0)
    )  # 16 of 64 hold less than half
    optimizer.step()
    state = optimizer.state[copies["tall"]]
    assert 0.2 < state["captured"] == state["captured_cold"] < 0.5


# ---------------------------------------------------------------------- formats


def test_8_bit_moments_keep_their_codes_unless_they_are_turned() -> None:
    theirs, params = trained_theirs(True)
    optimizer, copies = ours(True, params)
    import_state_dict(optimizer, theirs.state_dict())
    for name in ("tall", "wide", "table"):
        saved, state = theirs.state[params[name]], optimizer.state[copies[name]]
        for number, key, signed in ((1, "exp_avg", True), (2, "exp_avg_sq", False)):
            codes, absmax = saved[f"state{number}"], saved[f"absmax{number}"]
            if name == "wide":
                expected = dequantize_blockwise(codes, absmax, signed).T
                assert float((decoded(state, key) - expected).abs().max()) <= 0.02 * float(expected.abs().max())
            else:
                assert torch.equal(state[f"{key}_absmax"], absmax)
                raised = codes == 0 if number == 2 else torch.zeros_like(codes, dtype=torch.bool)
                assert torch.equal(state[key][~raised], codes[~raised])


def test_a_second_moment_that_was_rounded_to_zero_is_not_divided_by() -> None:
    params = make_params({"table": (8192,)})
    theirs = galore_torch_class(True)(params.values(), lr=0.01)
    train(theirs, params, [0])
    state = theirs.state[params["table"]]
    state["state2"][:100] = 0  # bitsandbytes rounds what is below 1.6e-7 of its block's largest to that
    copies = clone_params(params)
    optimizer = GaLoreAdamW8bit(copies.values())
    optimizer.load_state_dict(theirs.state_dict())
    assert int(optimizer.state[copies["table"]]["exp_avg_sq"].min()) == 1
    before = copies["table"].detach().clone()
    copies["table"].grad = torch.zeros(8192)
    optimizer.step()
    assert torch.equal(state["state2"][:100], torch.zeros(100, dtype=torch.uint8))
    assert float((copies["table"].detach() - before).abs().max()) < 100  # 1e5 with theirs


def decoded(state: dict[str, Any], key: str) -> Tensor:
    absmax = state.get(f"{key}_absmax")
    return state[key] if absmax is None else dequantize_blockwise(state[key], absmax, key == "exp_avg")


@pytest.mark.parametrize("saved_8bit", [False, True])
def test_moments_take_the_format_of_the_optimizer(saved_8bit: bool) -> None:
    theirs, params = trained_theirs(saved_8bit)
    states = []
    for loaded_8bit in (False, True):
        optimizer, copies = ours(loaded_8bit, params)
        import_state_dict(optimizer, theirs.state_dict())
        states.append({name: dict(optimizer.state[param]) for name, param in copies.items()})
        train(optimizer, copies, [7])
    for name, exact in states[0].items():
        rounded = states[1][name]
        assert ("exp_avg_absmax" in rounded) == (name in ("tall", "wide", "table"))
        assert "exp_avg_absmax" not in exact
        for key in ("exp_avg", "exp_avg_sq"):
            difference = (decoded(rounded, key) - decoded(exact, key)).abs().max()
            assert float(difference) <= 0.02 * float(decoded(exact, key).abs().max()), (name, key)


@pytest.mark.parametrize("basis_format", ["int8", "int4"])
def test_bases_are_quantized_where_ours_are(basis_format: str) -> None:
    theirs, params = trained_theirs(False)
    optimizer, copies = ours(False, params, basis_format=basis_format)
    import_state_dict(optimizer, theirs.state_dict())
    state = optimizer.state[copies["wide"]]
    expected = theirs.state[params["wide"]]["projector"].ortho_matrix
    basis = dequantize_basis(state["basis"], state["basis_scale"])
    assert float((basis - expected).norm() / expected.norm()) <= (0.01 if basis_format == "int8" else 0.2)
    train(optimizer, copies, [7])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_states_are_widened(dtype: torch.dtype) -> None:
    params = {name: nn.Parameter(param.detach().to(dtype)) for name, param in make_params().items()}
    theirs = galore_torch_class(False)(groups_of(params), lr=0.01)
    train(theirs, params, range(3))
    optimizer, copies = ours(False, params)
    import_state_dict(optimizer, theirs.state_dict())
    for name, param in copies.items():
        saved, state = theirs.state[params[name]], optimizer.state[param]
        expected = saved["exp_avg"].T if name == "wide" else saved["exp_avg"]
        assert torch.equal(state["exp_avg"], expected.float())
        assert "basis" not in state or state["basis"].dtype == dtype
    train(optimizer, copies, [3])


def adamw(params: Params) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params.values(), lr=0.01, weight_decay=0.1, eps=1e-12)


def bitsandbytes_adamw8bit(params: Params) -> torch.optim.Optimizer:
    optimizer: torch.optim.Optimizer = pytest.importorskip("bitsandbytes").optim.AdamW8bit(
        params.values(), lr=0.01, weight_decay=0.1, eps=1e-12
    )
    return optimizer


@pytest.mark.parametrize(
    ("make", "optimizer_class", "tolerance"),
    [
        # They decay the weights first, which matters by lr * weight_decay of a step.
        (adamw, GaLoreFusedAdamW, 2e-3),
        (adamw, GaLoreFusedAdam8bit, 0.05),
        (bitsandbytes_adamw8bit, GaLoreFusedAdam8bit, 0.02),
    ],
)
def test_full_rank_optimizers_state(
    make: Callable[[Params], torch.optim.Optimizer], optimizer_class: type[GaLoreAdam], tolerance: float
) -> None:
    params = make_params()
    theirs = make(params)
    train(theirs, params, range(7))
    copies = clone_params(params)
    optimizer = optimizer_class(copies.values(), rank=None)
    import_state_dict(optimizer, theirs.state_dict())
    before = {name: param.detach().clone() for name, param in params.items()}
    for own in (params, copies):
        set_grads(own, 7)
    theirs.step()
    optimizer.step()
    for name, param in params.items():
        change = torch.linalg.vector_norm(param.detach() - before[name])
        assert torch.linalg.vector_norm(param.detach() - copies[name].detach()) <= tolerance * change, name


def test_parameters_without_a_step_have_no_state() -> None:
    theirs, params = trained_theirs(False, 1)
    saved = theirs.state_dict()
    del saved["state"][2]
    saved["state"][3] = {"step": 0}
    optimizer, copies = ours(False, params)
    import_state_dict(optimizer, saved)
    assert [name for name, param in copies.items() if not optimizer.state.get(param)] == ["tall", "wide"]


def test_without_groups_the_parameters_are_counted_through() -> None:
    theirs, params = trained_theirs(False)
    state_dict = as_plain(theirs.state_dict())
    del state_dict["param_groups"]
    optimizer, copies = ours(False, params)
    import_state_dict(optimizer, state_dict)
    assert {float(optimizer.state[param]["step"]) for param in copies.values()} == {7.0}
    assert optimizer.param_groups[0]["lr"] == 1.0
