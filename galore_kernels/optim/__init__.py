"""The optimizers."""

from galore_kernels.optim.base import NonFiniteGradientWarning
from galore_kernels.optim.galore import GaLoreFusedAdam8bit, GaLoreFusedAdamW
from galore_kernels.optim.param_groups import galore_param_groups

__all__ = ["GaLoreFusedAdam8bit", "GaLoreFusedAdamW", "NonFiniteGradientWarning", "galore_param_groups"]
