"""galore_torch's optimizers with its signatures, defaults and group keys, on this library's kernels."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from galore_kernels.compat.drop_in import DropIn, expect_bitsandbytes_defaults, expect_default
from galore_kernels.optim import GaLoreFusedAdafactor, GaLoreFusedAdam8bit, GaLoreFusedAdamW

__all__ = ["GaLoreAdafactor", "GaLoreAdamW", "GaLoreAdamW8bit"]


class GaLoreAdamW(DropIn, GaLoreFusedAdamW):
    """galore_torch's ``GaLoreAdamW``: ``GaLoreFusedAdamW`` with its signature and defaults.

    Groups with ``rank`` (and ``update_proj_gap``, ``scale``, ``proj_type``) are projected, all others take full-rank
    AdamW. In float32 the training is galore_torch's to rounding where the bases are the same, and these are but for
    their signs; what differs on purpose is listed in docs/migration.md.

    ``refresh_method`` is "svd" here: galore_torch's own choice of subspace, so that changing the import changes the
    speed alone (it is some three times as fast as theirs on a CPU). "randomized", the default of ``GaLoreFusedAdamW``,
    finds nearly that subspace in a fraction of the time: take it where refreshes are a noticeable part of it.

    Args:
        params: parameters, (name, parameter) pairs, or groups. A group may also have the options of
            ``GaLoreFusedAdamW`` as keys.
        lr, betas, eps, weight_decay: as ``GaLoreFusedAdamW``'s; eps 1e-6 is galore_torch's default.
        correct_bias: True; False isn't offered.
        no_deprecation_warning: accepted; nothing here is deprecated, so that nothing is warned of.
        refresh_method, seed, backend: as ``GaLoreFusedAdamW``'s.

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
        no_deprecation_warning: bool = False,
        *,
        refresh_method: str = "svd",
        seed: int = 0,
        backend: str = "auto",
    ) -> None:
        expect_default("GaLoreAdamW(...)", "correct_bias", correct_bias, True)
        super().__init__(
            params, lr, betas, eps, weight_decay, rank=None, refresh_method=refresh_method, seed=seed, backend=backend
        )


class GaLoreAdamW8bit(DropIn, GaLoreFusedAdam8bit):
    """galore_torch's ``GaLoreAdamW8bit``: ``GaLoreFusedAdam8bit`` with its signature and defaults.

    Groups and ``refresh_method`` are as ``GaLoreAdamW``'s. Neither galore_torch nor bitsandbytes has to be installed.

    Args:
        params: parameters, (name, parameter) pairs, or groups. A group may also have the options of
            ``GaLoreFusedAdam8bit`` as keys.
        lr, betas, eps, weight_decay: as ``GaLoreFusedAdam8bit``'s; weight_decay 1e-2 is galore_torch's default.
        amsgrad, optim_bits, args, min_8bit_size, percentile_clipping, block_wise, is_paged: bitsandbytes', at their
            defaults only. The moments are 8-bit whatever ``optim_bits`` says, there as here.
        refresh_method, seed, backend: as ``GaLoreFusedAdam8bit``'s.

    Raises:
        ValueError, TypeError: an argument that is out of range or not offered; a parameter in a group with ``rank``
            that is no matrix.
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
        *,
        refresh_method: str = "svd",
        seed: int = 0,
        backend: str = "auto",
    ) -> None:
        expect_bitsandbytes_defaults("GaLoreAdamW8bit(...)", locals())
        super().__init__(
            params, lr, betas, eps, weight_decay, rank=None, refresh_method=refresh_method, seed=seed, backend=backend
        )


class GaLoreAdafactor(DropIn, GaLoreFusedAdafactor):
    """galore_torch's ``GaLoreAdafactor``: ``GaLoreFusedAdafactor`` with its signature and defaults.

    Groups and ``refresh_method`` are as ``GaLoreAdamW``'s.

    Args:
        params: parameters, (name, parameter) pairs, or groups. A group may also have the options of
            ``GaLoreFusedAdafactor`` as keys.
        lr, eps, clip_threshold, decay_rate, beta1, weight_decay, scale_parameter, relative_step, warmup_init: as
            ``GaLoreFusedAdafactor``'s, whose defaults are galore_torch's.
        refresh_method, seed, backend: as ``GaLoreFusedAdafactor``'s.

    Raises:
        ValueError, TypeError: an argument that is out of range or not offered; a parameter in a group with ``rank``
            that is no matrix.
    """

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
        refresh_method: str = "svd",
        seed: int = 0,
        backend: str = "auto",
    ) -> None:
        super().__init__(
            params,
            lr,
            eps,
            clip_threshold,
            decay_rate,
            beta1,
            weight_decay,
            scale_parameter,
            relative_step,
            warmup_init,
            rank=None,
            refresh_method=refresh_method,
            seed=seed,
            backend=backend,
        )
