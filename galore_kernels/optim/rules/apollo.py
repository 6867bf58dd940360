"""APOLLO: the projected gradient's moments say by how much the gradient itself is scaled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from galore_kernels import ops
from galore_kernels.ops.apollo_update import SCALINGS
from galore_kernels.optim.options import AUTO, expect, expect_choice, number
from galore_kernels.optim.rules.adam import Adam
from galore_kernels.optim.state import adam_state

if TYPE_CHECKING:
    from galore_kernels.optim.state import Layout

#: The values of ``proj``, with the family that is drawn; "svd" is found in the gradient.
PROJECTIONS = {"random": "gaussian", "rademacher": "rademacher", "svd": None}

#: What only makes sense of bases that are found in gradients: key -> its one value with the others.
_OF_FOUND_BASES = {
    "refresh_schedule": ("periodic", "staggered"),
    "warm_start": (False,),
    "async_refresh": (False,),
    "moments_on_refresh": ("keep", "reset"),
}


class Apollo(Adam):
    """Adam's moments of the projection, of which only norms are used; full-rank tensors take Adam."""

    own_keys = (*Adam.own_keys, "proj", "scale_type", "scale_front", "norm_growth_limit")
    structural = ("proj",)
    # Set back with them: the first steps after a reset are several times as long as the limiter would let grow.
    moment_names = (*Adam.moment_names, "scaled_norm")
    takes_lowrank = False
    takes_shards = False
    served_by = "apollo_update"

    def check(self, group: Mapping[str, Any], where: str) -> None:
        super().check(group, where)
        expect_choice(where, group, "proj", tuple(PROJECTIONS))
        expect_choice(where, group, "scale_type", SCALINGS)
        front, limit, rank = group["scale_front"], group["norm_growth_limit"], group["rank"]
        expect(where, "scale_front", front, isinstance(front, bool), "True or False", "pass a bool")
        growth = number(limit)
        ok = limit is None or (growth is not None and 1.0 <= growth < float("inf"))
        expect(where, "norm_growth_limit", limit, ok, "a finite number >= 1, or None for no limit", "1.01 is usual")
        expect(where, "rank", rank, rank != AUTO, "an integer >= 1, or None", "of a random basis nothing can be chosen")
        basis_format, proj_type = group["basis_format"], group["proj_type"]
        expect(where, "basis_format", basis_format, basis_format is None, "None", "leave it out")
        expect(where, "proj_type", proj_type, proj_type != "full", "a projection of one side", 'pass "std"')
        if self.draws(group):
            for key, values in _OF_FOUND_BASES.items():
                one = " or ".join(map(repr, values))
                expect(where, key, group[key], group[key] in values, f'{one} unless proj="svd"', "leave it out")

    def draws(self, group: Mapping[str, Any]) -> bool:
        return PROJECTIONS[group["proj"]] is not None

    def new_tensors(self, layout: Layout, device: torch.device) -> dict[str, Any]:
        tensors = super().new_tensors(layout, device)
        if layout.rank is not None:
            tensors["scaled_norm"] = torch.zeros((), dtype=torch.float32, device=device)
        return tensors

    def update(
        self,
        weight: Tensor,
        grad: Tensor,
        state: Mapping[str, Any],
        options: Any,
        group: Mapping[str, Any],
        layout: Layout,
        *,
        is_lowrank: bool,
        weight_scale: Tensor | None,
        backend: str,
    ) -> None:
        if layout.side is None:
            ops.adam8bit_update(weight, grad, adam_state(state), options, backend=backend)
            return
        ops.apollo_update(
            weight,
            grad,
            _basis(state, group, layout),
            adam_state(state),
            state["scaled_norm"],
            options,
            _options(group),
            side=layout.side,
            weight_scale=weight_scale,
            backend=backend,
        )

    def operation(self, layout: Layout, *, is_lowrank: bool) -> str:
        return "adam8bit_update" if layout.side is None else "apollo_update"

    def group_fields(
        self, group: Mapping[str, Any], layout: Layout, states: Sequence[Mapping[str, Any]]
    ) -> dict[str, Any]:
        if layout.side is None:
            return {}
        return {
            "bases": tuple(_basis(state, group, layout) for state in states),
            "side": layout.side,
            "scaled_norms": tuple(state["scaled_norm"] for state in states),
            "apollo": _options(group),
        }


def _basis(state: Mapping[str, Any], group: Mapping[str, Any], layout: Layout) -> Tensor | ops.RandomBasis:
    family = PROJECTIONS[group["proj"]]
    return state["basis"] if family is None else ops.RandomBasis(layout.rank or 0, state["basis_seed"], family)


def _options(group: Mapping[str, Any]) -> ops.ApolloOptions:
    limit = group["norm_growth_limit"]
    return ops.ApolloOptions(
        scale=float(group["scale"]),
        scaling=group["scale_type"],
        scale_front=group["scale_front"],
        norm_growth_limit=None if limit is None else float(limit),
    )
