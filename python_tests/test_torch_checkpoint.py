"""``torch.distributed.checkpoint`` with one process; with several see ``test_fsdp.py``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from factored_cases import TARGETS, Model, batch, loss_of
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from galore_kernels import (
    APOLLOFusedAdam8bit,
    GaLoreFusedAdafactor,
    GaLoreFusedAdam8bit,
    GaLoreFusedAdamW,
    galore_param_groups,
)

OPTIMIZERS: dict[str, Any] = {
    "float32": lambda groups: GaLoreFusedAdamW(groups, lr=1e-2),
    "8-bit": lambda groups: GaLoreFusedAdam8bit(groups, lr=1e-2),
    "int4 basis": lambda groups: GaLoreFusedAdamW(groups, lr=1e-2, basis_format="int4"),
    "both sides": lambda groups: GaLoreFusedAdamW(groups, lr=1e-2, proj_type="full"),
    "apollo": lambda groups: APOLLOFusedAdam8bit(groups, lr=1e-2),
    "adafactor": lambda groups: GaLoreFusedAdafactor(groups),
}


def begun(kind: str, seed: int) -> tuple[Model, Any]:
    torch.manual_seed(seed)
    model = Model()
    return model, OPTIMIZERS[kind](galore_param_groups(model, TARGETS, rank=16, update_proj_gap=4))


def train(model: Model, optimizer: Any, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        loss_of(model, batch(step)).backward()
        optimizer.step()


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_resumed_training_goes_on_to_the_bit(tmp_path: Path, kind: str, flat: bool) -> None:
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    model, optimizer = begun(kind, seed=0)
    train(model, optimizer, range(6))
    state = {"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, optimizer, options=options)}
    save(state, checkpoint_id=tmp_path / "checkpoint", no_dist=True)
    train(model, optimizer, range(6, 12))

    twin, second = begun(kind, seed=1)
    state = {"model": twin.state_dict(), "optimizer": get_optimizer_state_dict(twin, second, options=options)}
    load(state, checkpoint_id=tmp_path / "checkpoint", no_dist=True)
    twin.load_state_dict(state["model"])
    set_optimizer_state_dict(twin, second, optim_state_dict=state["optimizer"], options=options)
    train(twin, second, range(6, 12))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
