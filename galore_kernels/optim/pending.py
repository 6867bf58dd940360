"""Asynchronous refreshes: bases being found beside the training step, in copies of its gradients, for the next one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import torch
from torch import Tensor

from galore_kernels.optim.refresh import Found, find_bases
from galore_kernels.optim.update import Update

Search = tuple[Found, torch.cuda.Event | None]


class Pending:
    """Refreshes begun in one step and taken over at the beginning of the next: never in between, on any device.

    On a GPU the search runs on a stream and in a thread of its own (it reads numbers back, for which a host waits),
    beside the forward and backward pass that follow. On the CPU, which has no time to spare, and of gradients that
    processes have parts of, whose collectives need one order, it runs at once, to the same effect.

    Where TF32 is allowed, products of float32 training steps that run beside a search are kept from it, as the search's
    are (PyTorch's switch is one for all threads): their last bits then depend on what ran when.
    """

    def __init__(self) -> None:
        self._begun: list[tuple[Update, int, Future[Search]]] = []
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._threads = ThreadPoolExecutor(max_workers=1, thread_name_prefix="galore-refresh")  # started at first use

    def devices(self) -> set[torch.device]:
        """Where there are parameters whose searches are kept."""
        return {update.param.device for update, *_ in self._begun}

    def begin(self, update: Update, state: Mapping[str, Any], found: Found | None) -> Future[Search]:
        """Begins to find the bases in a copy of the parameter's gradient; to be handed to ``keep``, or dropped.

        ``found``: them, if they are found already.
        """
        device = update.param.device
        future: Future[Search]
        if found is not None:
            future = Future()
            future.set_result((found, None))
        elif device.type != "cuda" or update.layout.shard is not None:
            future = Future()
            future.set_result((find_bases([update], [state], [update.grad])[0], None))
        else:
            gradient = update.grad.clone()  # the next backward pass may write into the gradient's memory
            copied = torch.cuda.Event()
            copied.record(torch.cuda.current_stream(device))
            if device not in self._streams:
                self._streams[device] = torch.cuda.Stream(device)
            future = self._threads.submit(_search, update, state, gradient, copied, self._streams[device])
        return future

    def keep(self, update: Update, search: Future[Search], step: int) -> None:
        """Remembers a search in the gradient of step number ``step``, which was taken."""
        self._begun.append((update, step, search))

    def finished(self) -> Iterator[tuple[Update, Found, int]]:
        """(parameter, what was found, number of the step) of all that are kept; each is given once.

        Whoever can't use what he is given, or asks for a search that failed, loses that one alone, which is then still
        due.
        """
        while self._begun:
            update, step, search = self._begun[0]
            wait([search])  # an interrupt here loses nothing
            del self._begun[0]
            found, done = search.result()
            if done is not None:
                current = torch.cuda.current_stream(update.param.device)
                current.wait_event(done)
                for subspace in found.values():
                    for tensor in (subspace.basis, subspace.captured):
                        tensor.record_stream(current)
            yield update, found, step


def _search(
    update: Update, state: Mapping[str, Any], gradient: Tensor, copied: torch.cuda.Event, stream: torch.cuda.Stream
) -> Search:
    with torch.cuda.stream(stream):
        stream.wait_event(copied)
        gradient.record_stream(stream)
        found = find_bases([update], [state], [gradient])[0]
        done = torch.cuda.Event()
        done.record(stream)
    return found, done
