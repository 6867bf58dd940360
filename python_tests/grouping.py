"""A backend of groups for CPU tensors, which can be taken for a device's; and optimizers with and without it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from optimizer_cases import OPTIONS, assert_same_snapshot, clone_params, make_params, set_grads, snapshot
from torch import Tensor, nn

from galore_kernels import APOLLOFusedAdam8bit, GaLoreFusedAdafactor, GaLoreFusedAdam8bit
from galore_kernels.ops import registry
from galore_kernels.ops.adam import AdamOptions
from galore_kernels.ops.group import GroupUpdate, UpdateGroup
from galore_kernels.ops.registry import Backend
from galore_kernels.optim import multi_tensor, skip_monitor
from galore_kernels.optim.base import LowRankOptimizer

Params = dict[str, nn.Parameter]

#: What reads a number from a tensor, and would wait for a device.
READS = ("__int__", "__float__", "__bool__", "__index__", "item", "tolist", "cpu", "numpy")

#: Several tensors of every kind that is grouped.
KINDS = {"tall": (300, 20), "wide": (20, 300), "small": (24, 20), "norm": (70,), "table": (4100,)}
SHAPES = {f"{kind}{i}": shape for i in range(3) for kind, shape in KINDS.items()}


@dataclass
class Grouping:
    """The reference, which offers groups: they loop over its operations.

    Attributes:
        made: operation and size of every group made. calls: the same, with the options, of every update.
        fail_at: the number of the update, from 1, that raises.
        forbidden: reading from a tensor is an error, except in the backend itself. reads: how often that was done.
        on_host: copies, which may be read.
    """

    made: list[tuple[str, int]] = field(default_factory=list)
    calls: list[tuple[str, int, AdamOptions]] = field(default_factory=list)
    fail_at: int = 0
    forbidden: bool = False
    reads: int = 0
    on_host: list[Tensor] = field(default_factory=list)

    def backend(self) -> Backend:
        def served(kernel: Callable[..., Any]) -> Callable[..., Any]:
            def run(*args: Any) -> Any:
                with self.reading():
                    return kernel(*args)

            return run

        kernels = {name: served(kernel) for name, kernel in self.kernels().items()}
        return Backend("cuda", kernels, lambda device: None, dict, self.group)

    @staticmethod
    def kernels() -> dict[str, Callable[..., Any]]:
        return dict(registry._backends["reference"].kernels)

    def group(self, group: UpdateGroup) -> GroupUpdate:
        self.made.append((group.operation, len(group.params)))
        kernel = self.kernels()[group.operation]

        def run(grads: Sequence[Tensor], options: AdamOptions) -> None:
            self.calls.append((group.operation, len(grads), options))
            if len(self.calls) == self.fail_at:
                raise MemoryError
            seeds = group.rounding_seeds or (None,) * len(grads)
            assert len({(param.shape, param.dtype) for param in group.params}) == 1
            assert len({grad.dtype for grad in grads}) == 1
            with self.reading():
                for i, (param, grad, state) in enumerate(zip(group.params, grads, group.states, strict=True)):
                    assert param.is_contiguous()
                    assert grad.is_contiguous()
                    lowrank = group.operation == "lowrank_update"
                    assert grad.shape == (state.exp_avg.shape if lowrank else param.shape)
                    assert not torch.is_autocast_enabled("cpu")
                    own = replace(options, rounding_seed=seeds[i])
                    weight_scale = group.weight_scales[i] if group.weight_scales else None
                    if group.operation == "adam8bit_update":
                        kernel(param, grad, state, own)
                    elif group.operation == "apollo_update":
                        norm, options_of = group.scaled_norms[i], (own, group.apollo)
                        kernel(param, grad, group.bases[i], state, norm, *options_of, group.side, weight_scale)
                    else:
                        basis_scale = group.basis_scales[i] if group.basis_scales else None
                        projection = (state, own, group.side, group.scale, weight_scale)
                        kernel(param, grad, group.bases[i], None, basis_scale, *projection)

        return run

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        before, self.forbidden = self.forbidden, False
        counted = self.reads
        yield
        self.forbidden, self.reads = before, counted


def install(monkeypatch: pytest.MonkeyPatch) -> Grouping:
    """Makes a ``Grouping`` the backend "cuda" for CPU tensors."""
    made = Grouping()
    monkeypatch.setitem(registry._backends, "cuda", made.backend())

    def watched(name: str) -> Callable[..., Any]:
        read = getattr(Tensor, name)

        def reads(self: Tensor, *args: Any, **kwargs: Any) -> Any:
            if not any(self is copy for copy in made.on_host):
                assert not made.forbidden, f"{name} waits for the device"
                made.reads += 1
            return read(self, *args, **kwargs)

        return reads

    for name in READS:
        monkeypatch.setattr(Tensor, name, watched(name))
    return made


def take_for_device(grouping: Grouping, monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers may not be read where they are, and a copy lands when it has been asked for once."""

    def to_host(values: Tensor) -> tuple[Tensor, Callable[[], bool]]:
        grouping.on_host.append(values.clone())
        answers = iter((False, True))
        return grouping.on_host[-1], lambda: next(answers)

    monkeypatch.setattr(multi_tensor, "reads_are_free", lambda device: False)
    monkeypatch.setattr(skip_monitor, "to_host", to_host)


Make = Callable[[Params, str], LowRankOptimizer]


def plain(
    params: Params, backend: str, optimizer_class: type[LowRankOptimizer] = GaLoreFusedAdam8bit
) -> LowRankOptimizer:
    return optimizer_class(list(params.items()), **OPTIONS, backend=backend)


def mixed(params: Params, backend: str) -> LowRankOptimizer:
    """Three groups that differ in everything, and tensors that can't be grouped between those that can."""
    own: list[dict[str, Any]] = [
        {"rank": 8, "update_proj_gap": 4, "betas": (0.5, 0.9)},
        {"rank": 6, "proj_type": "reverse_std", "maximize": True},
        {"rank": 4, "proj_type": "full", "eps": 1e-4, "scale": 2.0},
    ]
    groups = [{"params": [p for n, p in params.items() if int(n[-1]) // 2 == i], **own[i]} for i in range(3)]
    options = {**OPTIONS, "project_nd": True, "stochastic_rounding": True, "seed": 7}
    return GaLoreFusedAdam8bit(groups, **options, backend=backend)


def apollo(params: Params, backend: str) -> LowRankOptimizer:
    """Drawn bases and found ones, both scalings."""
    own: list[dict[str, Any]] = [
        {"rank": 8, "update_proj_gap": 4, "refresh_schedule": "staggered"},
        {"rank": 6, "scale_type": "tensor", "scale": 16.0, "proj": "rademacher", "maximize": True},
        {"rank": 4, "proj": "svd", "scale_front": True, "norm_growth_limit": None},
    ]
    groups = [{"params": [p for n, p in params.items() if int(n[-1]) // 2 == i], **own[i]} for i in range(3)]
    return APOLLOFusedAdam8bit(groups, **{**OPTIONS, "stochastic_rounding": True, "project_nd": True}, backend=backend)


def adafactor(params: Params, backend: str) -> LowRankOptimizer:
    """A learning rate with a first moment, and steps relative to the weights through a quantized basis."""
    own: list[dict[str, Any]] = [
        {"rank": 8, "beta1": 0.9, "lr": 0.01, "relative_step": False, "clip_threshold": 0.5, "maximize": True},
        {"rank": 6, "warmup_init": True, "basis_format": "int8", "moments_on_refresh": "keep"},
    ]
    groups = [{"params": [p for n, p in params.items() if int(n[-1]) // 2 == i], **own[i]} for i in range(2)]
    options = {key: value for key, value in OPTIONS.items() if key not in ("lr", "betas", "eps")}
    return GaLoreFusedAdafactor(groups, **options, stochastic_rounding=True, project_nd=True, backend=backend)


def pair(make: Make = plain, dtype: torch.dtype = torch.float32) -> tuple[tuple[LowRankOptimizer, Params], ...]:
    """Grouped, and one tensor at a time: from the same weights."""
    shapes: dict[str, tuple[int, ...]] = SHAPES
    if make in (mixed, apollo):
        shapes = {f"{kind}{i}": shape for i in range(5) for kind, shape in {**KINDS, "conv": (20, 3, 3, 3)}.items()}
    params = make_params(shapes, dtype)
    alone = clone_params(params)
    if make in (mixed, apollo):
        for some in (params, alone):
            some["tall1"].data = torch.zeros(20, 300, dtype=dtype).T.copy_(some["tall1"].data)
    return (make(params, "cuda"), params), (make(alone, "reference"), alone)


def compare(both: tuple[tuple[LowRankOptimizer, Params], ...]) -> None:
    assert_same_snapshot(snapshot(*both[0]), snapshot(*both[1]))


def steps(both: Sequence[tuple[LowRankOptimizer, Params]], numbers: range) -> None:
    """Steps with new gradients and learning rates each; in some, some have none or one of another layout."""
    for step in numbers:
        for optimizer, params in both:
            set_grads(params, step)
            for index, param in enumerate(params.values()):
                assert param.grad is not None
                if step % 4 == 2 and index % 3 == 1:
                    param.grad = None
                elif step % 4 == 1 and param.dim() == 2 and index % 2:
                    param.grad = param.grad.T.contiguous().T
            for group in optimizer.param_groups:
                if group["lr"] is not None:
                    group["lr"] = 0.01 / (step + 1)
            optimizer.step()
            optimizer.zero_grad()
