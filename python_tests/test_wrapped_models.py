"""What FSDP and DeepSpeed make of a model's parameters, in one process: named, refused, and nothing has changed.

The reports that these follow are GaLore#2 (ZeRO 1), GaLore#23 (ZeRO 3) and GaLore#47 (FSDP1), where galore_torch raised
an IndexError in its projector, or trained flat parameters without a projection. What ZeRO does to an optimizer's groups
was looked at in DeepSpeed 0.19.8 and is imitated here; ``test_wrapped_processes.py`` has the real one
where it is installed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from factored_cases import TARGETS, Model, batch, loss_of
from refusals import AFTERWARDS, FLATTENED, LEFT_BEHIND, PARTITIONED, REPLACED
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

from galore_kernels import (
    APOLLOFusedAdamW,
    GaLoreFusedAdafactor,
    GaLoreFusedAdam8bit,
    GaLoreFusedAdamW,
    LayerwiseOptimizer,
    galore_param_groups,
    prepare,
)


def made(model: nn.Module, kind: Callable[..., Any] = GaLoreFusedAdamW) -> Any:
    return kind(galore_param_groups(model, TARGETS, rank=8))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 1) -> None:
    for step in range(steps):
        loss_of(model, batch(step)).backward()
        optimizer.step()
        optimizer.zero_grad()


def held(optimizer: Any) -> list[Tensor]:
    """Copies of the parameters and of every tensor of the state."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    values = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    return [tensor.detach().clone() for tensor in (*params, *values)]


def assert_refused(optimizer: Any, error: type[Exception], message: str) -> None:
    """Steps are refused, each, and change nothing."""
    before = held(optimizer)
    for _ in range(2):
        with pytest.raises(error, match=message):
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(held(optimizer), before, strict=True))


# ---------------------------------------------------------------------- FSDP1: GaLore#47


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """A process group of this process."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def wrapped_by_fsdp1(model: nn.Module, *, use_orig_params: bool) -> nn.Module:
    return FullyShardedDataParallel(model, use_orig_params=use_orig_params, device_id=torch.device("cpu"))


fsdp1 = pytest.mark.filterwarnings("ignore:FSDP is switching to use `NO_SHARD`:UserWarning")
both_layouts = pytest.mark.parametrize("use_orig_params", [False, True])


@fsdp1
@both_layouts
@pytest.mark.parametrize("kind", [GaLoreFusedAdam8bit, GaLoreFusedAdafactor, APOLLOFusedAdamW])
def test_an_fsdp1_model_is_refused_when_the_optimizer_is_made(
    alone: None, use_orig_params: bool, kind: Callable[..., Any]
) -> None:
    wrapped = wrapped_by_fsdp1(Model(), use_orig_params=use_orig_params)
    with pytest.raises(ValueError, match=FLATTENED):
        kind(wrapped.named_parameters(), rank=8)
    with pytest.raises(ValueError, match=r"expected an unflattened parameter"):
        kind(wrapped.parameters(), rank=8)
    with pytest.raises(ValueError, match=r"^_fsdp_wrapped_module\.\S+: expected an unflattened parameter"):
        galore_param_groups(wrapped, TARGETS)
    with pytest.raises(ValueError, match=r"^_fsdp_wrapped_module\.\S+: expected an unflattened parameter"):
        prepare(wrapped, TARGETS, 8)


@fsdp1
@both_layouts
@pytest.mark.parametrize("steps", [0, 3])  # before the wrapping: 3 leave the plan of a step
@pytest.mark.parametrize("wrap", [lambda optimizer: optimizer, LayerwiseOptimizer], ids=["whole", "layerwise"])
def test_a_model_that_fsdp1_wraps_afterwards_is_refused_at_the_next_step(
    alone: None, use_orig_params: bool, steps: int, wrap: Callable[[Any], Any]
) -> None:
    model = Model()
    optimizer = wrap(made(model))
    train(model, optimizer, steps)
    wrapped = wrapped_by_fsdp1(model, use_orig_params=use_orig_params)
    loss_of(wrapped, batch(steps)).backward()
    assert_refused(optimizer, *((ValueError, FLATTENED) if use_orig_params else (RuntimeError, LEFT_BEHIND)))


@pytest.mark.parametrize("steps", [0, 3])
def test_a_model_that_fully_shard_is_given_after_the_optimizer_is_refused_at_the_next_step(
    alone: None, steps: int
) -> None:
    model = Model()
    optimizer = made(model)
    train(model, optimizer, steps)
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    loss_of(model, batch(steps)).backward()
    assert_refused(optimizer, RuntimeError, r"fully_shard has put a DTensor in the place of.*after fully_shard$")
    train(model, made(model))


@fsdp1
def test_a_prepared_model_that_fsdp1_wraps_is_refused(alone: None) -> None:
    wrapped = wrapped_by_fsdp1(prepare(Model(), TARGETS, 8), use_orig_params=True)
    with pytest.raises(ValueError, match=r"expected an unflattened parameter"):
        made(wrapped)


@fsdp1
def test_parameters_without_gradients_are_fine_beside_an_fsdp1_model_of_the_same_shapes(alone: None) -> None:
    """A reference model, say, of which the optimizer has nothing."""
    reference = wrapped_by_fsdp1(Model(), use_orig_params=False)
    model = Model()
    optimizer = made(model)
    optimizer.step()
    model.mlp_up.weight.requires_grad_(False)
    train(model, optimizer, 2)
    assert reference is not None


# ---------------------------------------------------------------------- ZeRO 1 and 2: GaLore#2


def flattened(params: list[Tensor]) -> list[Tensor]:
    """What ZeRO 1 and 2 put in the place of a group's parameters: one partition, in float32."""
    return [torch.cat([param.detach().float().flatten() for param in params]).requires_grad_()]


def copied(params: list[Tensor]) -> list[Tensor]:
    """What stage 0 puts in the place of bfloat16 parameters: float32 ones of their shapes."""
    return [param.detach().float().requires_grad_() for param in params]


def replace(optimizer: Any, others: Callable[[list[Tensor]], list[Tensor]]) -> None:
    for group in optimizer.param_groups:
        group["params"] = others(group["params"])
        for param in group["params"]:
            param.grad = torch.ones_like(param)


@pytest.mark.parametrize("kind", [GaLoreFusedAdam8bit, GaLoreFusedAdafactor, APOLLOFusedAdamW])
@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("copies", [False, True])
def test_flat_partitions_of_zero_1_and_2_are_refused_whatever_group_is_stepped(
    kind: Callable[..., Any], steps: int, copies: bool
) -> None:
    model = Model()
    optimizer = made(model, kind)
    train(model, optimizer, steps)
    optimizer = copy.deepcopy(optimizer) if copies else optimizer
    replace(optimizer, flattened)
    assert_refused(optimizer, ValueError, REPLACED)
    for group in reversed(optimizer.param_groups):  # ZeRO steps one group after another
        optimizer.param_groups = [group]
        assert_refused(optimizer, ValueError, REPLACED)


def test_flat_partitions_are_refused_in_the_backward_pass_of_layerwise_updates() -> None:
    model = Model()
    optimizer = LayerwiseOptimizer(made(model))
    replace(optimizer, flattened)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=REPLACED):
        loss_of(model, batch(0)).backward()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_parameters_whose_flat_copies_zero_trains_are_refused() -> None:
    """Those of a model that ``deepspeed.initialize`` has had."""
    model = Model()
    for param in model.parameters():
        param._hp_mapping = None  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=AFTERWARDS):
        GaLoreFusedAdamW(model.parameters(), rank=8)


def test_float32_copies_of_zero_0_are_trained() -> None:
    """Stage 0 with bfloat16: the copies train as parameters do that were float32 from the start."""
    torch.manual_seed(0)
    model = Model().bfloat16()
    twin = copy.deepcopy(model).float()
    optimizers = made(model), made(twin)
    replace(optimizers[0], copied)
    replace(optimizers[1], lambda params: params)
    for _ in range(3):
        for optimizer in optimizers:
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(held(optimizers[0]), held(optimizers[1]), strict=True))


def test_groups_that_are_edited_are_not_flattened() -> None:
    model = Model()
    optimizer = made(model)
    extra = nn.Parameter(torch.ones(3))
    optimizer.param_groups[1]["params"].append(extra)
    optimizer.param_groups[1]["param_names"].append("extra")
    extra.grad = torch.ones(3)
    optimizer.step()
    assert not torch.equal(extra, torch.ones(3))
    biases = [param for param in model.parameters() if param.dim() == 1]
    optimizer.param_groups[:] = [{**optimizer.param_groups[1], "params": biases, "param_names": ["a", "b"]}]
    train(model, optimizer)


# ---------------------------------------------------------------------- ZeRO 3: GaLore#23


def partition(param: Tensor) -> None:
    """What ZeRO 3 does to a parameter: its elements are elsewhere."""
    for name, value in {
        "ds_id": 0,
        "ds_shape": param.shape,
        "ds_numel": param.numel(),
        "ds_tensor": param.detach().flatten(),
    }.items():
        setattr(param, name, value)
    param.data = torch.empty(0)


def test_parameters_of_zero_3_are_refused_when_the_optimizer_is_made() -> None:
    model = Model()
    for param in model.parameters():
        partition(param)
    with pytest.raises(ValueError, match=rf'\("embedding.weight"\): {PARTITIONED}'):
        GaLoreFusedAdamW(model.named_parameters(), rank=8)
    with pytest.raises(ValueError, match=rf"^embedding.weight: {PARTITIONED}"):
        galore_param_groups(model, TARGETS)


@pytest.mark.parametrize("steps", [0, 3])
def test_zero_3_after_the_optimizer_is_refused_at_the_next_step(steps: int) -> None:
    model = Model()
    optimizer = made(model)
    train(model, optimizer, steps)
    groups = [list(group["params"]) for group in optimizer.param_groups]
    for param in model.parameters():
        partition(param)
    assert_refused(optimizer, ValueError, PARTITIONED)  # of the parameters themselves, none of which has a gradient
    for group, params in zip(optimizer.param_groups, groups, strict=True):
        flat = torch.cat([param.ds_tensor for param in params]).requires_grad_()
        flat.ds_id = 0  # type: ignore[attr-defined]
        flat.grad = torch.ones_like(flat)
        group["params"] = [flat]
    assert_refused(optimizer, ValueError, PARTITIONED)


# ---------------------------------------------------------------------- DDP's names


@pytest.mark.parametrize(
    "targets", ["all-linear", r"mlp_(up|down)", ["mlp_square"], [r"mlp_u."]], ids=["all", "regex", "part", "regexes"]
)
def test_targets_mean_the_same_layers_in_a_ddp_model(alone: None, targets: Any) -> None:
    class WithHead(Model):
        def get_output_embeddings(self) -> nn.Module:
            return self.mlp_square  # no name that heads have

    model = WithHead()
    wrapped = DistributedDataParallel(model)
    plain = [[name for name, _ in group["params"]] for group in galore_param_groups(model, targets)]
    names = [[name for name, _ in group["params"]] for group in galore_param_groups(wrapped, targets)]
    assert names == [[f"module.{name}" for name in group] for group in plain]
    assert "mlp_square.weight" not in plain[0] or targets == ["mlp_square"]
