"""Bytes of live tensors, counted during a real step: what the estimate is checked against.

Every operation that PyTorch dispatches is seen, also in backward, and the kernels of this library take their memory
from ``torch.empty`` in Python. What an operation allocates and frees within itself (a library's workspace) is not.
``torch.distributed._tools.mem_tracker`` does more than is needed here (it hooks modules and optimizers, and changes
``UntypedStorage.resize_``), and is private.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._C import DispatchKey
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from galore_kernels.ops.library import NAMESPACE

__all__ = ["LiveBytes", "LiveTensor"]


@dataclass(frozen=True)
class LiveTensor:
    """A tensor that owned its memory when it was first seen: ``made_by`` this operation, in this ``phase``."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    bytes: int
    made_by: str
    phase: str


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that live, each memory once, from when they are made within the mode.

    Attributes:
        phase: what goes on, for the tensors that are made; set it at will.
        current: bytes now. peak: the most since ``reset_peak``. peak_phase: the phase at the peak.
    """

    def __init__(self) -> None:
        super().__init__()
        self.phase = ""
        self.current = 0
        self._live: dict[int, tuple[LiveTensor, weakref.ref[Any]]] = {}
        self.reset_peak()

    def reset_peak(self) -> None:
        """From now on."""
        self.peak, self.peak_phase = self.current, self.phase
        self._at_peak = [tensor for tensor, _ in self._live.values()]

    def add(self, tensors: Iterable[Tensor], made_by: str) -> None:
        """Counts tensors that were made before or outside."""
        for tensor in tensors:
            self._see(tensor, made_by)

    def at_peak(self) -> list[LiveTensor]:
        """What lived at the peak, largest first."""
        return sorted(self._at_peak, key=lambda tensor: -tensor.bytes)

    def describe_peak(self, lines: int = 30) -> str:
        """Kinds of tensors at the peak by their bytes: bytes, how many, shape, dtype, what made them and when."""
        kinds: dict[LiveTensor, int] = defaultdict(int)
        for tensor in self._at_peak:
            kinds[tensor] += 1
        rows = sorted(kinds.items(), key=lambda item: -item[0].bytes * item[1])[:lines]
        return "\n".join(
            f"{kind.bytes * n:>14,} {n:>4} x {kind.shape!s:<20} {kind.dtype!s:<14} {kind.made_by} ({kind.phase})"
            for kind, n in rows
        )

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs the operation and counts what it made."""
        if getattr(func, "namespace", "").startswith(NAMESPACE):
            with self:  # the mode is off in here, and would miss what this library's kernels take from PyTorch
                result = func._op_dk(DispatchKey.CompositeExplicitAutograd, *args, **(kwargs or {}))
        else:
            result = func(*args, **(kwargs or {}))
        for value in tree_iter(result):
            if isinstance(value, Tensor):
                self._see(value, str(func))
        return result

    def _see(self, tensor: Tensor, made_by: str) -> None:
        if tensor.layout != torch.strided:
            for part in (tensor._indices(), tensor._values()):
                self._see(part, made_by)
            return
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if size == 0 or key in self._live:
            return

        def gone(_: object) -> None:
            del self._live[key]
            self.current -= size

        seen = LiveTensor(tuple(tensor.shape), tensor.dtype, size, made_by, self.phase)
        self._live[key] = (seen, weakref.ref(storage, gone))
        self.current += size
        if self.current > self.peak:
            self.reset_peak()
