"""GaLore with Adafactor: ``GaLoreFusedAdafactor``."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from galore_kernels.optim.base import LowRankOptimizer
from galore_kernels.optim.rules import Adafactor


class GaLoreFusedAdafactor(LowRankOptimizer):
    """GaLore with Adafactor (Zhao et al., arXiv 2403.03507; Shazeer and Stern, arXiv 1804.04235).

    Matrices keep the row and column means of the second moment of their projected gradient, L + r numbers beside the
    basis, and by default no first moment; everything else takes Adafactor at full rank. The mathematics is
    galore_torch's and transformers' (``galore_kernels.ops.galore_adafactor_update``); which matrices are projected is
    said as for ``GaLoreFusedAdam8bit``.

    The defaults are Adafactor's own: step sizes that follow the step and the size of each weight, and no learning
    rate. GaLore's experiments give one instead: ``lr=..., scale_parameter=False, relative_step=False``. Learning rate
    schedulers need that: they can't change ``lr=None``.

    On a GPU the CUDA and Triton backends project gradients and update projected weights; in between, on the small
    projected gradient, Adafactor is PyTorch's operations, as it is at full rank. Tensors are updated one by one, and
    the host waits for each.

    Args:
        params: as for ``GaLoreFusedAdam8bit``.
        lr: learning rate >= 0, a float or a 0-d tensor, or None with ``relative_step``.
        eps: two numbers >= 0: added to squared gradients; the least size of a weight for ``scale_parameter``.
        clip_threshold: the largest root mean square of an update before its step size, > 0.
        decay_rate: c <= 0 of the second moment's decay 1 - t^c in step t.
        beta1: decay of the first moment, in [0, 1), or None for none.
        weight_decay: decoupled decay, ``step size * weight_decay * w`` before the update; >= 0.
        scale_parameter: multiply step sizes by the root mean square of the (whole) weight.
        relative_step: the step size is min(1e-2, 1 / sqrt(t)) instead of ``lr``.
        warmup_init: with ``relative_step``, min(1e-6 t, 1 / sqrt(t)).
        rank, rank_budget, update_proj_gap, scale, proj_type, refresh_method, refresh_schedule, warm_start,
            async_refresh, basis_format: as for ``GaLoreFusedAdam8bit``.
        moments_on_refresh: "keep" them as they are, or, without ``relative_step``, "reset" them.
        stochastic_rounding, maximize, project_nd, seed: as for ``GaLoreFusedAdam8bit``.
        backend: as for ``GaLoreFusedAdam8bit``; at full rank "cuda" and "triton" mean "reference".

    Raises:
        ValueError, TypeError: an argument out of range; names argument, group and remedy.
    """

    rule = Adafactor()

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor | None = None,
        eps: tuple[float, float] = (1e-30, 1e-3),
        clip_threshold: float = 1.0,
        decay_rate: float = -0.8,
        beta1: float | None = None,
        weight_decay: float = 0.0,
        scale_parameter: bool = True,
        relative_step: bool = True,
        warmup_init: bool = False,
        *,
        rank: int | str | None = 128,
        rank_budget: int | None = None,
        update_proj_gap: int = 200,
        scale: float = 0.25,
        proj_type: str = "std",
        refresh_method: str = "randomized",
        refresh_schedule: str = "periodic",
        warm_start: bool = False,
        async_refresh: bool = False,
        moments_on_refresh: str = "keep",
        basis_format: str | None = None,
        stochastic_rounding: bool = False,
        maximize: bool = False,
        project_nd: bool = False,
        seed: int = 0,
        backend: str = "auto",
    ) -> None:
        options = {
            "lr": lr,
            "eps": eps,
            "clip_threshold": clip_threshold,
            "decay_rate": decay_rate,
            "beta1": beta1,
            "weight_decay": weight_decay,
            "scale_parameter": scale_parameter,
            "relative_step": relative_step,
            "warmup_init": warmup_init,
            "rank": rank,
            "rank_budget": rank_budget,
            "update_proj_gap": update_proj_gap,
            "scale": scale,
            "proj_type": proj_type,
            "refresh_method": refresh_method,
            "refresh_schedule": refresh_schedule,
            "warm_start": warm_start,
            "async_refresh": async_refresh,
            "moments_on_refresh": moments_on_refresh,
            "basis_format": basis_format,
            "stochastic_rounding": stochastic_rounding,
            "maximize": maximize,
            "project_nd": project_nd,
            "seed": seed,
        }
        super().__init__(params, options, backend)
