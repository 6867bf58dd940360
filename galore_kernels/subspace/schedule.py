"""When the basis of a layer is found anew, and what is remembered of the last time."""

from __future__ import annotations

from dataclasses import dataclass, replace

REFRESH_SCHEDULES: tuple[str, ...] = ("periodic", "staggered", "adaptive")
"""The values of ``refresh_schedule``."""

MOMENTS_ON_REFRESH: tuple[str, ...] = ("keep", "rotate", "reset")
"""The values of ``moments_on_refresh``: what becomes of Adam's moments when the basis changes."""

# An adaptive interval doubles where a refresh found this overlap or more, and halves below the other. Between the
# second and the bases of two random subspaces (r / S) lie layers whose directions have moved for the most part.
OVERLAP_TO_GROW = 0.6
OVERLAP_TO_SHRINK = 0.3

# Its bounds, as multiples of the gap.
LONGEST_INTERVAL = 8
SHORTEST_INTERVAL = 0.25


@dataclass(frozen=True)
class RefreshRecord:
    """What is remembered of a layer's refreshes; its fields are part of the optimizer's state.

    Attributes:
        refreshes: how many found a basis. refreshed_at: steps taken before the last of them.
        next_refresh: the value of Adam's step counter from which on the next is due. interval: steps until then.
        captured: estimated share |G @ P|_F^2 / |G|_F^2 of the gradient at the last refresh that its basis held.
        captured_cold: the same at the last refresh that began with a sketch.
        overlap: |P_old.T @ P_new|_F^2 / r at the last refresh: 1 if the subspace stayed, whatever signs and
            rotations; r / S if nothing but chance is left of it. 0 at the first.
    """

    refreshes: int = 0
    refreshed_at: int = 0
    next_refresh: int = 0
    interval: int = 0
    captured: float = 0.0
    captured_cold: float = 0.0
    overlap: float = 0.0

    def due(self, step: int) -> bool:
        """Whether a layer that has taken ``step`` steps needs a basis, or another one."""
        return self.refreshes == 0 or step >= self.next_refresh


@dataclass(frozen=True)
class Schedule:
    """The steps at which a layer's basis is found: always the first, then

    - "periodic": T, 2T, 3T, ..., as galore_torch does;
    - "staggered": the same, moved by the layer's part of T, so that no step refreshes many layers;
    - "adaptive": begins as staggered; then the interval doubles, up to 8 T, where the subspace stays, and halves, down
      to T / 4, where it moves: see ``RefreshRecord.overlap``.

    Attributes:
        kind: one of ``REFRESH_SCHEDULES``. gap: T.
        phase: in [0, 1), the layer's part of T.
    """

    kind: str
    gap: int
    phase: float = 0.0

    def planned(self, record: RefreshRecord, step: int) -> RefreshRecord:
        """``record``, which tells of a refresh just made with the counter at ``step``, with the time of the next."""
        if self.kind == "periodic":
            interval = self.gap - step % self.gap
        elif record.refreshes <= 1:
            interval = round(self.phase * self.gap) % self.gap or self.gap
        elif self.kind == "staggered":
            interval = self.gap
        else:
            interval = self._adapted(record)
        return replace(record, next_refresh=step + interval, interval=interval)

    def _adapted(self, record: RefreshRecord) -> int:
        last = record.interval if record.refreshes > 2 else self.gap  # the first was cut to the phase
        if record.overlap >= OVERLAP_TO_GROW:
            return min(2 * last, LONGEST_INTERVAL * self.gap)
        if record.overlap < OVERLAP_TO_SHRINK:
            return max(last // 2, int(SHORTEST_INTERVAL * self.gap), 1)
        return last


def phases(costs: list[int]) -> list[float]:
    """Each layer's part of the gap: in the layers' order, and as far apart as what they cost to refresh."""
    total, begun, result = sum(costs), 0, []
    for cost in costs:
        result.append(begun / total)
        begun += cost
    return result
