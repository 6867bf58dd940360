"""What the host knows of the step counters on a device, so that a step asks the device for them when it must only."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(eq=False)
class Counter:
    """The counters of one parameter's state as they were last read.

    Attributes:
        step, skipped: the state's tensors, 0-d.
        steps: what ``step`` was when the optimizer had been called ``calls`` times. A call adds one at most (a
            skipped step adds none), so that ``steps`` plus the calls since then is a bound from above.
        skips: the largest value of ``skipped`` that the user has been told of, or that was there at the start.
        captured: a CUDA graph holds steps of this state; its replays count without the optimizer being called.
        adds_skips: ``steps`` are those taken and those skipped, as the schedule of a part counts them.
    """

    step: Tensor
    skipped: Tensor
    steps: int
    calls: int
    skips: int
    captured: bool = False
    adds_skips: bool = False

    def call_of(self, step: int) -> int:
        """The earliest call before which ``step`` may be reached, replays of graphs apart."""
        return self.calls + max(0, step - self.steps)


class Counters:
    """The counters of all states that are updated in groups.

    Attributes:
        calls: of the optimizer's ``step``, before the present one.
    """

    def __init__(self) -> None:
        self.calls = 0
        # By the id of ``step``, which the counter keeps alive: no other tensor can have it.
        self._known: dict[int, Counter] = {}

    def of(self, state: Mapping[str, Any]) -> Counter | None:
        """The counter of ``state`` if it is known."""
        known = self._known.get(id(state["step"]))
        return known if known is not None and known.skipped is state["skipped"] else None

    def note(self, state: Mapping[str, Any], steps: int, before: int, skips: int) -> int:
        """Takes over values read after the present call's update of a state that had skipped ``before`` steps until it.

        Returns the skips known until now: ``before``, or fewer if groups have skipped some since it was last read.
        """
        known = self.of(state)
        if known is None:
            known = Counter(state["step"], state["skipped"], steps, self.calls + 1, before)
            self._known[id(known.step)] = known
        before = known.skips
        known.steps, known.calls, known.skips = steps, self.calls + 1, skips
        return before

    def watch(self, states: Sequence[Mapping[str, Any]], *, adds_skips: bool = False) -> list[Counter]:
        """The counters of states on one device; those not known are read, all at once."""
        unknown = [state for state in states if self.of(state) is None]
        if unknown:
            steps = read([state["step"] for state in unknown])
            skips = read([state["skipped"] for state in unknown])
            for state, step, skip in zip(unknown, steps, skips, strict=True):
                counted = step + (skip if adds_skips else 0)
                self._known[id(state["step"])] = Counter(state["step"], state["skipped"], counted, self.calls, skip)
        found = [self._known[id(state["step"])] for state in states]
        for counter in found:
            counter.adds_skips = adds_skips
        return found

    def update(self, counters: Sequence[Counter]) -> None:
        """Reads ``steps`` of counters on one device."""
        sums = [counter.step + counter.skipped if counter.adds_skips else counter.step for counter in counters]
        for counter, steps in zip(counters, read(sums), strict=True):
            counter.steps, counter.calls = steps, self.calls

    def keep(self, states: Iterable[Mapping[str, Any]]) -> None:
        """Forgets all but those of ``states``."""
        kept = (self.of(state) for state in states if state)
        self._known = {id(counter.step): counter for counter in kept if counter is not None}


def read(tensors: Sequence[Tensor]) -> list[int]:
    """The values of 0-d tensors on one device, waiting for it once."""
    return [int(value) for value in torch.stack(list(tensors)).tolist()]
