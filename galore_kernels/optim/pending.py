"""Asynchronous refreshes: bases being found beside the training step, in copies of its gradients, for the next one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from galore_kernels.optim.refresh import find_bases
from galore_kernels.optim.update import Update
from galore_kernels.subspace import Subspace

Found = dict[str, Subspace]


class Pending:
    """Refreshes begun in one step and taken over at the beginning of the next: never in between, on any device.

    On a GPU the search runs on a stream of its own, beside the forward and backward pass that follow. On the CPU,
    which has no time to spare, it runs at once, to the same effect.
    """

    def __init__(self) -> None:
        self._begun: list[tuple[Update, Found, int, torch.cuda.Event | None]] = []
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def devices(self) -> set[torch.device]:
        """Where there are parameters whose refreshes have begun."""
        return {update.param.device for update, *_ in self._begun}

    def begin(self, update: Update, state: Mapping[str, Any], step: int) -> None:
        """Finds the bases in a copy of the parameter's gradient, that of step number ``step``."""
        device = update.param.device
        if device.type != "cuda":
            self._begun.append((update, find_bases(update, state, update.grad), step, None))
            return
        gradient = update.grad.clone()  # the next backward pass may write into the gradient's memory
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        stream, current = self._streams[device], torch.cuda.current_stream(device)
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            found = find_bases(update, state, gradient)
            done = torch.cuda.Event()
            done.record(stream)
        gradient.record_stream(stream)
        self._begun.append((update, found, step, done))

    def finished(self) -> Iterator[tuple[Update, Found, int]]:
        """(parameter, what was found, number of the step) of all refreshes begun; each is given once."""
        begun, self._begun = self._begun, []
        for update, found, step, done in begun:
            if done is not None:
                current = torch.cuda.current_stream(update.param.device)
                current.wait_event(done)
                for subspace in found.values():
                    subspace.basis.record_stream(current)
                    subspace.captured.record_stream(current)
            yield update, found, step
