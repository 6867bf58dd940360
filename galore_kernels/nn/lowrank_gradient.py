"""The gradient of a weight in the subspace of its basis, computed from what a linear layer's backward pass has of it.

G = dY.T @ X, so that R = G @ P = dY.T @ (X @ P) on the right side, and R = G.T @ P = X.T @ (dY @ P) on the left.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from galore_kernels.nn.carried_gradient import CarriedGradient, carried_gradient_of
from galore_kernels.subspace import project_rows

#: dY (T, m) and X (T, n) of each of several backward passes.
Pairs = list[tuple[Tensor, Tensor]]


class Owner(Protocol):
    """The optimizer of a ``LowRankGradient``."""

    def find_first_basis(self, gradient: LowRankGradient, factors: Pairs) -> bool:
        """Gives ``gradient`` the first basis, found in ``factors``, unless they hold no directions.

        Returns:
            Whether it has the gradient's carrier; nothing is done otherwise.
        """


class LowRankGradient(CarriedGradient):
    """The gradient of a weight in a subspace: one of the weight's own shape never exists.

    The carrier (L, r) has R as its ``.grad``; its memory is that of the gradient.

    Attributes:
        side: "left" or "right". rank: r.
        basis: P (S, r), or its codes; None before there is one. basis_scale: (r,) of codes, else None.
        keeps_factors: whether the backward passes until the optimizer's next step keep dY and X, for a refresh.
        factors: those that they have kept.
        projects: whether forward passes keep X @ P instead of X. It changes between steps only: a forward pass that is
            done again for the backward pass has to keep what it kept before.
        key: what the operation in a compiled graph finds it by: a tensor, so that equal layers share a graph.
        owner: the optimizer.
    """

    name = "lowrank"
    key: Tensor

    def __init__(self, layer: nn.Linear, side: str, rank: int) -> None:
        self.side, self.rank = side, rank
        self.basis: Tensor | None = None
        self.basis_scale: Tensor | None = None
        self.keeps_factors = False
        self.factors: Pairs = []
        self.projects = False
        self.owner: weakref.ref[Owner] | None = None
        super().__init__(layer)

    def __str__(self) -> str:
        return f"side={self.side}, rank={self.rank}"

    def __getstate__(self) -> dict[str, Any]:
        # A copy has no optimizer yet, which gives it a basis.
        gone = dict.fromkeys(("owner", "key", "basis", "basis_scale"))
        return {**super().__getstate__(), **gone, "factors": [], "keeps_factors": False, "projects": False}

    def bind(self, layer: nn.Linear) -> None:
        """Also lets the operation find it."""
        self._is_accumulated = False
        _by_key[id(self)] = self
        self.key = torch.tensor(id(self))
        super().bind(layer)

    def _after_backward(self, carrier: Tensor) -> None:
        super()._after_backward(carrier)
        self._is_accumulated = True
        if carrier.grad is not None:
            carrier.data = carrier.grad

    def projected(self, rows: Tensor) -> Tensor:
        """(T, r) of (T, S): ``rows @ P`` in their dtype."""
        if self.basis is None:
            raise RuntimeError("there is no basis yet")
        return project_rows(rows, self.basis, self.basis_scale)

    def of(self, grad_output: Tensor, saved: Tensor, *, is_projected: bool, is_borrowed: bool) -> Tensor:
        """R of one backward pass, (L, r) in the carrier's dtype.

        Args:
            grad_output: dY, (T, m). saved: X (T, n), or X @ P (T, r) if ``is_projected``.
            is_borrowed: whether the memory of both may be written to afterwards, as a compiled graph's is.
        """
        if not is_projected:
            self._look_at(grad_output, saved, is_borrowed=is_borrowed)
        if self.basis is None:
            # Zeros, unless a factor isn't finite, which whoever looks at gradients has to see.
            return torch.zeros_like(self.carrier) + (grad_output * 0).sum() + (saved * 0).sum()
        if self.side == "left":
            lowrank = saved.T @ self.projected(grad_output)
        else:
            lowrank = grad_output.T @ (saved if is_projected else self.projected(saved))
        return lowrank.to(self.carrier.dtype)

    def _look_at(self, grad_output: Tensor, inputs: Tensor, *, is_borrowed: bool) -> None:
        if self.basis is None:
            owner = self.owner() if self.owner is not None else None
            if owner is None or not owner.find_first_basis(self, [(grad_output, inputs)]):
                raise RuntimeError(
                    "a backward pass through a prepared layer that no optimizer has: make the optimizer from the "
                    "prepared model's parameters before the first backward pass, or unprepare the model; fully_shard "
                    "takes no prepared layers, DDP does"
                )
        elif self.keeps_factors:
            if self._is_accumulated and self.carrier.grad is None:  # somebody has given up what there was
                self.factors, self._is_accumulated = [], False
            pair = (grad_output.clone(), inputs.clone()) if is_borrowed else (grad_output, inputs)
            self.factors.append(pair)

    def release(self) -> None:
        """Gives up the memory of the last gradient, which whoever has updated the weight needs no more."""
        self.carrier.grad = None
        self.carrier.data = self.carrier.new_zeros(()).expand(self.carrier.shape)

    def use(self, state: Mapping[str, Any] | None) -> None:
        """Takes the basis of the optimizer's state of the carrier, once there is one."""
        there = state is not None and state["refreshes"] > 0
        self.basis = state["basis"] if state is not None and there else None
        self.basis_scale = state.get("basis_scale") if state is not None and there else None

    def begin_step(self, state: Mapping[str, Any] | None, *, keeps_factors: bool) -> None:
        """Forgets the last step's factors. ``keeps_factors``: if there is a basis, whether to keep this one's."""
        self.use(state)
        self.factors = []
        self.keeps_factors = keeps_factors and self.basis is not None
        self.projects = self.side == "right" and self.basis is not None and not self.keeps_factors


_by_key: weakref.WeakValueDictionary[int, LowRankGradient] = weakref.WeakValueDictionary()


def lowrank_gradient_of(param: Tensor) -> LowRankGradient | None:
    """What ``param`` carries the low-rank gradient of, if it is such a carrier."""
    carried = carried_gradient_of(param)
    return carried if isinstance(carried, LowRankGradient) else None


# Opaque to compilers: what it keeps, and the first search, are no part of a graph.
_library = torch.library.Library("galore_kernels_nn", "DEF")
_library.define(
    "lowrank_gradient(Tensor grad_output, Tensor saved, Tensor key, int[] shape, ScalarType dtype, bool is_projected, "
    "bool is_borrowed) -> Tensor"
)


def _run(
    grad_output: Tensor,
    saved: Tensor,
    key: Tensor,
    shape: list[int],
    dtype: torch.dtype,
    is_projected: bool,
    is_borrowed: bool,
) -> Tensor:
    with torch.no_grad(), torch.autocast(grad_output.device.type, enabled=False):
        return _by_key[int(key)].of(grad_output, saved, is_projected=is_projected, is_borrowed=is_borrowed)


def _fake(
    grad_output: Tensor,
    saved: Tensor,
    key: Tensor,
    shape: list[int],
    dtype: torch.dtype,
    is_projected: bool,
    is_borrowed: bool,
) -> Tensor:
    return grad_output.new_empty(shape, dtype=dtype)


_library.impl("lowrank_gradient", _run, "CompositeExplicitAutograd")
torch.library.register_fake("galore_kernels_nn::lowrank_gradient", _fake, lib=_library)
