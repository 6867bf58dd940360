"""What each of the processes of ``test_fsdp.py`` does."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from factored_cases import WIDTH, Model, loss_of
from lowrank_ddp_process import counting, raised, samples
from optimizer_cases import OptimizerClass
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from galore_kernels import (
    APOLLOFusedAdamW,
    GaLoreFusedAdafactor,
    GaLoreFusedAdam8bit,
    GaLoreFusedAdamW,
    NonFiniteGradientWarning,
    galore_param_groups,
    prepare,
)

TARGETS = ["mlp"]
SAMPLES = 12  # a step, of all processes
WHOLE = StateDictOptions(full_state_dict=True)


class Uneven(Model):
    """With a projection to 3 features and back: more processes than rows."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp_in = nn.Linear(WIDTH, 3)  # left side
        self.mlp_out = nn.Linear(3, WIDTH)  # right side

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        x = x + self.mlp_down(nn.functional.silu(self.mlp_up(x)))
        return self.head(x + torch.tanh(self.mlp_square(x)) + self.mlp_out(torch.sin(self.mlp_in(x))))


class Several(Model):
    """Matrices of one shape, some of them with fewer rows than there are processes."""

    def __init__(self) -> None:
        super().__init__()
        for place in range(3):
            self.add_module(f"mlp_in_{place}", nn.Linear(WIDTH, 3))
            self.add_module(f"mlp_wide_{place}", nn.Linear(WIDTH, WIDTH))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for place in range(3):
            narrow = self.get_submodule(f"mlp_in_{place}")(x).sum(dim=-1, keepdim=True)
            x = x + torch.tanh(self.get_submodule(f"mlp_wide_{place}")(x)) * torch.sigmoid(narrow)
        return self.head(x)


@dataclass
class Case:
    """One training; ``micro``: backward passes to a step; ``clip``: to this norm; ``gap``: between refreshes."""

    optimizer: OptimizerClass = GaLoreFusedAdamW
    options: dict[str, Any] = field(default_factory=dict)
    model: type[nn.Module] = Model
    micro: int = 1
    clip: float | None = None
    replicas: int = 1
    steps: int = 45
    gap: int = 20
    policy: MixedPrecisionPolicy = field(default_factory=MixedPrecisionPolicy)


CASES = {
    "fp32": Case(steps=100, gap=40),
    "right": Case(options={"proj_type": "right"}),
    "uneven": Case(model=Uneven, steps=100, gap=40),
    "replicas": Case(replicas=2, model=Uneven, steps=100, gap=40),
    "accumulation, clipping": Case(micro=2, clip=0.05),
    "exact, rotated": Case(options={"refresh_method": "svd", "moments_on_refresh": "rotate"}),
    "staggered, warm, asynchronous": Case(
        options={"refresh_schedule": "staggered", "warm_start": True, "async_refresh": True}
    ),
    "int8 basis, adaptive": Case(options={"basis_format": "int8", "refresh_schedule": "adaptive"}),
    "8-bit": Case(GaLoreFusedAdam8bit, {"rank": 16}, Uneven),
    "mixed precision": Case(policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)),
}


@dataclass
class Training:
    """A model and its optimizer, on one process or among others."""

    model: nn.Module
    optimizer: Any
    case: Case
    sharded: bool

    @classmethod
    def begin(cls, case: Case, *, sharded: bool, seed: int = 0) -> Training:
        torch.manual_seed(seed)
        model = case.model()
        if sharded:
            world = dist.get_world_size()
            shape = (world,) if case.replicas == 1 else (case.replicas, world // case.replicas)
            names = ("replicate", "shard")[-len(shape) :]
            mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
            for module in (model.mlp_up, model):
                fully_shard(module, mesh=mesh, mp_policy=case.policy)  # type: ignore[arg-type]
        groups = galore_param_groups(model, TARGETS, **{"rank": 8, "update_proj_gap": case.gap, **case.options})
        return cls(model, case.optimizer(groups, lr=1e-2), case, sharded)

    def backward(self, step: int, factor: float = 1.0) -> float:
        """The gradients of a step; returns this process' loss."""
        total = 0.0
        for micro in range(self.case.micro):
            inputs, targets = samples(step, micro, SAMPLES)
            if self.sharded:
                rank, world = dist.get_rank(), dist.get_world_size()
                inputs, targets = inputs[rank::world], targets[rank::world]
                last = micro == self.case.micro - 1
                self.model.set_requires_gradient_sync(last)  # type: ignore[operator]
            loss = loss_of(self.model, (inputs, targets)) / self.case.micro
            (loss * factor).backward()
            total += loss.item()
        return total

    def train(self, first: int, steps: int) -> tuple[list[float], list[int]]:
        """Losses, and bytes given to all-reduces by the optimizer, of each step."""
        losses, sizes = [], []
        for step in range(first, first + steps):
            losses.append(self.backward(step))
            if self.case.clip is not None:
                nn.utils.clip_grad_norm_(self.model.parameters(), self.case.clip)
            with counting() as sent:
                self.optimizer.step()
            self.optimizer.zero_grad()
            sizes.append(sum(sent))
        return losses, sizes

    def weights(self) -> dict[str, Tensor]:
        """Whole, copied."""
        return {name: whole(param).clone() for name, param in self.model.named_parameters()}

    def parts(self) -> list[Tensor]:
        """What this process has of weights and moments."""
        states = [self.optimizer.state[param] for param in self.model.parameters()]
        tensors = [value for state in states for value in state.values() if isinstance(value, Tensor)]
        return [part(tensor).detach().clone() for tensor in [*self.model.parameters(), *tensors]]


def whole(tensor: Any) -> Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach()


def part(tensor: Any) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


@dataclass
class Result:
    """Of one training, on one process. ``bytes``: those of the optimizer's all-reduces in each step."""

    losses: list[float]
    weights: dict[str, Tensor]
    report: dict[str, Any]
    bytes: list[int]
    parts: list[Tensor]


def result_of(case: Case, *, sharded: bool) -> Result:
    training = Training.begin(case, sharded=sharded)
    losses, sizes = training.train(0, case.steps)
    return Result(losses, training.weights(), training.optimizer.subspace_report(), sizes, training.parts())


def work(rank: int, world: int, folder: str, tasks: list[str]) -> None:
    """A process: the trainings, and the other tasks by their names."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet-{world}", rank=rank, world_size=world, timeout=timedelta(seconds=60)
    )
    results: dict[str, Any] = {}
    for name in tasks:
        results[name] = result_of(CASES[name], sharded=True) if name in CASES else TASKS[name](folder)
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


# ---------------------------------------------------------------------- checkpoints

SAVED = ("uneven", "8-bit")
HALF = 30  # of its steps; the second one refreshes in their middle


def state_of(training: Training) -> dict[str, Any]:
    return {
        "model": get_model_state_dict(training.model),
        "optimizer": get_optimizer_state_dict(training.model, training.optimizer),
    }


def resumed(name: str, folder: str) -> Training:
    """A training that has read the checkpoint of ``saving``."""
    training = Training.begin(CASES[name], sharded=True, seed=1)
    state = state_of(training)
    load(state, checkpoint_id=f"{folder}/dcp-{name}")
    training.model.load_state_dict(state["model"])
    set_optimizer_state_dict(training.model, training.optimizer, optim_state_dict=state["optimizer"])
    return training


def saving(folder: str) -> Any:
    """Saves in the middle of a training; the same processes go on, and resume, and do so from a dict of their own."""
    found = {}
    for name in SAVED:
        training = Training.begin(CASES[name], sharded=True)
        training.train(0, HALF)
        save(state_of(training), checkpoint_id=f"{folder}/dcp-{name}")
        exported = get_optimizer_state_dict(training.model, training.optimizer, options=WHOLE)
        weights = training.weights()
        if dist.get_rank() == 0:
            torch.save({"optimizer": exported, "model": weights}, f"{folder}/whole-{name}.pt")
        own = training.optimizer.state_dict()
        twin = Training.begin(CASES[name], sharded=True, seed=1)
        twin.model.load_state_dict(training.model.state_dict())
        twin.optimizer.load_state_dict(own)
        again = resumed(name, folder)
        losses, _ = training.train(HALF, HALF)
        assert twin.train(HALF, HALF)[0] == losses
        assert again.train(HALF, HALF)[0] == losses
        for other in (twin, again):
            assert all(torch.equal(a, b) for a, b in zip(training.parts(), other.parts(), strict=True)), name
        found[name] = training.weights(), losses
    return found


def resuming(folder: str) -> Any:
    """Other processes, in another number, go on from that checkpoint."""
    found = {}
    for name in SAVED:
        training = resumed(name, folder)
        losses, _ = training.train(HALF, HALF)
        found[name] = training.weights(), losses
    return found


def importing(folder: str) -> Any:
    """A whole state dict of one process, taken apart: by torch's function, and by the optimizer itself."""
    found = {}
    for name in SAVED:
        saved = torch.load(f"{folder}/one-{name}.pt", weights_only=True)
        training = Training.begin(CASES[name], sharded=True, seed=1)
        with torch.no_grad():
            for key, param in training.model.named_parameters():
                rows = training.optimizer.listed()  # any parameter's part
                shard = next(update.layout.shard for update in rows if update.param is param)
                part(param).copy_(saved["model"][key][shard.rows])
        training.optimizer.load_state_dict(saved["optimizer"])
        losses, _ = training.train(HALF, HALF)
        found[name] = training.weights(), losses
    return found


# ---------------------------------------------------------------------- faults


def another_rank(folder: str) -> str:
    return raised(ValueError, lambda: Training.begin(Case(options={"rank": 8 + dist.get_rank()}), sharded=True))


def another_model(folder: str) -> str:
    model = (Model, Uneven)[dist.get_rank()]
    return raised(ValueError, lambda: Training.begin(Case(model=model), sharded=True))


def nan_loss_on_one(folder: str) -> Any:
    training = Training.begin(CASES["uneven"], sharded=True)
    training.train(0, 3)
    before = training.parts()
    training.backward(3, float("nan") if dist.get_rank() == 0 else 1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NonFiniteGradientWarning)
        training.optimizer.step()
    kept = [torch.equal(a, b) for a, b in zip(before, training.parts(), strict=True) if a.is_floating_point()]
    return all(kept), training.optimizer.skipped_steps()


def nan_in_one_part(folder: str) -> Any:
    """Gradients that are not finite in one process' part, in an ordinary step and in one that refreshes."""
    training = Training.begin(Case(gap=5), sharded=True)
    for step in range(20):
        training.backward(step)
        if dist.get_rank() == 1 and step in (3, 10):
            for param in training.model.parameters():
                part(param.grad).view(-1)[:1] = float("nan")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NonFiniteGradientWarning)
            training.optimizer.step()
        training.optimizer.zero_grad()
    bases = [state["basis"] for state in training.optimizer.state.values() if "basis" in state]
    return bases, training.optimizer.subspace_report(), training.optimizer.skipped_steps(), training.weights()


def overflow(folder: str) -> Any:
    """A step that GradScaler skips, which parts that have none skip as well."""
    case = Case(options={"proj_type": "right"}, model=Uneven, gap=5)
    training = Training.begin(case, sharded=True)
    for step in range(12):
        training.backward(step)
        if step == 2:
            training.optimizer.found_inf = torch.ones(())
        training.optimizer.step()
        training.optimizer.__dict__.pop("found_inf", None)
        training.optimizer.zero_grad()
    return training.optimizer.subspace_report(), training.weights()


def in_batches_as_on_a_gpu(folder: str) -> Any:
    """Searches of several matrices together, with some whose rows the last processes have none of."""
    with patch("galore_kernels.optim.refresh.in_batches", lambda device: True):
        training = Training.begin(Case(model=Several), sharded=True)
        for step in range(8):
            for name, layer in training.model.named_children():  # the others are due when the first isn't
                layer.requires_grad_(step > 0 or name == "mlp_in_0")
            training.backward(step)
            training.optimizer.step()
            training.optimizer.zero_grad()
    return training.optimizer.subspace_report(), training.weights()


def refusals(folder: str) -> dict[str, str]:
    def begin(**changes: Any) -> Callable[[], Training]:
        return lambda: Training.begin(replace(Case(), **changes), sharded=True)

    def prepared() -> None:
        model = Model()
        prepare(model, TARGETS, rank=8)
        fully_shard(model)
        GaLoreFusedAdamW(galore_param_groups(model, TARGETS, rank=8))
        loss_of(model, samples(0, 0, SAMPLES)).backward()

    def adafactor() -> None:
        model = Model()
        fully_shard(model)
        GaLoreFusedAdafactor(galore_param_groups(model, TARGETS, rank=8))

    def by_columns() -> None:
        model = Model()
        fully_shard(model, shard_placement_fn=lambda param: columns if param.dim() == 2 else None)
        GaLoreFusedAdamW(galore_param_groups(model, TARGETS, rank=8))

    from torch.distributed.tensor import Shard

    columns = Shard(1)
    calls: dict[str, Callable[[], Any]] = {
        "adafactor": adafactor,
        "apollo": begin(optimizer=APOLLOFusedAdamW),
        "both sides": begin(options={"proj_type": "full"}),
        "auto": begin(options={"rank": "auto", "rank_budget": 10**6}),
        "reset": begin(options={"moments_on_refresh": "reset"}),
        "prepared": prepared,
        "columns": by_columns,
    }
    return {name: raised((ValueError, RuntimeError), call) for name, call in calls.items()}


TASKS: dict[str, Callable[[str], Any]] = {
    task.__name__: task
    for task in (
        saving,
        resuming,
        importing,
        another_rank,
        another_model,
        nan_loss_on_one,
        nan_in_one_part,
        overflow,
        in_batches_as_on_a_gpu,
        refusals,
    )
}
