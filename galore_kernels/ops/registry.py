"""Which backend serves a call: asked for by name, or the first that supports it. Never guessed, never silent."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass
from typing import Any

import torch

from galore_kernels.ops.group import ADAM_OPERATIONS, GroupUpdate, UpdateGroup

#: The order in which ``backend="auto"`` asks.
AUTO_ORDER = ("cuda", "triton", "cpu", "reference")


@dataclass(frozen=True)
class Backend:
    """One implementation of the operations.

    Attributes:
        name: the name users ask for.
        kernels: operation name -> callable with the signature that the operation's contract documents.
        refuses: device -> the reason why this backend can't serve tensors there, or None if it can.
        describe: what ``backend_info()`` tells of it (plain data).
        group: makes the update of a group of tensors (``galore_kernels.ops.group``), or None if it takes them singly.
        grouped: the operations of those groups.
        group_is_one_call: whether such an update is one call, which an interrupt finds done or not begun.
    """

    name: str
    kernels: Mapping[str, Callable[..., Any]]
    refuses: Callable[[torch.device], str | None]
    describe: Callable[[], dict[str, Any]]
    group: Callable[[UpdateGroup], GroupUpdate] | None = None
    grouped: Set[str] = ADAM_OPERATIONS
    group_is_one_call: bool = False


_backends: dict[str, Backend] = {}


def register(backend: Backend) -> None:
    """Adds a backend. Called once by each module in ``galore_kernels.backends``."""
    if backend.name not in AUTO_ORDER:
        raise ValueError(f"backend name {backend.name!r}: expected one of {', '.join(AUTO_ORDER)}")
    _backends[backend.name] = backend


def check_backend_name(name: str) -> None:
    """Raises ValueError unless ``name`` is "auto" or a backend of this build."""
    if name != "auto" and name not in _backends:
        known = ", ".join(["auto", *(b for b in AUTO_ORDER if b in _backends)])
        raise ValueError(f"backend={name!r}: this build has {known}; choose one of these")


def _refusal(backend: Backend, op: str, device: torch.device) -> str | None:
    if op not in backend.kernels:
        return f"it does not implement {op}"
    return backend.refuses(device)


def select(op: str, name: str, device: torch.device) -> Backend:
    """The backend that serves ``op`` on ``device``.

    Raises:
        ValueError: no backend of that name is in this build.
        RuntimeError: the named backend (or, for "auto", every backend) can't serve the call; the message says why.
    """
    check_backend_name(name)
    candidates = [b for b in AUTO_ORDER if b in _backends] if name == "auto" else [name]
    refusals = []
    for candidate in candidates:
        backend = _backends[candidate]
        reason = _refusal(backend, op, device)
        if reason is None:
            return backend
        refusals.append(f"{candidate}: {reason}")
    raise RuntimeError(
        f"backend={name!r} can't serve {op} on {device}: {'; '.join(refusals)}. "
        'Move the tensors, or pass backend="auto" or "reference".'
    )


def implements(op: str, name: str) -> bool:
    """Whether the backend of that name, or for "auto" any, has the operation, on whatever device."""
    return name == "auto" or op in _backends[name].kernels


def kernel(op: str, name: str, device: torch.device) -> Callable[..., Any]:
    """The callable that serves ``op``; errors as :func:`select`."""
    return select(op, name, device).kernels[op]


def backend_info() -> dict[str, dict[str, Any]]:
    """What this build can run: backend name -> operations, availability with the reason if not, and build facts.

    ``auto`` chooses per call, in the order of the keys, the first whose device matches.
    """
    info: dict[str, dict[str, Any]] = {}
    for name in AUTO_ORDER:
        if name not in _backends:
            info[name] = {"available": False, "reason": "not part of this build"}
            continue
        backend = _backends[name]
        info[name] = {"available": True, "operations": sorted(backend.kernels), **backend.describe()}
    return info
