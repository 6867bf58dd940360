"""What an optimizer was given, and what has become of it when wrappers have been at it since."""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Any

from torch import Tensor, distributed, nn

from galore_kernels.nn import INSTEAD_OF_FLATTENING, check_unflattened
from galore_kernels.optim.shard import is_dtensor


class Given:
    """The parameters that an optimizer was given, by which to tell what wrappers do to it afterwards."""

    def __init__(self) -> None:
        self._references: dict[int, weakref.ref[Tensor]] = {}
        self._had_matrices = False
        self._asked = 0

    def add(self, params: Iterable[Tensor]) -> None:
        """Takes note of ``params``."""
        for param in params:
            self._references[id(param)] = weakref.ref(param)
            self._had_matrices |= param.dim() > 1

    def check(self, held: Iterable[tuple[str, Tensor]], states: Mapping[Tensor, Any]) -> None:
        """Raises what is wrong with what the optimizer holds by now, (name, parameter) pairs, and with their states.

        Raises:
            ValueError: parameters are flattened, in place or by others in their place.
            RuntimeError: others are in their place in the model, and no gradient will ever come to them; or others are
                in their place in the optimizer, and their states are left behind.
        """
        held = list(held)
        for name, param in held:
            check_unflattened(param, name)
        if self._had_matrices and all(param.dim() < 2 for _, param in held):
            for name, param in held:
                if not self._knows(param):
                    raise ValueError(
                        f"{name}: expected a parameter that the optimizer was given, got a flat tensor of shape "
                        f"{tuple(param.shape)} in the place of all matrices, which DeepSpeed does under ZeRO 1 and 2, "
                        f"and where bfloat16's gradients are added up in float32; {INSTEAD_OF_FLATTENING}"
                    )
        self._check_states(held, states)
        self._check_belonging(held)

    def _check_states(self, held: Sequence[tuple[str, Tensor]], states: Mapping[Tensor, Any]) -> None:
        """Raises RuntimeError if DTensors are in the place of parameters that have been trained or loaded already."""
        if any(states.get(param) for _, param in held):
            return
        left = {param.shape for param in states if isinstance(param, Tensor)}
        for name, param in held:
            if is_dtensor(param) and param.shape in left:
                raise RuntimeError(
                    f"{name}: expected its state of the steps before, got a DTensor in its place without it (under "
                    "FSDP2 Accelerate's prepare puts it there); prepare first, and load the state afterwards"
                )

    def _knows(self, param: Tensor) -> bool:
        reference = self._references.get(id(param))
        return reference is not None and reference() is param

    def _check_belonging(self, held: Iterable[tuple[str, Tensor]]) -> None:
        """Raises RuntimeError for what FSDP has put another parameter in the place of in its module.

        Such a parameter has no mark: it looks like one that a step didn't use. So all modules are looked through,
        where FSDP may be there, and when more parameters have no gradient than ever before. If one of ``held`` belongs
        to a module, the model was not wrapped since, and the others may well belong to none.
        """
        held = list(held)
        without = [(name, p) for name, p in held if p.grad is None and p.requires_grad and p.numel() > 0]
        if len(without) <= self._asked or not _fsdp_is_possible():
            return
        present = _parameters_of_modules()
        flattened = {shape for param in present for shape in getattr(param, "_shapes", ())}
        divided = {param.shape for param in present if is_dtensor(param)}
        self._asked = len(without)
        if not {id(param) for _, param in held}.isdisjoint(map(id, present)):
            return
        for name, param in without:
            if param.shape not in flattened | divided:
                continue
            what, remedy = "fully_shard has put a DTensor in the place of", "make the optimizer after fully_shard"
            if param.shape in flattened:
                what = "FullyShardedDataParallel (FSDP1) has flattened into another"
                remedy = INSTEAD_OF_FLATTENING
            self._asked = 0
            raise RuntimeError(
                f"{name}: expected a parameter of the model, got one that {what} since: it belongs to no module, gets "
                f"no gradient, and would never be trained; {remedy}"
            )


def _fsdp_is_possible() -> bool:
    return distributed.is_available() and distributed.is_initialized() and "torch.distributed.fsdp" in sys.modules


def _parameters_of_modules() -> list[Tensor]:
    """The parameters of every module there is."""
    gc.collect()  # of those that are gone nothing follows
    modules = [thing for thing in gc.get_objects() if issubclass(type(thing), nn.Module)]
    own = (module.__dict__.get("_parameters", {}).values() for module in modules)
    return [param for param in chain.from_iterable(own) if param is not None]
