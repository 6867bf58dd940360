"""Parameters, gradients and snapshots for the optimizers' tests."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from update_cases import assert_same_bits

from galore_kernels import APOLLOFusedAdam8bit, GaLoreFusedAdafactor, GaLoreFusedAdam8bit, GaLoreFusedAdamW
from galore_kernels.optim.base import LowRankOptimizer
from galore_kernels.optim.galore import GaLoreAdam


class AdafactorAtALearningRate(GaLoreFusedAdafactor):
    """With a first moment, and with a learning rate as the others have one."""

    def __init__(self, params: Iterable[Any], lr: float | Tensor | None = 1e-3, **options: Any) -> None:
        options = {"relative_step": False, "scale_parameter": False, "beta1": 0.9, **options}
        super().__init__(params, lr, **options)


#: Those with every option of a subspace.
OPTIMIZERS: list[type[GaLoreAdam]] = [GaLoreFusedAdam8bit, GaLoreFusedAdamW]

#: Called as the public optimizers are.
OptimizerClass = Callable[..., LowRankOptimizer]

#: One of each kind of state that a projected gradient is enough for; of each kind of state.
OF_PROJECTIONS: list[OptimizerClass] = [*OPTIMIZERS, AdafactorAtALearningRate]
EVERY_OPTIMIZER: list[OptimizerClass] = [*OF_PROJECTIONS, APOLLOFusedAdam8bit]


def taken(optimizer_class: OptimizerClass, options: Mapping[str, Any]) -> dict[str, Any]:
    """``options``, but for rotated moments where the optimizer's can't be: they are reset."""
    rotates = optimizer_class is not AdafactorAtALearningRate or options.get("moments_on_refresh") != "rotate"
    return {**options} if rotates else {**options, "moments_on_refresh": "reset"}


#: Low rank, frequent refreshes, decay on: every term of a step acts within a few steps.
OPTIONS: dict[str, Any] = {"lr": 1e-2, "rank": 16, "update_proj_gap": 3, "weight_decay": 0.1}

#: One of each kind of state at rank 16. 4096 elements is where moments become 8-bit.
SHAPES: dict[str, tuple[int, ...]] = {
    "tall": (300, 64),  # right side, 300 x 16 moments: 8-bit, with a short last block
    "wide": (64, 300),  # left side, the same
    "small": (40, 20),  # projected, 40 x 16 moments: float32
    "table": (4100,),  # full rank, 8-bit, last block of 4
    "bias": (7,),  # full rank, float32
}


def make_params(
    shapes: Mapping[str, tuple[int, ...]] = SHAPES, dtype: torch.dtype = torch.float32, seed: int = 0
) -> dict[str, nn.Parameter]:
    """Parameters with normal entries, the same for one seed."""
    rng = torch.Generator().manual_seed(seed)
    return {name: nn.Parameter(torch.randn(shape, generator=rng).to(dtype)) for name, shape in shapes.items()}


def clone_params(params: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """Parameters of equal value and their own memory."""
    return {name: nn.Parameter(param.detach().clone()) for name, param in params.items()}


def set_grads(params: Mapping[str, Tensor], step: int, dtype: torch.dtype | None = None) -> None:
    """Gives every parameter the gradient of the given step: a decaying spectrum plus noise, the same for one step."""
    for index, param in enumerate(params.values()):
        rng = torch.Generator().manual_seed(1000 * step + index)
        grad = 0.1 * torch.randn(param.shape, generator=rng)
        if param.dim() == 2:
            rows, cols = param.shape
            factors = torch.randn(rows, 4, generator=rng), torch.randn(4, cols, generator=rng)
            grad = grad + factors[0] @ factors[1]
        param.grad = grad.to(param.dtype)
        if dtype is not None:
            param.grad_dtype = None  # lets a gradient differ from its parameter
            param.grad = grad.to(dtype)


def train(
    optimizer: torch.optim.Optimizer,
    params: Mapping[str, Tensor],
    steps: Iterable[int],
    dtype: torch.dtype | None = None,
) -> None:
    """Takes the given steps, each with its own gradients."""
    for step in steps:
        set_grads(params, step, dtype)
        optimizer.step()
        optimizer.zero_grad()


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """The leaves of nested dicts, lists and tuples, by path."""
    if isinstance(value, Mapping):
        children = [(str(key), child) for key, child in value.items()]
    elif isinstance(value, (list, tuple)):
        children = [(str(index), child) for index, child in enumerate(value)]
    else:
        return {prefix: value}
    leaves = {f"{prefix}/": len(children)}  # an empty container is a leaf too
    for key, child in children:
        leaves.update(flatten(child, f"{prefix}/{key}"))
    return leaves


def snapshot(optimizer: torch.optim.Optimizer, params: Mapping[str, Tensor]) -> dict[str, Any]:
    """Everything a step may change, copied: weights, state and groups."""
    leaves = flatten({"params": dict(params), "optimizer": optimizer.state_dict()})
    return {key: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf for key, leaf in leaves.items()}


def assert_same_snapshot(got: dict[str, Any], expected: dict[str, Any]) -> None:
    """Fails unless both hold the same keys, plain values and bits."""
    assert got.keys() == expected.keys()
    for key, value in expected.items():
        if isinstance(value, Tensor):
            assert isinstance(got[key], Tensor), key
            assert_same_bits(got[key], value, key)
        else:
            assert got[key] == value, key


def differing_keys(got: dict[str, Any], expected: dict[str, Any]) -> set[str]:
    """The keys at which two snapshots differ in value, kind or presence."""

    def same(a: Any, b: Any) -> bool:
        if isinstance(a, Tensor) or isinstance(b, Tensor):
            return isinstance(a, Tensor) and isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
        return bool(a == b)

    keys = got.keys() | expected.keys()
    return {key for key in keys if key not in got or key not in expected or not same(got[key], expected[key])}


def ranks(optimizer: torch.optim.Optimizer, params: Mapping[str, Tensor]) -> dict[str, int | None]:
    """The rank each parameter is projected to, read from the state of a step; None at full rank."""
    set_grads(params, 0)
    optimizer.step()
    bases = {name: optimizer.state[param].get("basis") for name, param in params.items()}
    return {name: None if basis is None else basis.shape[1] for name, basis in bases.items()}
