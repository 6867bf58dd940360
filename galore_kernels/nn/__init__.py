"""Linear layers for low-rank training."""

from galore_kernels.nn.factored_linear import FactoredLinear
from galore_kernels.nn.lowrank_gradient import LowRankGradient, lowrank_gradient_of
from galore_kernels.nn.prepare import prepare, unprepare
from galore_kernels.nn.targets import ALL_LINEAR, TargetModules, nothing_matches, target_linears

__all__ = [
    "ALL_LINEAR",
    "FactoredLinear",
    "LowRankGradient",
    "TargetModules",
    "lowrank_gradient_of",
    "nothing_matches",
    "prepare",
    "target_linears",
    "unprepare",
]
