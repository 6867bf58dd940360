"""APOLLO's optimizers: ``APOLLOFusedAdamW`` and ``APOLLOFusedAdam8bit``."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from galore_kernels.optim.base import LowRankOptimizer
from galore_kernels.optim.rules import Apollo


class _ApolloAdam(LowRankOptimizer):
    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        rank: int | None = 128,
        update_proj_gap: int = 200,
        scale: float = 1.0,
        scale_type: str = "channel",
        proj: str = "random",
        proj_type: str = "std",
        scale_front: bool = False,
        norm_growth_limit: float | None = 1.01,
        refresh_method: str = "randomized",
        refresh_schedule: str = "periodic",
        stochastic_rounding: bool = False,
        maximize: bool = False,
        project_nd: bool = False,
        seed: int = 0,
        backend: str = "auto",
    ) -> None:
        options = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "rank": rank,
            "update_proj_gap": update_proj_gap,
            "scale": scale,
            "scale_type": scale_type,
            "proj": proj,
            "proj_type": proj_type,
            "scale_front": scale_front,
            "norm_growth_limit": norm_growth_limit,
            "refresh_method": refresh_method,
            "refresh_schedule": refresh_schedule,
            "stochastic_rounding": stochastic_rounding,
            "maximize": maximize,
            "project_nd": project_nd,
            "seed": seed,
        }
        super().__init__(params, options, backend)


class APOLLOFusedAdamW(_ApolloAdam):
    """APOLLO with float32 moments (Zhu et al., arXiv 2412.05270): Adam's memory at rank r, updates of full rank.

    A matrix' gradient is multiplied by factors, one for each row or column of its longer side: by how much Adam would
    scale the gradient's random projection to r dimensions. The basis is a function of a seed and is not kept, so that
    the state is the moments alone. Everything else takes full-rank Adam. The update is
    ``galore_kernels.ops.apollo_update``; which matrices are projected is said as for ``GaLoreFusedAdam8bit``.

    APOLLO-Mini is ``rank=1, scale_type="tensor", scale=128``: one factor for a matrix, and the state of plain SGD.

    Layers that were prepared with a rank (``galore_kernels.prepare``) are refused: what is scaled is the full gradient.
    Those prepared with ``rank=None, weights="int8"`` have one: their codes are updated, rounded stochastically by
    ``seed`` (Q-APOLLO).

    Args:
        params, lr, betas, eps, weight_decay: as for ``GaLoreFusedAdam8bit``.
        rank: r >= 1, or None for full rank. The paper's is a quarter of the hidden size, APOLLO-Mini's 1.
        update_proj_gap: steps T between bases, >= 1.
        scale: the gradient is multiplied by its root; > 0.
        scale_type: "channel", a factor for each index of the side that is not projected, or "tensor", one for all.
        proj: "random" (Gaussian), "rademacher" (+1 and -1), or "svd" (found in the gradient, and kept).
        proj_type: "std" projects the smaller dimension, "reverse_std" the larger, "left" rows, "right" columns.
        scale_front: multiply by the root of ``scale`` before the limiter instead of after.
        norm_growth_limit: a matrix' scaled gradient may grow by this factor in a step (Fira, arXiv 2410.01623), or
            None.
        refresh_method: with ``proj="svd"``, "randomized" or "svd".
        refresh_schedule: "periodic" or "staggered"; with ``proj="svd"`` also "adaptive".
        stochastic_rounding, maximize, project_nd, seed, backend: as for ``GaLoreFusedAdam8bit``. The seed is of the
            bases too.

    Raises:
        ValueError, TypeError: an argument out of range; names argument, group and remedy.
    """

    rule = Apollo(eight_bit=False)


class APOLLOFusedAdam8bit(_ApolloAdam):
    """APOLLO with 8-bit moments; everything else as ``APOLLOFusedAdamW``."""

    rule = Apollo(eight_bit=True)
