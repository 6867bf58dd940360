"""What an optimizer was given, and what has become of it when wrappers have been at it since."""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Iterable
from itertools import chain

from torch import Tensor, distributed, nn

from galore_kernels.nn import INSTEAD_OF_FLATTENING, check_unflattened


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

    def check(self, held: Iterable[tuple[str, Tensor]]) -> None:
        """Raises what is wrong with what the optimizer holds by now, (name, parameter) pairs.

        Raises:
            ValueError: parameters are flattened, in place or by others in their place.
            RuntimeError: they were flattened into others, and no gradient will ever come to them.
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
        self._check_belonging(held)

    def _knows(self, param: Tensor) -> bool:
        reference = self._references.get(id(param))
        return reference is not None and reference() is param

    def _check_belonging(self, held: Iterable[tuple[str, Tensor]]) -> None:
        """Raises RuntimeError for what FSDP1 has copied into a flat parameter and taken out of its module.

        Such a parameter has no mark: it looks like one that a step didn't use. So all modules are looked through,
        where FSDP may be there, and when more parameters have no gradient than ever before.
        """
        without = [(name, p) for name, p in held if p.grad is None and p.requires_grad and p.numel() > 0]
        if len(without) <= self._asked or not _fsdp_is_possible():
            return
        present = _parameters_of_modules()
        flattened = {shape for param in present for shape in getattr(param, "_shapes", ())}
        belonging = set(map(id, present))
        for name, param in without:
            if id(param) not in belonging and param.shape in flattened:
                raise RuntimeError(
                    f"{name}: expected a parameter of the model, got one that FullyShardedDataParallel (FSDP1) has "
                    "flattened into another since: it belongs to no module, gets no gradient, and would never be "
                    f"trained; {INSTEAD_OF_FLATTENING}"
                )
        self._asked = len(without)


def _fsdp_is_possible() -> bool:
    return distributed.is_available() and distributed.is_initialized() and "torch.distributed.fsdp" in sys.modules


def _parameters_of_modules() -> list[Tensor]:
    """The parameters of every module there is."""
    modules = [thing for thing in gc.get_objects() if issubclass(type(thing), nn.Module)]
    own = (module.__dict__.get("_parameters", {}).values() for module in modules)
    return [param for param in chain.from_iterable(own) if param is not None]
