"""The Python cost of ``optimizer.step()`` for Llama-7B's list of parameters: what it takes before anything is computed.

    python bench/step_overhead.py
    python bench/step_overhead.py --json bench/results/step_overhead.json

The list is 7B's in number, kind and dtype (224 bf16 matrices of three shapes, 65 norms, embedding and head: 291
tensors, 8-bit moments everywhere); its matrices are a sixteenth as long and wide, on which the cost of Python doesn't
depend. The tensors lie on the CPU and are treated as if they lay on a device, where a read would wait. Nothing is
launched: in

- *optimizer* the backend's groups do nothing, so this is the optimizer's own cost;
- *optimizer and pipeline* the groups are those of ``galore_kernels.backends.pipeline`` on stages that do nothing, so
  the backend's Python is there as well, as if no matrix could be taken in one pass (four launches instead of one);
- *one at a time* the backend has no groups: each tensor goes through an operation that does nothing.

What the driver takes for the launches, some microseconds each, comes on top, and so does what a native module takes
for the arguments of a launch. The learning rate is a new number in every step. Gradients are fresh tensors in every
step, made outside of the timed region, as after ``zero_grad(set_to_none=True)``: *elsewhere* at other addresses than in
the step before, *in place* at the same ones. No step is a refresh; the look at the skip counters that is due in every
sixteenth step is in, on the CPU.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import machine
import torch
from report import write_json
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from galore_kernels import GaLoreFusedAdam8bit
from galore_kernels.backends.batch import Batch
from galore_kernels.backends.pipeline import Pipeline
from galore_kernels.ops import registry
from galore_kernels.ops.adam import AdamOptions
from galore_kernels.ops.group import GroupUpdate, UpdateGroup
from galore_kernels.ops.registry import Backend
from galore_kernels.optim import multi_tensor

#: Rows, columns, number in a layer. 7B's are 4096 and 11008; at rank 16 all moments are 8-bit, as they are there.
MATRICES = ((256, 256, 4), (688, 256, 2), (256, 688, 1))
RANK = 16
NORM = 4096
EMBEDDING = (2000, 256)
LAYERS = 32
GOAL_SECONDS = 1e-3


@dataclass(frozen=True)
class Overhead:
    """Seconds of ``step()``: the median, the quartiles and the slowest of ``steps``."""

    what: str
    gradients: str
    steps: int
    median: float
    first_quartile: float
    third_quartile: float
    slowest: float


class _NoStages:
    """Stages that launch nothing."""

    def project_splits(self, batch: Batch) -> int:
        return 1

    def __getattr__(self, name: str) -> Callable[..., None]:
        return _nothing


def _nothing(*_: Any, **__: Any) -> None:
    """Takes anything, does nothing."""


def _no_group(group: UpdateGroup) -> GroupUpdate:
    def update(grads: Sequence[Tensor], options: AdamOptions) -> None:
        """Updates nothing."""

    return update


_no_stages: Any = _NoStages()
GROUPS: dict[str, Callable[[UpdateGroup], GroupUpdate] | None] = {
    "optimizer": _no_group,
    "optimizer and pipeline": Pipeline(_no_stages).group,
    "one at a time": None,
}


@contextmanager
def _serving(backend: Backend) -> Iterator[None]:
    """``backend`` serves the CPU, whose tensors are taken for a device's: they may not be read."""
    before, free = registry._backends.get(backend.name), multi_tensor.reads_are_free
    registry.register(backend)
    multi_tensor.reads_are_free = lambda device: False
    try:
        yield
    finally:
        multi_tensor.reads_are_free = free
        if before is None:
            del registry._backends[backend.name]
        else:
            registry.register(before)


def _backend(kernels: dict[str, Any], group: Callable[[UpdateGroup], GroupUpdate] | None) -> Backend:
    return Backend("cuda", kernels, lambda device: None, dict, group)


def parameters(layers: int = LAYERS) -> list[dict[str, Any]]:
    """The two groups that ``galore_param_groups`` makes: what is projected, and the rest."""

    def made(*shape: int) -> nn.Parameter:
        return nn.Parameter(torch.randn(shape).bfloat16())

    matrices = [made(rows, cols) for rows, cols, count in MATRICES for _ in range(count * layers)]
    rest = [made(NORM) for _ in range(2 * layers + 1)] + [made(*EMBEDDING) for _ in range(2)]
    return [{"params": matrices, "rank": RANK}, {"params": rest, "weight_decay": 0.1}]


def measure(what: str, elsewhere: bool, steps: int, layers: int = LAYERS) -> Overhead:
    """Times ``steps`` steps of the optimizer on the backend named ``what``."""
    kernels = dict(registry._backends["reference"].kernels)
    groups = parameters(layers)
    params = [param for group in groups for param in group["params"]]
    optimizer = GaLoreFusedAdam8bit(groups, update_proj_gap=10**6)
    seconds = []
    with _serving(_backend(kernels, GROUPS[what])):
        for param in params:
            param.grad = torch.randn_like(param)
        optimizer.step()  # makes state and subspaces: the only one that computes anything
        if GROUPS[what] is None:
            kernels.update(galore_update=_nothing, adam8bit_update=_nothing)
        for step in range(steps + 3):  # the plan is made, then warm
            previous = [param.grad for param in params]  # alive until there are new ones, so that no address is reused
            for param in params:
                param.grad = torch.empty_like(param) if elsewhere else param.grad.detach()
            del previous
            for group in optimizer.param_groups:
                group["lr"] = 1e-3 / (step + 1)
            start = time.perf_counter()
            optimizer.step()
            seconds.append(time.perf_counter() - start)
    timed = seconds[3:]
    first, median, third = statistics.quantiles(timed, n=4)
    return Overhead(what, "elsewhere" if elsewhere else "in place", steps, median, first, third, max(timed))


def main(arguments: list[str]) -> int:
    """Prints the table and writes the JSON. The status is 1 if the optimizer alone takes longer than a millisecond."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, help="where to write the result")
    parser.add_argument("--steps", type=int, default=300, help="steps to time")
    parser.add_argument("--layers", type=int, default=LAYERS, help="of the model; 7B has %(default)s")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    facts = machine.describe(torch.device("cpu"), 1, 0)
    gc.disable()
    found = [measure(what, elsewhere, options.steps, options.layers) for what in GROUPS for elsewhere in (True, False)]
    console = Console(width=None if Console().is_terminal else 120)
    console.print(machine.summary(facts))
    tensors = 9 * options.layers + 3
    table = Table(title=f"Python cost of step(), {tensors} tensors; nothing is launched", title_justify="left")
    for column in ("what", "gradients"):
        table.add_column(column)
    for column in ("median us", "quartiles", "slowest"):
        table.add_column(column, justify="right")
    for row in found:
        quartiles = f"{row.first_quartile * 1e6:.0f} - {row.third_quartile * 1e6:.0f}"
        table.add_row(row.what, row.gradients, f"{row.median * 1e6:.0f}", quartiles, f"{row.slowest * 1e6:.0f}")
    console.print(table)
    if options.json is not None:
        data = {
            "format": 1,
            "machine": facts,
            "method": (__doc__ or "").strip(),
            "tensors": tensors,
            "goal_seconds": GOAL_SECONDS,
            "rows": [vars(row) for row in found],
        }
        write_json(options.json, data)
        console.print(f"wrote {options.json}")
    return int(any(row.what == "optimizer" and row.median > GOAL_SECONDS for row in found))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
