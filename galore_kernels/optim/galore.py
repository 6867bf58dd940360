"""GaLore's optimizers: ``GaLoreFusedAdam8bit`` and ``GaLoreFusedAdamW``."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from galore_kernels.optim.base import LowRankOptimizer
from galore_kernels.optim.rules import Adam


class GaLoreAdam(LowRankOptimizer):
    """Adam in the gradient's low-rank subspace: what both public optimizers are, but for the format of the moments."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
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
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
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


class GaLoreFusedAdam8bit(GaLoreAdam):
    """GaLore with 8-bit Adam moments (Zhao et al., arXiv 2403.03507; Dettmers et al., arXiv 2110.02861).

    Matrices keep Adam's moments in a rank-r subspace of their gradient, found anew every ``update_proj_gap`` steps;
    everything else (norms, biases, what is left out) takes full-rank 8-bit Adam, and tensors whose moments have fewer
    than 4096 elements keep them in float32. The update is ``galore_kernels.ops.galore_update``.

    Which matrices are projected: given an iterable of parameters, every matrix with min(m, n) > rank (name the ones
    you mean with ``galore_param_groups``: embeddings are matrices too); given groups of which some carry ``rank``,
    exactly those groups' matrices, the rank clamped to min(m, n). ``rank=None`` means full rank.

    Parameters may be DTensors that processes have rows of, as ``fully_shard`` makes them: each updates its own. On the
    right side that needs no collective but to refresh; on the left R is summed over the processes, which all keep its
    moments. All have to make the optimizer, with the same options, which they compare. Not with rank="auto",
    proj_type="full" or moments_on_refresh="reset".

    Args:
        params: parameters, (name, parameter) pairs, or groups with any of the options below as keys; a group's
            value overrides the constructor's.
        lr: learning rate >= 0, a float or a 0-d tensor. A tensor on a GPU is used where it is, and not checked.
        betas: decay rates of the moments, in [0, 1).
        eps: added to sqrt(v) before bias correction, as galore_torch does; >= 0.
        weight_decay: decoupled decay, ``lr * weight_decay * w`` after the update; >= 0.
        rank: r >= 1, or None for full rank, or "auto": at the first step a multiple of 16 for each matrix of the
            group, larger where the gradient's energy is spread over more directions; fixed from then on. A first step
            with gradients that aren't finite leaves the group's matrices as they are.
        rank_budget: with rank="auto", the bytes of state (moments, absmax, bases) that a group's matrices may take.
        update_proj_gap: steps T between refreshes of the subspace, >= 1.
        scale: GaLore's alpha, > 0.
        proj_type: "std" projects the smaller dimension, "reverse_std" the larger, "left" rows, "right" columns,
            "full" both.
        refresh_method: "randomized" (block Krylov space) or "svd" (exact).
        refresh_schedule: "periodic" (at steps 0, T, 2T, ..., as galore_torch), "staggered" (each matrix at its own
            place between them, so that no step but the first refreshes many) or "adaptive" (as staggered, with
            intervals from T / 4 to 8 T that grow where the subspace stays and shrink where it moves).
        warm_start: start each search from the previous basis, which takes half the time; where that captures less
            than before it is followed by a search from a sketch.
        async_refresh: update with the old basis in a step that refreshes, and use the new one from the next step on; on
            a GPU it is found on a stream of its own. The first basis is found at once.
        moments_on_refresh: "keep" them as they are (galore_torch), "rotate" them into the new basis
            (``galore_kernels.ops.rotate_moments``), or "reset" them and their bias correction.
        basis_format: None (the parameter's dtype), or "int8" or "int4" for a quantized basis with a scale per column.
        stochastic_rounding: round bfloat16 weights stochastically; other dtypes round to nearest in any case.
        maximize: ascend instead of descend.
        project_nd: project tensors of three and more dimensions (convolutions) as (first, rest) matrices.
        seed: of the refresh's sketches and of stochastic rounding.
        backend: "auto", "cuda", "triton", "cpu" or "reference"; see ``galore_kernels.backend_info()``.

    Raises:
        ValueError, TypeError: an argument out of range; names argument, group and remedy.
    """

    rule = Adam(eight_bit=True)


class GaLoreFusedAdamW(GaLoreAdam):
    """GaLore with float32 Adam moments; everything else as ``GaLoreFusedAdam8bit``."""

    rule = Adam(eight_bit=False)
