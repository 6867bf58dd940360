"""A device backend that serves CPU tensors, so that the operations' tests run unmodified on a machine with a GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from galore_kernels.ops.adam import AdamOptions
from galore_kernels.ops.group import GroupUpdate, UpdateGroup
from galore_kernels.ops.registry import Backend

_CPU = torch.device("cpu")


class _Luggage:
    """What one call takes along: each storage once, whole, so that views of one buffer stay views of one buffer.

    Strides and offsets are kept, and with them every alignment up to that of an allocation.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._storages: dict[int, tuple[Tensor, Tensor]] = {}

    def packed(self, value: Any) -> Any:
        """The value with every CPU tensor in it on the device; containers and dataclasses are searched."""
        if isinstance(value, Tensor):
            return self._tensor(value) if value.device == _CPU else value
        if isinstance(value, (tuple, list)):
            return type(value)(self.packed(item) for item in value)
        if is_dataclass(value) and not isinstance(value, type):
            return replace(value, **{f.name: self.packed(getattr(value, f.name)) for f in fields(value)})
        return value

    def _tensor(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        address = storage.data_ptr()
        if address == 0:  # of no elements: nothing to share
            return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=self._device)
        if address not in self._storages:
            here = torch.empty(0, dtype=torch.uint8).set_(storage, 0, (storage.nbytes(),), (1,))
            self._storages[address] = (here, here.to(self._device, copy=True))
        there = self._storages[address][1]
        whole = there[: storage.nbytes() // tensor.itemsize * tensor.itemsize].view(tensor.dtype)
        return whole.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

    def bring_back(self) -> None:
        """Copies every storage back, also those that nothing should have changed: a test then sees if something has."""
        for here, there in self._storages.values():
            here.copy_(there)


def on_device(backend: Backend, device: torch.device) -> Backend:
    """The backend of that name which takes CPU tensors, runs ``backend`` on ``device`` and brings the results back.

    Tensors that are on a device already are passed on as they are.
    """

    def served(kernel: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            luggage = _Luggage(device)
            packed_args, packed_kwargs = luggage.packed(args), {k: luggage.packed(v) for k, v in kwargs.items()}
            result = kernel(*packed_args, **packed_kwargs)
            luggage.bring_back()
            on_cpu = not any(isinstance(arg, Tensor) and arg.device != _CPU for arg in args)
            return _to_cpu(result) if on_cpu else result

        return run

    def refuses(asked: torch.device) -> str | None:
        return None if asked == _CPU else backend.refuses(asked)

    return replace(
        backend,
        kernels={name: served(kernel) for name, kernel in backend.kernels.items()},
        refuses=refuses,
        group=None if backend.group is None else _served_group(backend.group, device),
    )


def _served_group(
    make: Callable[[UpdateGroup], GroupUpdate], device: torch.device
) -> Callable[[UpdateGroup], GroupUpdate]:
    def served(group: UpdateGroup) -> GroupUpdate:
        def update(grads: Sequence[Tensor], options: AdamOptions) -> None:
            luggage = _Luggage(device)
            make(luggage.packed(group))(luggage.packed(grads), luggage.packed(options))
            luggage.bring_back()

        return update

    return served


def _to_cpu(result: Any) -> Any:
    if isinstance(result, Tensor):
        return result.to(_CPU)
    return tuple(_to_cpu(item) for item in result) if isinstance(result, tuple) else result
