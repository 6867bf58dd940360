"""Layerwise updates: each parameter's step inside the backward pass, as soon as its gradient is there."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from galore_kernels.optim.base import LowRankOptimizer
from galore_kernels.optim.options import AUTO
from galore_kernels.optim.scalars import Unscaling
from galore_kernels.optim.update import Update
from galore_kernels.optim.updating import warn_caller

HEADER = "layerwise"

CLIPPINGS = ("previous", "exact")


class LayerwiseOptimizer(Optimizer):
    """Updates each parameter inside the backward pass, and frees its gradient at once: one layer's exists at a time.

        optimizer = LayerwiseOptimizer(GaLoreFusedAdam8bit(galore_param_groups(model), lr=1e-2))
        loss.backward()   # updates the weights
        optimizer.step()  # ends the step: counts it, so that schedules and refreshes go on
        optimizer.zero_grad()

    It is an optimizer: learning-rate schedulers, ``state_dict`` and ``zero_grad`` work as ever, and the weights are
    bitwise those that the wrapped optimizer would have made of the same gradients (Lv et al., "Full parameter
    fine-tuning for large language models with limited resources", arXiv 2306.09782, have the idea).

    Several backward passes to a step: with ``accumulation_steps`` N each parameter is updated in its N-th. Until then a
    projected one's gradients are added up as projections (L, r), others at full size, as are those of layers whose
    subspace is due; the first basis comes from the first of them. ``step`` before that takes what is there.

    Clipping: the norm of all gradients is known only when they are gone. "previous" divides by the norm of the step
    before (by a tensor's own where that is larger; at the first step that is all there is, and Adam's first step does
    not depend on it). "exact" runs the closure given to ``step`` twice, with the same random numbers: first for the
    norm, then for the updates; a norm that isn't finite skips the step. Of gradients that are added up as projections,
    the projections' norm counts.

    A backward pass that raises half-way (out of memory, say) has updated the layers that it had come to.

    What can't be: GradScaler, whose step is skipped as a whole or not at all (use bfloat16; gradients that aren't
    finite skip their parameter's step, as ever); ranks "auto", which all gradients are needed for; DDP, which averages
    gradients after this has used them.

    Args:
        optimizer: any of this library's, to be used through this one from now on.
        accumulation_steps: backward passes to a step.
        max_grad_norm: clip the norm of all gradients to this; None doesn't.
        clipping: "previous" or "exact".

    Raises:
        TypeError, ValueError: an argument that doesn't fit. RuntimeError: several processes.
    """

    def __init__(
        self,
        optimizer: LowRankOptimizer,
        *,
        accumulation_steps: int = 1,
        max_grad_norm: float | None = None,
        clipping: str = "previous",
    ) -> None:
        if not isinstance(optimizer, LowRankOptimizer):
            raise TypeError(
                f"optimizer: expected one of galore_kernels, as GaLoreFusedAdam8bit, got {type(optimizer).__name__}"
            )
        if isinstance(accumulation_steps, bool) or not isinstance(accumulation_steps, int) or accumulation_steps < 1:
            raise ValueError(f"accumulation_steps={accumulation_steps!r}: expected an integer >= 1; 1 is the default")
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ValueError(f"max_grad_norm={max_grad_norm!r}: expected a number > 0; None turns clipping off")
        if clipping not in CLIPPINGS:
            raise ValueError(f"clipping={clipping!r}: expected one of {', '.join(CLIPPINGS)}; choose one of them")
        for index, group in enumerate(optimizer.param_groups):
            _refuse_auto(group, f"param group {index}")
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if distributed and torch.distributed.get_world_size() > 1:
            raise RuntimeError(
                "LayerwiseOptimizer: expected one process: DDP averages gradients after this has used them, and "
                "fully_shard divides them; use the optimizer itself, with a prepared model under DDP where memory is "
                "short"
            )
        self.optimizer = optimizer
        self.accumulation_steps, self.max_grad_norm, self.clipping = accumulation_steps, max_grad_norm, clipping
        self._previous_norm: Tensor | None = None
        self.detach()  # from one that wrapped it before
        super().__setstate__({})  # the hooks' dicts, and the step that schedulers know
        self._register(param for group in self.param_groups for param in group["params"])

    def _begin(self) -> None:
        self._updates: dict[int, Update] = {}  # of the step under way; empty between steps
        self._counts: dict[int, int] = {}  # gradients of each parameter in this step
        self._sums: dict[int, Tensor] = {}  # those that are added up as projections
        self._squares: list[Tensor] = []  # of the norms of this step's gradients
        self._measures = False  # whether this backward pass is for the norm alone
        self._divisor: Tensor | None = None  # of all gradients, under exact clipping

    def _register(self, params: Iterable[Tensor]) -> None:
        arrived = weakref.WeakMethod(self._arrived)

        def hook(param: Tensor) -> None:
            method = arrived()
            if method is not None:
                method(param)

        handles = self.optimizer.layerwise_hooks
        handles += [param.register_post_accumulate_grad_hook(hook) for param in params if param.requires_grad]

    def detach(self) -> None:
        """Gives the parameters back to the wrapped optimizer: backward passes leave gradients, and update nothing."""
        while self.optimizer.layerwise_hooks:
            self.optimizer.layerwise_hooks.pop().remove()
        self._begin()

    # ------------------------------------------------------------------ what others see of an optimizer

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The wrapped optimizer's."""
        return self.optimizer.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        """The wrapped optimizer's."""
        return self.optimizer.state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        """The wrapped optimizer's."""
        return self.optimizer.defaults

    def skipped_steps(self) -> dict[str, int]:
        """The wrapped optimizer's."""
        return self.optimizer.skipped_steps()

    def subspace_report(self) -> dict[str, dict[str, Any]]:
        """The wrapped optimizer's."""
        return self.optimizer.subspace_report()

    def state_bytes(self) -> int:
        """The wrapped optimizer's."""
        return self.optimizer.state_bytes()

    @property
    def _step_supports_amp_scaling(self) -> bool:
        raise RuntimeError(
            "GradScaler with a LayerwiseOptimizer: the weights are updated before the scaler knows whether to skip the "
            "step, and have been, by scaled gradients, if there was a backward pass: go back to a checkpoint, and "
            "train in bfloat16, or use the optimizer itself"
        )

    def __repr__(self) -> str:
        clip = "" if self.max_grad_norm is None else f", norm clipped to {self.max_grad_norm:g} ({self.clipping})"
        return f"LayerwiseOptimizer ({self.accumulation_steps} backward passes a step{clip}) of {self.optimizer!r}"

    def __getstate__(self) -> dict[str, Any]:
        keys = ("optimizer", "accumulation_steps", "max_grad_norm", "clipping", "_previous_norm")
        return {key: self.__dict__[key] for key in keys}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.detach()
        super().__setstate__({})
        self._register(param for group in self.param_groups for param in group["params"])

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As the wrapped optimizer's."""
        _refuse_auto({**self.defaults, **param_group}, "the new param group")
        self.optimizer.add_param_group(param_group)
        self._register(self.param_groups[-1]["params"])

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's, which loads it too, and the norm that the next step is clipped by."""
        return {**self.optimizer.state_dict(), HEADER: {"previous_norm": self._previous_norm}}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Loads what ``state_dict`` of this, or of the wrapped optimizer, gave.

        Raises:
            ValueError: as the wrapped optimizer's; nothing has changed.
        """
        own = state_dict.get(HEADER, {"previous_norm": None})
        norm = own.get("previous_norm") if isinstance(own, Mapping) else own
        if norm is not None and not (isinstance(norm, Tensor) and norm.dim() == 0 and bool(norm >= 0)):
            raise ValueError(f"state_dict: previous_norm is {norm!r}, expected a norm or None; the state is damaged")
        self.optimizer.load_state_dict({key: value for key, value in state_dict.items() if key != HEADER})
        self._begin()
        self._previous_norm = None if norm is None else norm.detach().clone()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As the wrapped optimizer's. Gradients that wait to be used are dropped too."""
        self._counts, self._sums = {}, {}  # what has been updated has: the step is still to be ended
        self.optimizer.zero_grad(set_to_none)

    # ------------------------------------------------------------------ a step

    @torch.no_grad()
    def _arrived(self, param: Tensor) -> None:
        if self.clipping == "exact" and self.max_grad_norm is not None and not self._measures and self._divisor is None:
            raise RuntimeError(
                'clipping="exact" runs the backward pass twice: pass step() a closure that computes the loss and calls '
                "backward(), and don't call it yourself"
            )
        if not self._updates:
            self._updates = self.optimizer.begin_step()
        update = self._updates[id(param)]
        count = self._counts.get(id(param), 0) + 1
        if count > self.accumulation_steps:
            param.grad = None
            raise RuntimeError(
                f"{update.name}: gradient number {count} in a step of {self.accumulation_steps}; call step() after "
                f"every {self.accumulation_steps} backward passes, or raise accumulation_steps (reentrant activation "
                "checkpointing of layers that share a weight gives several in one pass: use_reentrant=False doesn't)"
            )
        self._counts[id(param)] = count
        if self.accumulation_steps > 1 and not self._is_held(update, first=count == 1):
            lowrank = self.optimizer.projected(update, update.grad)
            self._sums[id(param)] = self._sums[id(param)].add_(lowrank) if id(param) in self._sums else lowrank
            param.grad = None
        if count == self.accumulation_steps:
            self._use(update)

    def _is_held(self, update: Update, *, first: bool) -> bool:
        """Whether the parameter's gradients are added up as they come, in ``.grad``."""
        if not first:
            return id(update.param) not in self._sums
        self.optimizer.find_first_basis_of(update)
        return self.optimizer.keeps_gradient(update)

    def _use(self, update: Update) -> None:
        """Updates the parameter by what has been added up, or measures it."""
        lowrank = self._sums.pop(id(update.param), None)
        gradient = update.grad if lowrank is None else lowrank
        if self.max_grad_norm is not None:
            self._squares.append(torch.linalg.vector_norm(gradient, dtype=torch.float32).square())
        if self._measures:
            if update.factored is not None:
                update.factored.factors = []
        else:
            if lowrank is None:
                self.optimizer.step_of(update, self._unscaling())
            else:
                self.optimizer.lowrank_step_of(update, self._unscaling(), lowrank)
        if update.factored is None:
            update.param.grad = None
        else:
            update.factored.release()

    def _unscaling(self) -> Unscaling:
        if self.max_grad_norm is None:
            return Unscaling(None, None)
        if self._divisor is not None:
            return Unscaling(self._divisor, None)
        norm = self._squares[-1].sqrt()
        if self._previous_norm is not None:
            norm = torch.maximum(norm, self._previous_norm.to(norm.device))
        return Unscaling(_divisor(norm, self.max_grad_norm), None)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Ends a step whose backward passes have been run, or runs them by ``closure``.

        Args:
            closure: computes the loss and calls ``backward()``, ``accumulation_steps`` times in all; returns the loss.
                Needed for exact clipping.

        Raises:
            RuntimeError: no closure under exact clipping.
        """
        loss = None
        if self.max_grad_norm is not None and self.clipping == "exact":
            if closure is None:
                raise RuntimeError('clipping="exact": expected a closure that runs the backward pass, got None')
            loss = self._clipped_exactly(closure)
        elif closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._end()
        return loss

    def _clipped_exactly(self, closure: Callable[[], Any]) -> Any:
        params = [param for group in self.param_groups for param in group["params"]]
        with torch.random.fork_rng({param.device.index or 0 for param in params if param.device.type == "cuda"}):
            self._measures = True
            try:
                with torch.enable_grad():
                    loss = closure()
                self._flush()
            finally:
                self._measures = False
        squares, self._squares = self._squares, []
        norm = _norm(squares)
        self.zero_grad()
        if norm is None:
            return loss
        if not bool(torch.isfinite(norm)):
            warn_caller(
                "the norm of all gradients is NaN or infinite; the step was skipped, weights and states are unchanged"
            )
            return loss
        self._divisor = _divisor(norm, self.max_grad_norm or 0.0)
        try:
            with torch.enable_grad():
                loss = closure()
            self._flush()
        finally:
            self._divisor = None
        return loss

    @torch.no_grad()
    def _flush(self) -> None:
        """Uses what has been added up by fewer than ``accumulation_steps`` backward passes."""
        for update in list(self._updates.values()):
            if 0 < self._counts.get(id(update.param), 0) < self.accumulation_steps:
                self._counts[id(update.param)] = self.accumulation_steps
                self._use(update)

    @torch.no_grad()
    def _end(self) -> None:
        if not self._updates:  # so that nothing has been checked
            self.optimizer.check_held()
        self._flush()
        for param in (param for group in self.param_groups for param in group["params"]):
            if param.grad is not None:
                raise RuntimeError(
                    f"a parameter of shape {tuple(param.shape)} has a gradient, and did not require one when it was "
                    "given to LayerwiseOptimizer; make a new LayerwiseOptimizer after a change of requires_grad"
                )
        norm = _norm(self._squares)
        if norm is not None:
            last = torch.zeros_like(norm) if self._previous_norm is None else self._previous_norm.to(norm.device)
            self._previous_norm = torch.where(norm.isfinite(), norm, last)
        if self._updates:
            self.optimizer.end_step()
        self._begin()


def _divisor(norm: Tensor, most: float) -> Tensor:
    """What gradients of this norm are divided by, so that it is ``most`` at most."""
    # Of a norm beyond float32 NaN, by which gradients are skipped, where infinity would make them zero.
    return torch.where(norm.isfinite(), (norm / most).clamp_min(1.0), torch.nan)


def _norm(squares: list[Tensor]) -> Tensor | None:
    return torch.stack([square.to(squares[0].device) for square in squares]).sum().sqrt() if squares else None


def _refuse_auto(group: Mapping[str, Any], where: str) -> None:
    if group["rank"] == AUTO:
        raise ValueError(
            f'rank="auto" in {where}: ranks are chosen from the gradients of all layers, which never exist at one time '
            "here; choose them in a run without layerwise updates, or name a rank"
        )
