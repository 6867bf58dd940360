"""What each of the processes of ``test_lowrank_ddp.py`` does."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from factored_cases import VOCABULARY, Model, loss_of
from optimizer_cases import OptimizerClass
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from galore_kernels import (
    APOLLOFusedAdamW,
    GaLoreFusedAdafactor,
    GaLoreFusedAdam8bit,
    GaLoreFusedAdamW,
    NonFiniteGradientWarning,
    galore_param_groups,
)
from galore_kernels.distributed import reduce_lowrank
from galore_kernels.optim.base import LowRankOptimizer

TARGETS = ["mlp"]


class Wide(Model):
    """Whose bases are found by thin products: at rank 4 they are less than the gradients."""

    def __init__(self) -> None:
        super().__init__()
        width, hidden = 96, 288
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.mlp_up = nn.Linear(width, hidden)  # right side
        self.mlp_down = nn.Linear(hidden, width, bias=False)  # left side
        self.mlp_square = nn.Linear(width, width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)


STEPS = 100
SAMPLES = 8  # a step, of all processes


@dataclass
class Case:
    """One training; ``micro``: backward passes to a step; ``clip``: to this norm; ``plain``: without the hook."""

    optimizer: OptimizerClass = GaLoreFusedAdamW
    options: dict[str, Any] = field(default_factory=dict)
    ddp: dict[str, Any] = field(default_factory=dict)
    micro: int = 1
    clip: float | None = None
    plain: bool = False
    model: type[Model] = Model


ADAFACTOR = {"scale_parameter": False, "relative_step": False}

CASES = {
    "hook": Case(),
    "views": Case(ddp={"gradient_as_bucket_view": True, "bucket_cap_mb": 0.001}),
    "accumulation": Case(micro=2),
    "clipping": Case(clip=0.05, ddp={"gradient_as_bucket_view": True}),
    "8-bit, staggered, warm": Case(GaLoreFusedAdam8bit, {"refresh_schedule": "staggered", "warm_start": True}),
    "adaptive, rotated, int8 basis": Case(
        options={"refresh_schedule": "adaptive", "moments_on_refresh": "rotate", "basis_format": "int8"}
    ),
    "asynchronous, both sides": Case(options={"async_refresh": True, "proj_type": "full"}),
    "adafactor": Case(GaLoreFusedAdafactor, ADAFACTOR),
    "searched": Case(options={"rank": 4}, model=Wide),
    "searched, accumulation, rotated": Case(options={"rank": 4, "moments_on_refresh": "rotate"}, micro=2, model=Wide),
    "searched, adaptive, warm, asynchronous": Case(
        options={"rank": 4, "refresh_schedule": "adaptive", "warm_start": True, "async_refresh": True}, model=Wide
    ),
    "searched, asynchronous": Case(options={"rank": 4, "async_refresh": True, "update_proj_gap": 9}, model=Wide),
    "searched, both sides": Case(options={"rank": 4, "proj_type": "full"}, model=Wide),
}

#: Options that turn the last bits of a gradient into more than that: the yardstick is plain DDP with the same.
SENSITIVE = (
    "8-bit, staggered, warm",
    "adaptive, rotated, int8 basis",
    "asynchronous, both sides",
    "searched, both sides",
)
CASES |= {f"{name}, plain DDP": replace(CASES[name], plain=True) for name in SENSITIVE}


def samples(step: int, micro: int, count: int = SAMPLES) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(100 * step + micro)
    inputs = torch.randint(0, VOCABULARY, (count, 12), generator=rng)
    return inputs, (inputs * 7 + 3) % VOCABULARY


def made(case: Case) -> tuple[Model, Any]:
    torch.manual_seed(0)
    model = case.model()
    of_group = {key: value for key, value in case.options.items() if key not in ADAFACTOR}
    groups = galore_param_groups(model, TARGETS, **{"rank": 8, "update_proj_gap": 40, **of_group})
    of_optimizer = ADAFACTOR if case.optimizer is GaLoreFusedAdafactor else {}
    return model, case.optimizer(groups, lr=1e-2, **of_optimizer)


@dataclass
class Result:
    """Of one training. ``bytes``: those given to all-reduces in each step."""

    losses: list[float]
    weights: dict[str, Tensor]
    report: dict[str, Any]
    bytes: list[int]


def train(case: Case, rank: int | None = None, world: int = 1) -> Result:
    """``rank`` None: one process with all samples."""
    inner, optimizer = made(case)
    model: nn.Module = inner
    if rank is not None:
        model = DistributedDataParallel(inner, **case.ddp)
        if not case.plain:
            reduce_lowrank(model, optimizer)
    losses, sizes = [], []
    for step in range(STEPS):
        with counting() as sent:
            for micro in range(case.micro):
                inputs, targets = samples(step, micro)
                if rank is not None:
                    inputs, targets = inputs[rank::world], targets[rank::world]
                waits = rank is not None and micro < case.micro - 1
                with model.no_sync() if waits else contextlib.nullcontext():  # type: ignore[operator]
                    loss = loss_of(model, (inputs, targets)) / case.micro
                    loss.backward()
        if case.clip is not None and rank is not None:
            nn.utils.clip_grad_norm_(inner.parameters(), case.clip)
        elif case.clip is not None:
            clip_by_projections(optimizer, case.clip)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        sizes.append(sum(sent))
    return Result(losses, inner.state_dict(), optimizer.subspace_report(), sizes)


def clip_by_projections(optimizer: LowRankOptimizer, largest: float) -> None:
    """``clip_grad_norm_`` of what processes see: of projections where no basis is due."""
    parts = []
    for update in optimizer.listed():
        whole = update.layout.rank is None or optimizer.keeps_gradient(update)
        parts.append(update.grad if whole else optimizer.projected(update, update.grad))
    norm = torch.cat([part.flatten() for part in parts]).norm()
    nn.utils.clip_grads_with_norm_([update.param for update in optimizer.listed()], largest, norm)


@contextlib.contextmanager
def counting() -> Iterator[list[int]]:
    """The bytes of every all-reduce that Python asks for."""
    original, sizes = dist.all_reduce, []

    def counted(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        sizes.append(tensor.numel() * tensor.element_size())
        return original(tensor, *args, **kwargs)

    dist.all_reduce = counted
    try:
        yield sizes
    finally:
        dist.all_reduce = original


def work(rank: int, world: int, folder: str, cases: list[str]) -> None:
    """A process: the trainings, and where they are asked for, what goes wrong."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world, timeout=timedelta(seconds=60)
    )
    results: dict[str, Any] = {name: train(CASES[name], rank, world) for name in cases if name in CASES}
    if "faults" in cases:
        results |= {fault.__name__: fault(rank) for fault in FAULTS}
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


# ---------------------------------------------------------------------- faults


def started(**options: Any) -> tuple[DistributedDataParallel, Any]:
    """A model and its optimizer after two steps, so that gradients are projected."""
    inner, optimizer = made(Case(options=options))
    model = DistributedDataParallel(inner)
    reduce_lowrank(model, optimizer)
    for step in range(2):
        backward(model, step)
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def backward(model: nn.Module, step: int) -> None:
    rank = dist.get_rank()
    inputs, targets = samples(step, 0)
    loss_of(model, (inputs[rank::2], targets[rank::2])).backward()


def raised(kind: type[Exception] | tuple[type[Exception], ...], call: Callable[[], Any]) -> str:
    """The message of what ``call`` has to raise."""
    try:
        call()
    except kind as error:
        return str(error)
    raise AssertionError(f"no {kind}")


def another_rank(rank: int) -> str:
    return raised(ValueError, lambda: started(rank=8 + rank))


def gradients_left(rank: int) -> str:
    model, _ = started()
    backward(model, 2)
    return raised(RuntimeError, lambda: backward(model, 3))


def nan_where_a_basis_is_found(rank: int) -> Any:
    """In the first step, which has none, and in the second refresh."""
    inner, optimizer = made(Case(options={"rank": 4, "update_proj_gap": 5}, model=Wide))
    model = DistributedDataParallel(inner)
    reduce_lowrank(model, optimizer)
    for step in range(12):
        inputs, targets = samples(step, 0)
        loss = loss_of(model, (inputs[rank::2], targets[rank::2]))
        (loss * float("nan") if rank and step in (0, 6) else loss).backward()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NonFiniteGradientWarning)
            optimizer.step()
        optimizer.zero_grad()
    report = {name: (entry["refreshes"], entry["refreshed_at"]) for name, entry in optimizer.subspace_report().items()}
    return report, set(optimizer.skipped_steps().values()), inner.state_dict()


def evaluated_before_the_step(rank: int) -> Any:
    weights = []
    for evaluates in (False, True):
        model, optimizer = started()
        backward(model, 2)
        if evaluates:
            with torch.no_grad():
                model(samples(9, 0)[0])
        optimizer.step()
        weights.append([param.detach().clone() for param in model.parameters()])
    return all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


def zeroed_in_place(rank: int) -> Any:
    weights = []
    for in_place in (False, True):
        model, optimizer = started()
        for step in range(2, 5):
            backward(model, step)
            optimizer.step()
            model.zero_grad(set_to_none=not in_place)
        weights.append([param.detach().clone() for param in model.parameters()])
    return all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


def nan_on_one(rank: int) -> Any:
    model, optimizer = started()
    backward(model, 2)  # averaged before the NaN is there
    optimizer.step()
    optimizer.zero_grad()
    inputs, targets = samples(3, 0)
    loss = loss_of(model, (inputs[rank::2], targets[rank::2]))
    (loss * float("nan") if rank else loss).backward()
    before = [param.detach().clone() for param in model.parameters()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NonFiniteGradientWarning)
        optimizer.step()
    after = list(model.parameters())
    return sum(optimizer.skipped_steps().values()), all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def state_of_before(rank: int) -> str:
    model, optimizer = started()
    saved = copy.deepcopy(optimizer.state_dict())
    backward(model, 2)
    message = raised(RuntimeError, lambda: optimizer.load_state_dict(saved))
    optimizer.zero_grad()
    optimizer.load_state_dict(saved)
    return message


def apollo(rank: int) -> str:
    inner = Model()
    optimizer = APOLLOFusedAdamW(galore_param_groups(inner, TARGETS, rank=8))
    return raised(ValueError, lambda: reduce_lowrank(DistributedDataParallel(inner), optimizer))


def not_wrapped(rank: int) -> str:
    inner, optimizer = made(Case())
    bare: Any = inner
    return raised(TypeError, lambda: reduce_lowrank(bare, optimizer))


FAULTS = (
    another_rank,
    gradients_left,
    evaluated_before_the_step,
    zeroed_in_place,
    nan_on_one,
    nan_where_a_basis_is_found,
    state_of_before,
    apollo,
    not_wrapped,
)
