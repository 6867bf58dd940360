"""Low-rank optimizers for large language models that run at the speed of the memory bus.

>>> from galore_kernels import GaLoreFusedAdam8bit
>>> optimizer = GaLoreFusedAdam8bit(model.parameters(), rank=128)  # a torch.optim.Optimizer
"""

from galore_kernels import backends, checkpoint, ops
from galore_kernels._native import build_info as _build_info
from galore_kernels.nn import plain_state_dict, prepare, save_safetensors, unprepare
from galore_kernels.ops import backend_info
from galore_kernels.optim import (
    APOLLOFusedAdam8bit,
    APOLLOFusedAdamW,
    GaLoreFusedAdafactor,
    GaLoreFusedAdam8bit,
    GaLoreFusedAdamW,
    LayerwiseOptimizer,
    NonFiniteGradientWarning,
    galore_param_groups,
)

__version__: str = _build_info()["version"]

__all__ = [
    "APOLLOFusedAdam8bit",
    "APOLLOFusedAdamW",
    "GaLoreFusedAdafactor",
    "GaLoreFusedAdam8bit",
    "GaLoreFusedAdamW",
    "LayerwiseOptimizer",
    "NonFiniteGradientWarning",
    "__version__",
    "backend_info",
    "backends",
    "checkpoint",
    "galore_param_groups",
    "ops",
    "plain_state_dict",
    "prepare",
    "save_safetensors",
    "unprepare",
]
