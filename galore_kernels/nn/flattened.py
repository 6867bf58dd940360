"""Parameters that FSDP1 or DeepSpeed ZeRO have flattened: no matrix is there to be projected, so they are refused."""

from __future__ import annotations

from torch import Tensor

#: What they leave on a parameter, and what it tells.
_MARKS = {
    "_fsdp_flattened": "FullyShardedDataParallel (FSDP1) has flattened",
    "ds_id": "DeepSpeed ZeRO 3 has partitioned",
    "_hp_mapping": "DeepSpeed ZeRO trains a flattened copy of",
}

#: The end of every message about them.
INSTEAD_OF_FLATTENING = (
    "use fully_shard (FSDP2), DistributedDataParallel or ZeRO stage 0 instead; where memory is short, prepared layers "
    '(galore_kernels.prepare) have no gradients of full size, and with weights="int8" a byte for each weight'
)


def check_unflattened(param: Tensor, name: str) -> None:
    """Raises ValueError if ``param`` is marked as flattened, or as trained through a flattened copy."""
    for mark, what in _MARKS.items():
        if hasattr(param, mark):
            raise ValueError(
                f"{name}: expected an unflattened parameter, got one of shape {tuple(param.shape)} that {what}, where "
                f"no matrix can be projected; {INSTEAD_OF_FLATTENING}"
            )
