"""When the basis of a layer is found anew, and what is remembered of the last time."""

from __future__ import annotations

from dataclasses import dataclass, replace

REFRESH_SCHEDULES: tuple[str, ...] = ("periodic", "staggered", "adaptive")
"""The values of ``refresh_schedule``."""

MOMENTS_ON_REFRESH: tuple[str, ...] = ("keep", "rotate", "reset")
"""The values of ``moments_on_refresh``: what becomes of Adam's moments when the basis changes."""

# An adaptive interval doubles where a refresh found this much of the overlap that chance leaves open, or more, and
# halves below the other: 0 is two random subspaces (an overlap of r / S), 1 the same one.
STAYED_TO_GROW = 0.45
STAYED_TO_SHRINK = 0.1

# Its bounds, as multiples of the gap.
LONGEST_INTERVAL = 8
SHORTEST_INTERVAL = 0.25


@dataclass(frozen=True)
class RefreshRecord:
    """What is remembered of a layer's refreshes; its fields are part of the optimizer's state.

    Attributes:
        refreshes: how many found a basis. refreshed_at: steps taken before the last of them.
        counted_from: steps taken before Adam's step counter was last set back, 0 if it never was.
        next_refresh: the value of that counter from which on the next is due. interval: steps until then, from when it
            was planned.
        captured: estimated share |G @ P|_F^2 / |G|_F^2 of the gradient at the last refresh that its basis held.
        captured_cold: the same at the last refresh that began with a sketch.
        overlap: |P_old.T @ P_new|_F^2 / |P_new|_F^2 at the last refresh: 1 if the subspace stayed, whatever signs and
            rotations; r / S if nothing but chance is left of it. 0 at the first.
    """

    refreshes: int = 0
    refreshed_at: int = 0
    counted_from: int = 0
    next_refresh: int = 0
    interval: int = 0
    captured: float = 0.0
    captured_cold: float = 0.0
    overlap: float = 0.0


@dataclass(frozen=True)
class Schedule:
    """The steps at which a layer's basis is found: always the first, then

    - "periodic": T, 2T, 3T, ..., as galore_torch does;
    - "staggered": the same, moved by the layer's part of T, so that no step refreshes many layers;
    - "adaptive": begins as staggered; then the interval doubles, up to 8 T, where the subspace stays, and halves, down
      to T / 4, where it moves: see ``RefreshRecord.overlap``.

    Attributes:
        kind: one of ``REFRESH_SCHEDULES``. gap: T.
        phase: in [0, 1), the layer's part of T. chance: r / S, the overlap of random subspaces.
    """

    kind: str
    gap: int
    phase: float = 0.0
    chance: float = 0.0

    def due_at(self, record: RefreshRecord) -> int:
        """The value of the step counter from which on the layer needs a basis, or another one.

        As it was planned, or earlier if the gap has been lowered since.
        """
        if record.refreshes == 0:
            return 0
        return min(record.next_refresh, record.next_refresh - record.interval + self._longest())

    def planned(self, record: RefreshRecord, step: int, elapsed: int = 0) -> RefreshRecord:
        """``record``, which tells of a refresh in the gradient of step ``step``, with the time of the next.

        ``elapsed``: how many steps before the counter's zero that was, where it has been set back.
        """
        if self.kind == "periodic":
            interval = self.gap - step % self.gap
        elif record.refreshes <= 1:
            interval = round(self.phase * self.gap) % self.gap or self.gap
        elif self.kind == "staggered":
            interval = self.gap
        else:
            interval = self._adapted(record)
        return replace(record, next_refresh=step + interval - elapsed, interval=interval)

    def _longest(self) -> int:
        return LONGEST_INTERVAL * self.gap if self.kind == "adaptive" else self.gap

    def _adapted(self, record: RefreshRecord) -> int:
        interval = record.interval if record.refreshes > 2 else self.gap  # the first was cut to the phase
        stayed = (record.overlap - self.chance) / (1.0 - self.chance) if self.chance < 1.0 else 1.0
        if stayed >= STAYED_TO_GROW:
            interval *= 2
        elif stayed < STAYED_TO_SHRINK:
            interval //= 2
        return max(1, int(SHORTEST_INTERVAL * self.gap), min(interval, self._longest()))


def phases(costs: list[int]) -> list[float]:
    """Each layer's part of the gap: in the layers' order, and as far apart as what they cost to refresh."""
    total, begun, result = sum(costs), 0, []
    for cost in costs:
        result.append(begun / total)
        begun += cost
    return result
