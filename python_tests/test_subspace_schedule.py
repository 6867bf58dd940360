"""When a basis is refreshed: the three schedules by themselves."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from galore_kernels.subspace import REFRESH_SCHEDULES, RefreshRecord, Schedule, phases


def refreshes(schedule: Schedule, steps: int, overlaps: list[float], start: int = 0) -> list[int]:
    """The steps from ``start`` on at which a layer is refreshed, with these overlaps (repeated) from the second on."""
    record, at = RefreshRecord(), []
    source = itertools.cycle(overlaps)
    for step in range(start, start + steps):
        if step >= schedule.due_at(record):
            at.append(step)
            overlap = next(source) if record.refreshes else 0.0
            found = replace(record, refreshes=record.refreshes + 1, refreshed_at=step, overlap=overlap)
            record = schedule.planned(found, step)
            assert record.next_refresh == step + record.interval > step
    return at


@given(gap=st.integers(1, 12), start=st.integers(0, 30), phase=st.floats(0, 1, exclude_max=True))
def test_periodic_is_every_multiple_of_the_gap(gap: int, start: int, phase: float) -> None:
    # A first basis may come late, where the first gradients were zero: galore_torch's multiples stay.
    expected = sorted({start, *(step for step in range(start, start + 60) if step % gap == 0)})
    assert refreshes(Schedule("periodic", gap, phase), 60, [0.0], start) == expected


@given(gap=st.integers(1, 40), phase=st.floats(0, 1, exclude_max=True))
def test_staggered_is_periodic_at_the_layers_place(gap: int, phase: float) -> None:
    at = refreshes(Schedule("staggered", gap, phase), 200, [0.0])
    assert at[0] == 0
    assert at[1:] == list(range(round(phase * gap) % gap or gap, 200, gap))


@given(costs=st.lists(st.integers(1, 1000), min_size=1, max_size=60))
def test_phases_are_in_order_and_as_far_apart_as_the_costs(costs: list[int]) -> None:
    found = phases(costs)
    assert found[0] == 0.0
    assert all(0 <= phase < 1 for phase in found)
    steps = [after - before for before, after in itertools.pairwise([*found, 1.0])]
    assert steps == pytest.approx([cost / sum(costs) for cost in costs])


def test_staggered_layers_of_one_size_share_no_step_but_the_first() -> None:
    gap = 100
    at = [refreshes(Schedule("staggered", gap, phase), 500, [0.0]) for phase in phases([7] * gap)]
    later = [step for own in at for step in own if step > gap]
    assert len(later) == len(set(later)) == 399  # each of the steps 101 to 499 once


def test_adaptive_doubles_where_the_subspace_stays_and_halves_where_it_moves() -> None:
    gap = 8
    # From the first interval, which is cut to the layer's place, on; 8 T and T / 4 are the bounds.
    assert refreshes(Schedule("adaptive", gap, 0.5), 300, [1.0])[:6] == [0, 4, 20, 52, 116, 180]
    assert refreshes(Schedule("adaptive", gap, 0.0), 40, [0.0])[:8] == [0, 8, 12, 14, 16, 18, 20, 22]
    assert refreshes(Schedule("adaptive", gap, 0.0), 60, [0.3])[:6] == [0, 8, 16, 24, 32, 40]  # in between: as it was


@given(gap=st.integers(1, 50), phase=st.floats(0, 1, exclude_max=True), overlaps=st.lists(st.floats(0, 1), min_size=1))
def test_adaptive_stays_within_its_bounds(gap: int, phase: float, overlaps: list[float]) -> None:
    at = refreshes(Schedule("adaptive", gap, phase), 1000, overlaps)
    gaps = [after - before for before, after in itertools.pairwise(at[1:])]
    assert all(max(1, gap // 4) <= interval <= 8 * gap for interval in gaps)


@pytest.mark.parametrize("kind", REFRESH_SCHEDULES)
def test_a_layer_without_a_basis_is_due_at_every_step(kind: str) -> None:
    schedule = Schedule(kind, 10)
    assert schedule.due_at(schedule.planned(RefreshRecord(), 0)) == 0


@pytest.mark.parametrize(("kind", "longest"), [("periodic", 5), ("staggered", 5), ("adaptive", 40)])
def test_a_lowered_gap_is_kept_to_at_once(kind: str, longest: int) -> None:
    record = Schedule(kind, 1000, 0.5).planned(RefreshRecord(refreshes=2, interval=1000), 2000)
    assert Schedule(kind, 5, 0.5).due_at(record) == 2000 + longest
    assert Schedule(kind, 2000, 0.5).due_at(record) == record.next_refresh  # a raised one from the next on


def test_where_the_counter_was_set_back_the_interval_counts_from_the_gradients_step() -> None:
    record = Schedule("periodic", 5).planned(RefreshRecord(refreshes=2), 0, elapsed=1)
    assert (record.next_refresh, record.interval) == (4, 5)


def test_an_adaptive_interval_asks_how_much_of_the_subspace_stayed_beyond_chance() -> None:
    found = RefreshRecord(refreshes=4, interval=10, overlap=0.6)
    assert Schedule("adaptive", 10, 0.0, chance=0.1).planned(found, 100).interval == 20
    assert Schedule("adaptive", 10, 0.0, chance=0.5).planned(found, 100).interval == 10
    assert Schedule("adaptive", 10, 0.0, chance=0.6).planned(found, 100).interval == 5
    assert Schedule("adaptive", 10, 0.0, chance=1.0).planned(found, 100).interval == 20  # a whole space stays
