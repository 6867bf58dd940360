"""``scaling``: bytes on the wire and time of a step, DDP's whole gradients against projections, by number of GPUs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from galore_kernels.plan.errors import PlanError
from galore_kernels.plan.network import NETWORKS, Network, check_gpus, seconds, tokens_that_hide
from galore_kernels.plan.settings import Settings
from galore_kernels.plan.shapes import LlamaShape, find_model
from galore_kernels.plan.wire import (
    SCHEMES,
    Collective,
    ddp_step,
    in_backward,
    mean_over_gap,
    merged,
    payload,
    sharded_step,
    wire,
)

__all__ = ["GPUS", "Amounts", "Scaling", "scaling"]

GPUS = (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)


@dataclass(frozen=True)
class Amounts:
    """Of a step between two refreshes, of one that refreshes bases, and on average over ``update_proj_gap``."""

    ordinary: float
    refresh: float
    mean: float


@dataclass(frozen=True)
class Scaling:
    """What a training sends.

    Attributes:
        settings: of model and optimizer; weights' dtype is the gradients'.
        bucket_mb: DDP's ``bucket_cap_mb``; None for its default, 25 MiB.
    """

    settings: Settings
    bucket_mb: float | None = None

    def payload(self, scheme: str) -> Amounts:
        """Bytes that each process hands to all-reduces, of a scheme of ``SCHEMES``."""
        return self._amounts(scheme, payload)

    def wire(self, scheme: str, gpus: int) -> Amounts:
        """Bytes that each process sends by ring."""
        check_gpus(gpus)
        return self._amounts(scheme, lambda step: wire(step, gpus))

    def seconds(self, scheme: str, gpus: int, network: str | Network) -> Amounts:
        """Time of all collectives, none of it hidden behind computation; ``network``: of ``NETWORKS``, or another."""
        link = NETWORKS[network] if isinstance(network, str) else network
        return self._amounts(scheme, lambda step: seconds(step, gpus, link))

    def calls(self, scheme: str) -> int:
        """All-reduces of a step between two refreshes."""
        return sum(call.calls for call in _step(replace(self.settings, step="ordinary"), scheme, self.bucket_mb))

    def sharded(self, gpus: int, *, lowrank: bool) -> list[Collective]:
        """FSDP2's collectives of a step between two refreshes."""
        return merged(sharded_step(replace(self.settings, step="ordinary"), self.settings.shape, gpus, lowrank=lowrank))

    @property
    def unprojected(self) -> int:
        """Bytes of the gradients of embedding, head and norms, which no scheme projects."""
        return self.settings.shape.other_elements * self.settings.dtype.itemsize

    def _amounts(self, scheme: str, of_step: Callable[[Sequence[Collective]], float]) -> Amounts:
        def amount(settings: Settings) -> float:
            return of_step(_step(settings, scheme, self.bucket_mb))

        ordinary, refresh = (amount(replace(self.settings, step=step)) for step in ("ordinary", "refresh"))
        return Amounts(ordinary, refresh, mean_over_gap(self.settings, amount))

    def to_dict(self, gpus: Sequence[int] = GPUS) -> dict[str, Any]:
        """Plain values for JSON."""
        hide = partial(tokens_that_hide, parameters=self.settings.shape.parameters)
        return {
            "settings": asdict(self.settings),
            "bucket_mb": self.bucket_mb,
            "parameters": self.settings.shape.parameters,
            "unprojected_bytes": self.unprojected,
            "networks": {name: asdict(network) for name, network in NETWORKS.items()},
            "payload_bytes": {scheme: asdict(self.payload(scheme)) for scheme in SCHEMES},
            "calls": {scheme: self.calls(scheme) for scheme in SCHEMES},
            "gpus": {
                str(count): {
                    "wire_bytes": {scheme: asdict(self.wire(scheme, count)) for scheme in SCHEMES},
                    "seconds": {
                        name: {scheme: asdict(self.seconds(scheme, count, name)) for scheme in SCHEMES}
                        for name in NETWORKS
                    },
                    "hidden_from_tokens": {
                        name: {scheme: hide(self.seconds(scheme, count, name).mean) for scheme in SCHEMES}
                        for name in NETWORKS
                    },
                    "sharded": {
                        which: {
                            "wire_bytes": wire(step, count),
                            "seconds": {name: seconds(step, count, network) for name, network in NETWORKS.items()},
                        }
                        for which in ("full", "lowrank")
                        for step in [self.sharded(count, lowrank=which == "lowrank")]
                    },
                }
                for count in gpus
            },
        }


@lru_cache(maxsize=64)
def _step(settings: Settings, scheme: str, bucket_mb: float | None) -> tuple[Collective, ...]:
    size = None if bucket_mb is None else int(bucket_mb * 2**20)
    return tuple(merged(ddp_step(settings, scheme, in_backward(settings.shape), size)))


def scaling(model: str | Path | LlamaShape, bucket_mb: float | None = None, **options: Any) -> Scaling:
    """What the training of a Llama in many processes sends.

    >>> scaling("7b", rank=1024).seconds("lowrank", 64, "infiniband").mean

    Args:
        model: as of ``plan``. bucket_mb: DDP's ``bucket_cap_mb``.
        options: fields of ``Settings``; of these count ``rank``, ``proj_type``, ``weights``, ``update_proj_gap`` and
            ``refresh_schedule``.

    Raises:
        PlanError: an option out of range.
    """
    if bucket_mb is not None and not bucket_mb > 0:
        raise PlanError(f"bucket_mb={bucket_mb!r}: expected a number above 0, as of DDP's bucket_cap_mb")
    return Scaling(Settings.of(find_model(model), options), bucket_mb)
