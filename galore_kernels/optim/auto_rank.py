"""``rank="auto"``: the ranks of a group's matrices, chosen once from the gradients of the first step."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from galore_kernels.optim.options import AUTO, matrix_shape
from galore_kernels.optim.state import Layout, tensor_bytes
from galore_kernels.optim.update import Update, derived_seed
from galore_kernels.subspace import RANK_MULTIPLE, RankChoices, choose_ranks, find_subspace

#: A layer may get so many times what all would get of equal ranks: the search for its spectrum ends there.
MOST_OF_EQUAL = 4

LayoutOf = Callable[[Tensor, Mapping[str, Any]], Layout]


def undecided(group: Mapping[str, Any]) -> bool:
    """Whether the group's ranks are still to be chosen."""
    return group["rank"] == AUTO and group["chosen_ranks"] is None


def finite(updates: Sequence[Update]) -> bool:
    """Whether all gradients are."""
    return all(bool(torch.isfinite(update.grad).all()) for update in updates)


def check_budget(group: Mapping[str, Any], layout_of: LayoutOf) -> None:
    """Raises ValueError if the group's budget is less than its matrices take at least."""
    choose_ranks([_choices(param, group, layout_of, 1, [0.0]) for param in _matrices(group, layout_of)],
                 group["rank_budget"])  # fmt: skip


def chosen_ranks(group: Mapping[str, Any], layout_of: LayoutOf, first_index: int) -> tuple[int, ...] | None:
    """A rank for each of the group's parameters (0 at full rank); None if no gradient of a matrix holds any energy.

    A matrix without a gradient, or with one of zeros, is taken for the mean of the others.

    Args:
        first_index: of the group's parameters among all, for the seeds.
    """
    matrices = _matrices(group, layout_of)
    limits = [min(matrix_shape(param.shape)) // RANK_MULTIPLE for param in matrices]
    limits = _within_reach(matrices, group, layout_of, limits)
    places = {id(param): first_index + i for i, param in enumerate(group["params"])}
    spectra = [
        _captured(param, limit, derived_seed(group["seed"], places[id(param)], "rank"))
        for param, limit in zip(matrices, limits, strict=True)
    ]
    known = [spectrum for spectrum in spectra if spectrum is not None]
    if not known:
        return None
    mean = _mean(known, max(limits))
    layers = [
        _choices(param, group, layout_of, limit, mean[:limit] if spectrum is None else spectrum)
        for param, limit, spectrum in zip(matrices, limits, spectra, strict=True)
    ]
    ranks = dict(zip(map(id, matrices), choose_ranks(layers, group["rank_budget"]), strict=True))
    return tuple(ranks.get(id(param), 0) for param in group["params"])


def _matrices(group: Mapping[str, Any], layout_of: LayoutOf) -> list[Tensor]:
    return [param for param in group["params"] if layout_of(param, group).rank is not None]


def _within_reach(
    matrices: Sequence[Tensor], group: Mapping[str, Any], layout_of: LayoutOf, limits: Sequence[int]
) -> list[int]:
    """``limits``, cut to what a layer may get of the budget."""

    def bytes_of_equal(place: int) -> int:
        pairs = zip(matrices, limits, strict=True)
        return sum(_bytes_at(param, group, layout_of, RANK_MULTIPLE * min(place, limit)) for param, limit in pairs)

    equal = bisect.bisect_right(range(1, max(limits) + 1), group["rank_budget"], key=bytes_of_equal)
    return [min(limit, MOST_OF_EQUAL * max(1, equal)) for limit in limits]


def _bytes_at(param: Tensor, group: Mapping[str, Any], layout_of: LayoutOf, rank: int) -> int:
    layout = layout_of(param, {**group, "params": [param], "chosen_ranks": (rank,)})
    return tensor_bytes(layout.new_state(torch.empty_like(param, device="meta")))


def _choices(
    param: Tensor, group: Mapping[str, Any], layout_of: LayoutOf, limit: int, captured: Sequence[float]
) -> RankChoices:
    ranks = range(RANK_MULTIPLE, RANK_MULTIPLE * limit + 1, RANK_MULTIPLE)
    return RankChoices(captured, [_bytes_at(param, group, layout_of, rank) for rank in ranks], param.numel())


def _captured(param: Tensor, limit: int, seed: int) -> list[float] | None:
    """Shares of the gradient's energy at the ranks 16, 32, ...; None if it holds none."""
    if param.grad is None:
        return None
    matrix = param.grad.reshape(matrix_shape(param.shape))
    found = find_subspace(matrix, RANK_MULTIPLE * limit, seed=seed)
    if not found.found:
        return None
    return found.shares.view(limit, RANK_MULTIPLE).sum(dim=1).cumsum(dim=0).tolist()


def _mean(spectra: Sequence[Sequence[float]], length: int) -> list[float]:
    """Their mean, each continued by its last value."""
    columns = zip(*([*spectrum, *[spectrum[-1]] * (length - len(spectrum))] for spectrum in spectra), strict=True)
    return [sum(column) / len(spectra) for column in columns]
