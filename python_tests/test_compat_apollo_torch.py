"""The drop-in for apollo_torch: its signature and groups, the weights it would have made, and its checkpoints."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from compat_cases import PARITY, RANK, STEPS, differences, galore_groups, llama, mean_of_last, train, weights
from optimizer_cases import assert_same_snapshot, clone_params, make_params, set_grads, snapshot
from optimizer_cases import train as train_by_hand
from torch import Tensor, nn

from galore_kernels.compat.apollo_torch import APOLLOAdamW, GaLoreAdamW
from galore_kernels.ops import RandomBasis, random_basis
from galore_kernels.optim.update import derived_seed

#: Groups of either scaling, with the learning rate at which the loss falls smoothly.
SCALINGS: dict[str, dict[str, Any]] = {
    "channel": {"proj": "random", "scale_type": "channel", "scale": 1.0},
    "tensor": {"proj": "random", "scale_type": "tensor", "scale": 16.0},
}


@contextmanager
def our_bases() -> Iterator[list[int]]:
    """apollo_torch's projectors take the bases that ours draw. Yields a list that grows with each."""
    projector = pytest.importorskip("apollo_torch.random_projector").GradientProjector
    drawn: list[int] = []

    def update_ortho_matrix(self: Any, grad: Tensor, proj_type: str) -> None:
        short = grad.shape[1] if proj_type == "right" else grad.shape[0]
        # It counts parameters from 1, and gives each as a seed.
        seed = derived_seed(0, self.seed - 1, "basis", self.svd_count)
        basis = random_basis(short, RandomBasis(self.rank, seed)).float() / self.rank**0.5
        self.ortho_matrix = basis.T.contiguous() if proj_type == "right" else basis
        self.svd_count += 1
        drawn.append(seed)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(projector, "update_ortho_matrix", update_ortho_matrix)
        yield drawn


def groups(model: nn.Module, rank: int | None, scaling: str, **options: Any) -> list[dict[str, Any]]:
    return galore_groups(model, rank, **{**SCALINGS[scaling], **options})


OPTIONS: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1}


def theirs(model: nn.Module, rank: int | None, scaling: str, **options: Any) -> torch.optim.Optimizer:
    apollo_torch = pytest.importorskip("apollo_torch")
    optimizer: torch.optim.Optimizer = apollo_torch.APOLLOAdamW(groups(model, rank, scaling), **{**OPTIONS, **options})
    return optimizer


@pytest.mark.parametrize("scaling", SCALINGS)
def test_300_steps_end_at_apollo_torchs_weights(scaling: str) -> None:
    expected, model = llama(), llama()
    start = weights(model)
    with our_bases() as drawn:
        train(expected, theirs(expected, RANK, scaling), range(STEPS))
    losses = train(model, APOLLOAdamW(groups(model, RANK, scaling), **OPTIONS), range(STEPS))
    assert len(drawn) == 5 * 14  # 5 refreshes of 14 matrices
    assert max(differences(weights(model), weights(expected))) <= PARITY
    assert min(differences(start, weights(expected))) >= 1000 * PARITY
    assert mean_of_last(losses) < losses[0] - 1


@pytest.mark.parametrize(
    "wrong",
    [{"scale": 0.99}, {"disable_nl": True}, {"weight_decay": 0.0}, {"update_proj_gap": 61}],
    ids=lambda wrong: next(iter(wrong)),
)
def test_the_comparison_sees_other_settings(wrong: dict[str, Any]) -> None:
    expected, model = llama(), llama()
    with our_bases():
        train(expected, theirs(expected, RANK, "channel"), range(100))
    of_groups = {key: wrong[key] for key in ("scale", "update_proj_gap") if key in wrong}
    of_call = {key: value for key, value in wrong.items() if key not in of_groups}
    optimizer = APOLLOAdamW(groups(model, RANK, "channel", **of_groups), **{**OPTIONS, **of_call})
    train(model, optimizer, range(100))
    assert max(differences(weights(model), weights(expected))) > PARITY


def test_the_signature_is_theirs() -> None:
    apollo_torch = pytest.importorskip("apollo_torch")
    expected = inspect.signature(apollo_torch.APOLLOAdamW).parameters
    ours = inspect.signature(APOLLOAdamW).parameters
    assert [(name, p.default) for name, p in expected.items()] == [
        (name, p.default) for name, p in ours.items() if p.kind is not p.KEYWORD_ONLY
    ]


def test_the_bias_correction_can_not_be_left_out() -> None:
    with pytest.raises(ValueError, match="correct_bias=False"):
        APOLLOAdamW(make_params().values(), correct_bias=False)


# ---------------------------------------------------------------------- state brought over

GROUP: dict[str, Any] = {
    "rank": 16,
    "update_proj_gap": 5,
    "scale": 2.0,
    "proj_type": "std",
    "proj": "random",
    "scale_type": "channel",
}
MATRICES = ("tall", "wide", "small")


def by_hand(make: Any, params: dict[str, nn.Parameter], **group: Any) -> torch.optim.Optimizer:
    matrices = [params[name] for name in MATRICES]
    rest = [param for name, param in params.items() if name not in MATRICES]
    optimizer: torch.optim.Optimizer = make(
        [{"params": rest}, {"params": matrices, **GROUP, **group}], lr=1e-2, weight_decay=0.1
    )
    return optimizer


@pytest.mark.parametrize("proj", ["random", "svd"])
def test_a_run_moves_over_in_mid_way(proj: str) -> None:
    apollo_torch = pytest.importorskip("apollo_torch")
    params = make_params()
    rival = by_hand(apollo_torch.APOLLOAdamW, params, proj=proj)
    train_by_hand(rival, params, range(7))
    copies = clone_params(params)
    optimizer = by_hand(APOLLOAdamW, copies, proj=proj)
    optimizer.load_state_dict(rival.state_dict())
    before = {name: param.detach().clone() for name, param in params.items()}
    with our_bases():
        for name in MATRICES if proj == "random" else ():  # an import draws a basis
            state = rival.state[params[name]]
            place = [*(n for n in copies if n not in MATRICES), *MATRICES].index(name)
            state["projector"].seed, state["projector"].svd_count = place + 1, 0
            state["projector"].update_ortho_matrix(params[name], "right" if name != "wide" else "left")
        for step in range(7, 10):  # up to their next refresh
            for own in (params, copies):
                set_grads(own, step)
            rival.step()
            optimizer.step()
    for name, param in params.items():
        change = torch.linalg.vector_norm(param.detach() - before[name])
        difference = torch.linalg.vector_norm(param.detach() - copies[name].detach())
        rounding = 2**-23 * torch.linalg.vector_norm(param.detach())  # of three updates
        assert difference <= rounding < 1e-4 * change, name
    for name in MATRICES:
        assert optimizer.state[copies[name]]["next_refresh"] == 10


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda state: state.update(scaled_grad=torch.tensor(float("nan"))), "scaled_grad"),
        (lambda state: state.pop("projector"), "projector"),
        (lambda state: state.update(exp_avg=state["exp_avg"][:3]), "exp_avg"),
    ],
)
def test_a_state_that_does_not_fit_is_refused(damage: Any, message: str) -> None:
    apollo_torch = pytest.importorskip("apollo_torch")
    params = make_params()
    rival = by_hand(apollo_torch.APOLLOAdamW, params)
    train_by_hand(rival, params, range(3))
    state_dict = rival.state_dict()
    damage(state_dict["state"][2])
    copies = clone_params(params)
    optimizer = by_hand(APOLLOAdamW, copies)
    before = snapshot(optimizer, copies)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(state_dict)
    assert_same_snapshot(snapshot(optimizer, copies), before)


def test_galore_s_state_is_not_apollo_s() -> None:
    galore_torch, apollo_torch = pytest.importorskip("galore_torch"), pytest.importorskip("apollo_torch")
    params = make_params()
    matrices = [params[name] for name in MATRICES]
    rest = [param for name, param in params.items() if name not in MATRICES]
    galore_group = {key: GROUP[key] for key in ("rank", "update_proj_gap", "scale", "proj_type")}
    galore = galore_torch.GaLoreAdamW(
        [{"params": rest}, {"params": matrices, **galore_group}], no_deprecation_warning=True
    )
    train_by_hand(galore, params, range(2))
    with pytest.raises(ValueError, match="the state is GaLore's, expected APOLLO's"):
        by_hand(APOLLOAdamW, params).load_state_dict(galore.state_dict())
    apollo = by_hand(apollo_torch.APOLLOAdamW, params, proj="svd")
    train_by_hand(apollo, params, range(2))
    ours = GaLoreAdamW([{"params": rest}, {"params": matrices, **galore_group}])
    with pytest.raises(ValueError, match="the state is APOLLO's, expected GaLore's"):
        ours.load_state_dict(apollo.state_dict())


def test_a_rank_beyond_the_matrix_is_refused_by_name() -> None:
    apollo_torch = pytest.importorskip("apollo_torch")
    params = make_params()
    rival = by_hand(apollo_torch.APOLLOAdamW, params, rank=64)  # of 40 x 20
    train_by_hand(rival, params, range(2))
    with pytest.raises(ValueError, match="its random projection has rank 64"):
        by_hand(APOLLOAdamW, clone_params(params), rank=64).load_state_dict(rival.state_dict())


def test_before_their_first_step_there_is_no_state() -> None:
    apollo_torch = pytest.importorskip("apollo_torch")
    params = make_params()
    optimizer = by_hand(APOLLOAdamW, clone_params(params))
    optimizer.load_state_dict(by_hand(apollo_torch.APOLLOAdamW, params).state_dict())
    assert not any(optimizer.state.values())
