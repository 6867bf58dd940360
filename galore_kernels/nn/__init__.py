"""Linear layers for low-rank training."""

from galore_kernels.nn.carried_gradient import CarriedGradient, DenseGradient, carried_gradient_of
from galore_kernels.nn.export import plain_state_dict, save_safetensors
from galore_kernels.nn.factored_linear import FactoredLinear, Int8Linear, WeightCodes
from galore_kernels.nn.flattened import INSTEAD_OF_FLATTENING, check_unflattened
from galore_kernels.nn.lowrank_gradient import LowRankGradient, Pairs, lowrank_gradient_of
from galore_kernels.nn.prepare import prepare, unprepare
from galore_kernels.nn.targets import (
    ALL_LINEAR,
    TargetModules,
    bare_name,
    nothing_matches,
    stored_weight,
    target_linears,
)

__all__ = [
    "ALL_LINEAR",
    "INSTEAD_OF_FLATTENING",
    "CarriedGradient",
    "DenseGradient",
    "FactoredLinear",
    "Int8Linear",
    "LowRankGradient",
    "Pairs",
    "TargetModules",
    "WeightCodes",
    "bare_name",
    "carried_gradient_of",
    "check_unflattened",
    "lowrank_gradient_of",
    "nothing_matches",
    "plain_state_dict",
    "prepare",
    "save_safetensors",
    "stored_weight",
    "target_linears",
    "unprepare",
]
