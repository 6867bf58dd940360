"""What the drop-ins' tests share: a tiny Llama, trained by galore_torch and by ours; and single tensors."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import pytest
import torch
from optimizer_cases import SHAPES, clone_params, make_params
from optimizer_cases import train as train_by_hand
from torch import Tensor, nn

from galore_kernels.compat.galore_torch import GaLoreAdamW, GaLoreAdamW8bit
from galore_kernels.optim import refresh
from galore_kernels.optim.galore import GaLoreAdam
from galore_kernels.pretrain.rivals import patched_galore_torch_adamw8bit
from galore_kernels.subspace import Subspace

STEPS = 300
IMPORT_AT = 100
GAP = 60  # refreshed at 0, 60, ..., 240
RANK = 8  # of 32, in matrices 32 x 32, 64 x 32 and 32 x 64: both sides
VOCABULARY = 64

#: The largest learning rate at each rank with which the loss falls smoothly; decay enough to be seen.
OPTIONS: dict[int | None, dict[str, Any]] = {
    RANK: {"lr": 1e-2, "weight_decay": 0.1},
    None: {"lr": 3e-3, "weight_decay": 0.1},
}

#: Of the weights, norm-wise for each tensor: what the drop-ins promise over 300 steps in float32. Measured: 8e-7 with
#: the same bases, 2e-6 at full rank, 4e-6 with each package's own SVD.
PARITY = 1e-4


def llama(hidden: int = 32, intermediate: int = 64, seed: int = 0) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=32,
    )
    model: nn.Module = transformers.LlamaForCausalLM(config)
    return model


def galore_groups(model: nn.Module, rank: int | None, **options: Any) -> list[dict[str, Any]]:
    """The two groups of galore_torch's README: everything else, and the layers' matrices."""
    linear = [param for name, param in model.named_parameters() if "self_attn" in name or "mlp" in name]
    chosen = set(map(id, linear))
    rest = [param for param in model.parameters() if id(param) not in chosen]
    projection = {"update_proj_gap": GAP, "scale": 0.25, "proj_type": "std", **options}
    return [{"params": rest}, {"params": linear} if rank is None else {"params": linear, "rank": rank, **projection}]


def tokens(step: int) -> Tensor:
    """Four rows of 24: each token follows from the one before, but for a quarter drawn at random."""
    rng = torch.Generator().manual_seed(step)
    columns = [torch.randint(0, VOCABULARY, (4, 1), generator=rng)]
    for _ in range(23):
        drawn = torch.randint(0, VOCABULARY, (4, 1), generator=rng)
        columns.append(torch.where(torch.rand((4, 1), generator=rng) < 0.25, drawn, (5 * columns[-1] + 3) % VOCABULARY))
    return torch.cat(columns, 1)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range, total: int = STEPS) -> list[float]:
    """The losses of those steps; the learning rate warms up and falls to a tenth over the ``total``."""

    def schedule(step: int) -> float:
        return min(1.0, (step + 1) / 20) * (0.55 + 0.45 * math.cos(math.pi * step / total))

    # From the middle on it reads initial_lr from the groups.
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule, last_epoch=steps.start - 1)
    losses = []
    for step in steps:
        batch = tokens(step)
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        losses.append(loss.item())
    return losses


def mean_of_last(losses: list[float], count: int = 20) -> float:
    return sum(losses[-count:]) / count


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: param.detach().clone() for name, param in model.named_parameters()}


def differences(got: dict[str, Tensor], expected: dict[str, Tensor]) -> list[float]:
    """|got - expected| / |expected| of each tensor."""
    norm = torch.linalg.vector_norm
    return [float(norm(got[name] - tensor) / norm(tensor)) for name, tensor in expected.items()]


def with_positive_pivots(basis: Tensor) -> Tensor:
    """The sign convention of ``refresh_basis``: the largest entry of each column is positive."""
    return basis * basis.gather(0, basis.abs().argmax(dim=0, keepdim=True)).sign()


@contextmanager
def observed_projectors(bases: list[Tensor] | None = None) -> Iterator[None]:
    """galore_torch's projectors choose our signs of the singular vectors, and add their bases, (S, r), to ``bases``."""
    projector = pytest.importorskip("galore_torch.galore_projector").GaLoreProjector
    search: Callable[..., Any] = projector.get_orthogonal_matrix

    def observed(self: Any, weights: Tensor, rank: int, type: str) -> Any:  # noqa: A002  their name
        found = search(self, weights, rank, type)
        left = with_positive_pivots(found[0] if type == "full" else found) if type != "right" else None
        right = with_positive_pivots((found[1] if type == "full" else found).T) if type != "left" else None
        if bases is not None:
            bases.extend(basis.clone() for basis in (left, right) if basis is not None)
        if left is None or right is None:
            return left if right is None else right.T
        return [left, right.T]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(projector, "get_orthogonal_matrix", observed)
        yield


@contextmanager
def injected(bases: Iterable[Tensor]) -> Iterator[list[int]]:
    """Our refreshes find these bases, one after another. Yields a list that grows by a rank with each."""
    pending, found = iter(bases), []

    def inject(grads: list[Tensor], rank: int, **_: object) -> list[Subspace]:
        basis = next(pending).contiguous()
        assert len(grads) == 1
        assert basis.shape == (grads[0].shape[1], rank)
        shares = torch.zeros(rank, dtype=torch.float64)
        found.append(rank)
        return [Subspace(basis, shares, shares.sum(), found=True, cold=True)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(refresh, "find_subspaces", inject)
        yield found


@dataclass(frozen=True)
class Run:
    """A training run of galore_torch's AdamW.

    Attributes:
        weights: by the number of steps taken. bases: in the order in which they were found.
        model, optimizer: their state dicts after ``IMPORT_AT`` steps. found_before: bases found until then.
    """

    weights: dict[int, dict[str, Tensor]]
    bases: list[Tensor]
    model: dict[str, Tensor]
    optimizer: dict[str, Any]
    found_before: int


@lru_cache(maxsize=2)
def galore_torch_run(rank: int | None) -> Run:
    galore_torch = pytest.importorskip("galore_torch")
    model, bases = llama(), list[Tensor]()
    optimizer = galore_torch.GaLoreAdamW(galore_groups(model, rank), **OPTIONS[rank], no_deprecation_warning=True)
    by_steps = {0: weights(model)}
    with observed_projectors(bases):
        train(model, optimizer, range(IMPORT_AT))
        by_steps[IMPORT_AT] = weights(model)
        state, saved, before = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict()), len(bases)
        train(model, optimizer, range(IMPORT_AT, STEPS))
    by_steps[STEPS] = weights(model)
    return Run(by_steps, bases, state, saved, before)


# ---------------------------------------------------------------------- without a model

Params = dict[str, nn.Parameter]

PROJECTION: dict[str, Any] = {"rank": 16, "update_proj_gap": 5, "scale": 0.25, "proj_type": "std"}
MATRICES = ("tall", "wide", "small")


def groups_of(params: Params, **projection: Any) -> list[dict[str, Any]]:
    """Full rank, then the projected matrices; without names, which galore_torch doesn't take."""
    matrices = [param for name, param in params.items() if name in MATRICES]
    rest = [param for name, param in params.items() if name not in MATRICES]
    return [{"params": rest}, {"params": matrices, **PROJECTION, **projection}]


def galore_torch_class(eight_bit: bool) -> Callable[..., torch.optim.Optimizer]:
    galore_torch = pytest.importorskip("galore_torch")
    if eight_bit:
        pytest.importorskip("bitsandbytes")
        return patched_galore_torch_adamw8bit()
    return lambda *args, **kwargs: galore_torch.GaLoreAdamW(*args, **kwargs, no_deprecation_warning=True)


def trained_theirs(
    eight_bit: bool, steps: int = 7, shapes: Mapping[str, tuple[int, ...]] = SHAPES, **projection: Any
) -> tuple[torch.optim.Optimizer, Params]:
    params = make_params(shapes)
    theirs = galore_torch_class(eight_bit)(groups_of(params, **projection), lr=0.01, weight_decay=0.1)
    with observed_projectors():
        train_by_hand(theirs, params, range(steps))
    return theirs, params


def ours(eight_bit: bool, params: Params, **projection: Any) -> tuple[GaLoreAdam, Params]:
    """A fresh optimizer of copies of ``params``, with other numbers than theirs."""
    copies = clone_params(params)
    return (GaLoreAdamW8bit if eight_bit else GaLoreAdamW)(groups_of(copies, **projection), lr=1.0), copies


def as_plain(state_dict: dict[str, Any]) -> dict[str, Any]:
    """Projectors as dicts of their attributes."""
    plain = copy.deepcopy(state_dict)
    for state in plain["state"].values():
        if "projector" in state:
            state["projector"] = dict(vars(state["projector"]))
    return plain
