"""The optimizers."""

from galore_kernels.optim.adafactor import GaLoreFusedAdafactor
from galore_kernels.optim.apollo import APOLLOFusedAdam8bit, APOLLOFusedAdamW
from galore_kernels.optim.galore import GaLoreFusedAdam8bit, GaLoreFusedAdamW
from galore_kernels.optim.layerwise import LayerwiseOptimizer
from galore_kernels.optim.param_groups import galore_param_groups
from galore_kernels.optim.updating import NonFiniteGradientWarning

__all__ = [
    "APOLLOFusedAdam8bit",
    "APOLLOFusedAdamW",
    "GaLoreFusedAdafactor",
    "GaLoreFusedAdam8bit",
    "GaLoreFusedAdamW",
    "LayerwiseOptimizer",
    "NonFiniteGradientWarning",
    "galore_param_groups",
]
