"""Ranks of layers from the energy that their gradients' leading directions hold, within a budget of bytes."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

RANK_MULTIPLE = 16
"""Chosen ranks are multiples of this: what matrix units multiply without padding."""


#: Minus the worth of a byte, the rank so far (of two that are worth the same the lower gets more), the layer.
_Offer = tuple[float, int, int]


@dataclass(frozen=True)
class RankChoices:
    """What a layer offers at the ranks 16, 32, ...

    Attributes:
        captured: share of the gradient's energy that a basis of that rank holds, rising.
        bytes: of optimizer state at that rank, rising.
        elements: of the weight.
    """

    captured: Sequence[float]
    bytes: Sequence[int]
    elements: int


def choose_ranks(layers: Sequence[RankChoices], budget: int) -> list[int]:
    """The rank of each layer, a multiple of 16: all together in ``budget`` bytes.

    Beginning with 16 each, the next 16 columns go to the layer where a byte captures the largest share of a layer's
    energy, times the layer's elements, as long as they fit: layers of equal spectra get equal ranks, and 16 columns
    that hold nothing but noise are not bought at all.

    Raises:
        ValueError: the budget is less than rank 16 of all layers takes.
    """
    left = budget - sum(layer.bytes[0] for layer in layers)
    if left < 0:
        raise ValueError(
            f"rank_budget={budget}: expected at least {budget - left} bytes, which rank {RANK_MULTIPLE} of all "
            f"{len(layers)} matrices takes; raise it, or project fewer matrices"
        )
    places = [0] * len(layers)
    worth: list[_Offer] = []
    for index in range(len(layers)):
        _offer(worth, layers[index], index, 0)
    while worth:
        *_, index = heapq.heappop(worth)
        layer, place = layers[index], places[index]
        cost = layer.bytes[place + 1] - layer.bytes[place]
        if cost <= left:
            left -= cost
            places[index] += 1
            _offer(worth, layer, index, place + 1)
    return [RANK_MULTIPLE * (place + 1) for place in places]


def _offer(worth: list[_Offer], layer: RankChoices, index: int, place: int) -> None:
    if place + 1 < len(layer.captured):
        gain = (layer.captured[place + 1] - layer.captured[place]) * layer.elements
        if gain > 0:
            heapq.heappush(worth, (-gain / (layer.bytes[place + 1] - layer.bytes[place]), place, index))
