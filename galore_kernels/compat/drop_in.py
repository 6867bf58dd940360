"""What galore_torch's and apollo_torch's optimizers have in common: how they read groups, and whose checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from galore_kernels.compat.import_state import import_state_dict, is_own
from galore_kernels.optim.base import LowRankOptimizer


class DropIn(LowRankOptimizer):
    """What their groups mean: those with ``rank`` hold matrices, all others are at full rank."""

    def _check_new_params(self, group: dict[str, Any], where: str) -> None:
        super()._check_new_params(group, where)
        expect_default(where, "correct_bias", group.get("correct_bias", True), True)
        for position, entry in enumerate(group["params"] if group.get("rank") is not None else ()):
            name, param = entry if isinstance(entry, tuple) else ("", entry)
            if param.dim() < 2 or (param.dim() > 2 and not group.get("project_nd")):
                named = f' ("{name}")' if name else ""
                raise ValueError(
                    f"{where}, parameter {position}{named}: expected a matrix in a group with rank, got shape "
                    f"{tuple(param.shape)}; put it into a group without rank"
                )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what ``state_dict()`` gave; what theirs gave is brought over.

        See ``galore_kernels.compat.import_state_dict`` for the latter.

        Raises:
            ValueError: it doesn't fit, or is damaged. The message names the parameter; the optimizer is as it was.
        """
        if is_own(state_dict):
            super().load_state_dict(state_dict)
        else:
            import_state_dict(self, state_dict)


#: The arguments of bitsandbytes' optimizers that are accepted for their names, with the one value that each may have.
BITSANDBYTES_DEFAULTS = {
    "amsgrad": False,
    "optim_bits": 32,
    "args": None,
    "min_8bit_size": 4096,
    "percentile_clipping": 100,
    "block_wise": True,
    "is_paged": False,
}


def expect_bitsandbytes_defaults(where: str, given: Mapping[str, object]) -> None:
    """Raises ValueError unless ``given``, those arguments among others, are at their defaults."""
    for argument, default in BITSANDBYTES_DEFAULTS.items():
        expect_default(where, argument, given[argument], default)


def expect_default(where: str, argument: str, value: object, default: object) -> None:
    """Raises ValueError unless an argument that is accepted for its name has its one value."""
    if value is not default and value != default:
        raise ValueError(f"{argument}={value!r} in {where}: expected {default!r}, all that is offered; leave it out")
