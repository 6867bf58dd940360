"""Which tensors' steps were skipped on a device: found out a few steps late, without ever waiting for the device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from galore_kernels.optim.counters import Counter

#: Calls between two looks. To gather the counters of a 7B model's 291 tensors takes the host about 0.1 ms, which is not
#: to be had in every step; a run whose gradients are broken is told of it within seconds all the same. Where graphs are
#: replayed in between, calls are rare, and each of them looks.
CALLS_BETWEEN_LOOKS = 16

Watched = Sequence[tuple[str, Counter]]


def to_host(values: Tensor) -> tuple[Tensor, Callable[[], bool]]:
    """A copy of ``values`` on the host, to be read once the function beside it returns True."""
    if values.device.type != "cuda":
        return values.cpu(), lambda: True
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    host.copy_(values, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record(torch.cuda.current_stream(values.device))
    return host, copied.query


class SkipMonitor:
    """Copies the ``skipped`` counters to the host now and then. For each device one copy at most is on its way."""

    def __init__(self) -> None:
        self._due: dict[torch.device, int] = {}
        self._copies: dict[torch.device, tuple[Watched, Tensor, Callable[[], bool]]] = {}

    def look(self, calls: int, device: torch.device, watched: Watched) -> Iterator[tuple[str, int, int]]:
        """(name, number known so far, number now) of tensors on ``device`` of which more steps have been skipped.

        Whoever takes a triple has told of it: its counter is then up to date.

        Args:
            calls: of the optimizer so far.
            watched: names and counters of the tensors on ``device``, at least one.
        """
        news: list[tuple[str, Counter, int]] = []
        if device in self._copies and self._copies[device][2]():
            seen, values, _ = self._copies.pop(device)
            counts = values.tolist()
            news = [
                (name, counter, count)
                for (name, counter), count in zip(seen, counts, strict=True)
                if count > counter.skips
            ]
        due = calls >= self._due.get(device, 0) or any(counter.captured for _, counter in watched)
        if device not in self._copies and due:
            self._due[device] = calls + CALLS_BETWEEN_LOOKS
            self._copies[device] = (watched, *to_host(torch.stack([counter.skipped for _, counter in watched])))
        for name, counter, count in news:
            before, counter.skips = counter.skips, count
            yield name, before, count
