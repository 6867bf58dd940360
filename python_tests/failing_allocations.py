"""Makes the n-th allocation of a step fail, whichever it is: in the optimizer, in a refresh or inside an operation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from galore_kernels.ops import registry


class FailingAllocations(TorchDispatchMode):
    """Counts the tensors that PyTorch allocates, and raises ``error`` in place of the ``fail_at``-th, from 1.

    Attributes:
        error: one of the two errors that PyTorch and Python raise, in turn.
        count: allocations so far; the last one failed if ``count == fail_at``.
    """

    def __init__(self, fail_at: int) -> None:
        super().__init__()
        self.fail_at = fail_at
        self.error = (torch.OutOfMemoryError, MemoryError)[fail_at % 2]
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Sequence[Any], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if allocates(func):
            self.count += 1
            if self.count == self.fail_at:
                raise self.error(f"allocation {self.count}, of {func}")
        return func(*args, **(kwargs or {}))


def allocates(func: Any) -> bool:
    """Whether an operation returns new memory."""
    # A returned tensor that is none of the arguments (as views and in-place results are) is new memory.
    returns = func._schema.returns
    return any("Tensor" in str(value.type) and value.alias_info is None for value in returns)


def watch_operations(monkeypatch: pytest.MonkeyPatch, mode: FailingAllocations) -> None:
    """A dispatch mode does not see into a custom operation: the mode is entered anew in every kernel."""
    kernel: Callable[..., Callable[..., Any]] = registry.kernel

    def watched(*args: Any) -> Callable[..., Any]:
        inner = kernel(*args)

        def run(*tensors: Any) -> Any:
            with mode:
                return inner(*tensors)

        return run

    monkeypatch.setattr(registry, "kernel", watched)
