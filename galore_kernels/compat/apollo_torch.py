"""apollo_torch's optimizers with its signatures, defaults and group keys, on this library's kernels.

Written from the paper (Zhu et al., arXiv 2412.05270) and from what that package is seen to do; none of it is here.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from galore_kernels.compat.drop_in import DropIn, expect_bitsandbytes_defaults, expect_default
from galore_kernels.compat.galore_torch import GaLoreAdafactor, GaLoreAdamW, GaLoreAdamW8bit
from galore_kernels.optim import APOLLOFusedAdamW

__all__ = ["APOLLOAdamW", "GaLoreAdafactor", "GaLoreAdamW", "GaLoreAdamW8bit", "QAPOLLOAdamW"]


class APOLLOAdamW(DropIn, APOLLOFusedAdamW):
    """apollo_torch's ``APOLLOAdamW``: ``APOLLOFusedAdamW`` with its signature and defaults.

    Groups with ``rank`` (and ``proj``, ``scale_type``, ``scale``, ``update_proj_gap``, ``proj_type``) are scaled by
    their projections, all others take full-rank AdamW. In float32 the training is apollo_torch's to rounding where the
    bases are the same. They are not: both draw Gaussian ones, from other generators. On ``proj_type="reverse_std"``
    with ``scale_type="channel"`` apollo_torch takes norms along the wrong side, and raises.

    Args:
        params: parameters, (name, parameter) pairs, or groups. A group may also have the options of
            ``APOLLOFusedAdamW`` as keys.
        lr, betas, eps, weight_decay: as ``APOLLOFusedAdamW``'s; eps 1e-6 is apollo_torch's default.
        correct_bias: True; False isn't offered.
        scale_front: as ``APOLLOFusedAdamW``'s.
        disable_nl: no norm-growth limiter (``norm_growth_limit=None``).
        no_deprecation_warning: accepted; nothing here is deprecated, so that nothing is warned of.
        refresh_method: with ``proj="svd"``: "svd" is apollo_torch's own, "randomized" finds nearly that many times
            faster.
        seed, backend: as ``APOLLOFusedAdamW``'s.

    Raises:
        ValueError, TypeError: an argument that is out of range or not offered; a parameter in a group with ``rank``
            that is no matrix.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        correct_bias: bool = True,
        scale_front: bool = False,
        disable_nl: bool = False,
        no_deprecation_warning: bool = True,
        *,
        refresh_method: str = "svd",
        seed: int = 0,
        backend: str = "auto",
    ) -> None:
        expect_default("APOLLOAdamW(...)", "correct_bias", correct_bias, True)
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            rank=None,
            scale_front=scale_front,
            norm_growth_limit=None if disable_nl else 1.01,
            refresh_method=refresh_method,
            seed=seed,
            backend=backend,
        )


class QAPOLLOAdamW(DropIn, APOLLOFusedAdamW):
    """apollo_torch's ``QAPOLLOAdamW``: ``APOLLOFusedAdamW`` with its signature and defaults.

    It is for int8 weights, which are made by ``galore_kernels.prepare(model, targets, rank=None, weights="int8")``
    here and by code of the training script there; groups are as ``APOLLOAdamW``'s. Parameters that were not prepared
    are trained as they are, there as here. Its limiter sees gradients after bias correction, ours before it, as
    ``APOLLOAdamW``'s do: they differ while the correction changes. It has no decay in groups without ``rank``.

    Args:
        params: as ``APOLLOAdamW``'s.
        lr, betas, eps, weight_decay: as ``APOLLOFusedAdamW``'s; weight_decay 1e-2 is apollo_torch's default.
        amsgrad, optim_bits, args, min_8bit_size, percentile_clipping, block_wise, is_paged: bitsandbytes', at their
            defaults only. The moments are float32.
        scale_front: as ``APOLLOFusedAdamW``'s.
        no_deprecation_warning: accepted; nothing is warned of.
        refresh_method, seed, backend: as ``APOLLOAdamW``'s. The seed is of the codes' stochastic rounding too.

    Raises:
        ValueError, TypeError: an argument that is out of range or not offered; a parameter in a group with ``rank``
            that is no matrix; int8 weights in a group without.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        optim_bits: int = 32,
        args: object = None,
        min_8bit_size: int = 4096,
        percentile_clipping: int = 100,
        block_wise: bool = True,
        is_paged: bool = False,
        scale_front: bool = False,
        no_deprecation_warning: bool = True,
        *,
        refresh_method: str = "svd",
        seed: int = 0,
        backend: str = "auto",
    ) -> None:
        expect_bitsandbytes_defaults("QAPOLLOAdamW(...)", locals())
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            rank=None,
            scale_front=scale_front,
            refresh_method=refresh_method,
            seed=seed,
            backend=backend,
        )
