"""What a refresh accepts: the checks of its arguments."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from galore_kernels.subspace.factors import Factors
from galore_kernels.subspace.products import Gradient
from galore_kernels.subspace.sharded import ShardedGradient

GRAD_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_grad(name: str, grad: Gradient) -> None:
    """A dense, non-empty matrix of one of the dtypes, or factors of one."""
    if isinstance(grad, (Factors, ShardedGradient)):
        return
    if not isinstance(grad, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor of shape (L, S), got {type(grad).__name__}")
    if grad.layout != torch.strided:
        raise ValueError(f"{name}: expected a dense tensor, got layout {grad.layout}; pass grad.to_dense()")
    if grad.dtype not in GRAD_DTYPES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in GRAD_DTYPES)
        raise ValueError(f"{name}: expected one of the dtypes {names}, got {grad.dtype}; convert it first")
    if grad.ndim != 2:
        raise ValueError(
            f"{name}: expected a matrix (L, S), got shape {tuple(grad.shape)}; reshape it to two dimensions"
        )
    if grad.numel() == 0:
        raise ValueError(f"{name}: expected at least one element, got shape {tuple(grad.shape)}; leave it out")


def check_alike(grads: Sequence[Gradient]) -> None:
    """All of one shape, dtype and device."""
    first = grads[0]
    for index, grad in enumerate(grads):
        check_grad(f"grads[{index}]", grad)
        for what in ("shape", "dtype", "device"):
            expected, got = getattr(first, what), getattr(grad, what)
            if expected != got:
                shown = (tuple(expected), tuple(got)) if what == "shape" else (expected, got)
                raise ValueError(
                    f"grads[{index}]: expected {what} {shown[0]}, that of grads[0], got {shown[1]}; "
                    "pass those of each shape, dtype and device in a call of their own"
                )


def check_rank(rank: int) -> None:
    """A positive integer."""
    if isinstance(rank, bool) or not isinstance(rank, int):
        raise TypeError(f"rank: expected an integer, got {rank!r}")
    if rank < 1:
        raise ValueError(f"rank={rank}: expected an integer >= 1; a full-rank update needs no basis")


def check_previous(name: str, previous: Tensor, shape: tuple[int, int]) -> None:
    """A basis of the shape that the search will return."""
    if not isinstance(previous, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor or None, got {type(previous).__name__}")
    if tuple(previous.shape) != shape:
        raise ValueError(
            f"{name}: expected shape (S, r) = {shape}, got {tuple(previous.shape)}; "
            "pass None to start afresh after a change of rank or side"
        )


def check_count(name: str, values: Sequence[object] | None, count: int) -> None:
    """One for each gradient, or none at all."""
    if values is not None and len(values) != count:
        raise ValueError(f"{name}: expected {count}, one for each of grads, got {len(values)}; pass None for none")


def random_source(seed: int | None, generator: torch.Generator | None) -> torch.Generator:
    """What the random numbers are drawn from: the generator, or one on the CPU with this seed."""
    if generator is not None:
        if seed is not None:
            raise ValueError("seed and generator: expected at most one of them, got both; leave one out")
        if not isinstance(generator, torch.Generator):
            raise TypeError(f"generator: expected a torch.Generator, got {type(generator).__name__}")
        return generator
    seed = 0 if seed is None else seed
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed: expected an integer, got {seed!r}")
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed={seed}: expected 0 <= seed < 2**64")
    return torch.Generator(device="cpu").manual_seed(seed)
