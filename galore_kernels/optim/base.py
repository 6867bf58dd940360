"""The optimizer behind ``GaLoreFusedAdam8bit`` and ``GaLoreFusedAdamW``: groups, step, persistence."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from galore_kernels import ops
from galore_kernels.ops import registry
from galore_kernels.optim import serialization
from galore_kernels.optim.options import check_group, check_param, check_scheduled, matrix_shape
from galore_kernels.optim.state import Layout, adam_state, describe_group, tensor_bytes
from galore_kernels.optim.update import Update, refreshed


class NonFiniteGradientWarning(UserWarning):
    """A tensor's step was skipped because its gradient is NaN, infinite or too large to have a second moment."""


class GaLoreAdam(Optimizer):
    """Adam in the gradient's low-rank subspace: what both public optimizers are, but for the format of the moments."""

    _eight_bit: ClassVar[bool]

    # torch.amp.GradScaler then passes grad_scale and found_inf instead of unscaling and skipping itself.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        rank: int | None = 128,
        update_proj_gap: int = 200,
        scale: float = 0.25,
        proj_type: str = "std",
        refresh_method: str = "randomized",
        stochastic_rounding: bool = False,
        maximize: bool = False,
        project_nd: bool = False,
        seed: int = 0,
        backend: str = "auto",
    ) -> None:
        registry.check_backend_name(backend)
        if isinstance(params, Tensor):
            raise TypeError("params: expected an iterable of tensors or groups, got a Tensor; wrap it in a list")
        entries = list(params)
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "rank": rank,
            "update_proj_gap": update_proj_gap,
            "scale": scale,
            "proj_type": proj_type,
            "refresh_method": refresh_method,
            "stochastic_rounding": stochastic_rounding,
            "maximize": maximize,
            "project_nd": project_nd,
            "seed": seed,
        }
        check_group(defaults, f"{type(self).__name__}(...)")
        self._backend = backend
        # Given groups of which some carry a rank, exactly those are projected.
        self._ranks_are_explicit = any(isinstance(entry, dict) and "rank" in entry for entry in entries)
        # Parameters already updated in a step that raised half-way, with the gradient they were updated by.
        self._interrupted: list[tuple[Tensor, Tensor, int]] = []
        super().__init__(entries, defaults)

    # ------------------------------------------------------------------ groups

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group; its keys override the constructor's values.

        Raises:
            ValueError, TypeError: a bad option, an unknown key that resembles a known one, a parameter that is there
                twice or can't be optimized. The message names group and parameter; nothing has changed.
        """
        where = f"param group {len(self.param_groups)}"
        if not isinstance(param_group, dict):
            raise TypeError(f"{where}: expected a dict, got {type(param_group).__name__}")
        group = dict(param_group)
        if "params" not in group:
            raise ValueError(f'{where}: expected the key "params", got {sorted(group)}; add the parameters\' list')
        params = group["params"]
        if isinstance(params, set):
            raise TypeError(f"{where}: expected an ordered collection of parameters, got a set; pass a list")
        group["params"] = [params] if isinstance(params, Tensor) else list(params)
        explicit = group.get("rank_is_explicit", "rank" in group)
        if not explicit and self._ranks_are_explicit:
            group["rank"] = None
        group["rank_is_explicit"] = explicit
        betas = group.get("betas", self.defaults["betas"])
        group["betas"] = tuple(betas) if isinstance(betas, list) else betas
        self._check_new_params(group["params"], where)
        first = f' ("{_entry_name(group["params"][0])}")' if group["params"] and _entry_name(group["params"][0]) else ""
        check_group({**self.defaults, **group}, where + first)
        super().add_param_group(group)

    def _check_new_params(self, entries: list[Any], where: str) -> None:
        present = {id(param) for group in self.param_groups for param in group["params"]}
        for position, entry in enumerate(entries):
            if isinstance(entry, tuple) and not (len(entry) == 2 and isinstance(entry[0], str)):
                raise TypeError(
                    f"{where}, parameter {position}: expected a tensor or a (name, tensor) pair, got a tuple of "
                    f"{', '.join(type(item).__name__ for item in entry)}; pass model.named_parameters()"
                )
            param = entry[1] if isinstance(entry, tuple) else entry
            name = f"{where}, parameter {position}" + (f' ("{_entry_name(entry)}")' if _entry_name(entry) else "")
            check_param(param, name)
            if id(param) in present:
                raise ValueError(f"{name}: given twice; pass each parameter once (tied weights are one parameter)")
            present.add(id(param))

    def _named_params(self) -> Iterator[tuple[int, str, Tensor, dict[str, Any]]]:
        """(index over all groups, name for messages, parameter, group)."""
        index = 0
        for group_index, group in enumerate(self.param_groups):
            names = group.get("param_names")
            for position, param in enumerate(group["params"]):
                name = f"param group {group_index}, parameter {position}"
                if names is not None:
                    name += f' ("{names[position]}")'
                yield index, name, param, group
                index += 1

    def _layout(self, param: Tensor, group: dict[str, Any]) -> Layout:
        return Layout.of(param, group, eight_bit=self._eight_bit)

    # ------------------------------------------------------------------ step

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Performs one optimization step.

        Everything is checked before anything changes. If a call raises half-way (out of memory, say), calling
        ``step()`` again with the same gradients continues where it stopped, so that no parameter is updated twice.
        Gradients are the same if nothing has written to them (as autograd counts it: not through ``.data``).

        A tensor whose gradient is NaN, infinite or beyond 1.8e19 is skipped: weight and state stay as they are, a
        ``NonFiniteGradientWarning`` names it, ``skipped_steps()`` counts it.

        Args:
            closure: reevaluates the model and returns the loss; run with gradients enabled.

        Returns:
            The closure's result, or None.

        Raises:
            ValueError: an option out of range, or a sparse, complex or wrongly shaped gradient; names the parameter.
        """
        try:
            return self._step(closure)
        except BaseException:
            # GradScaler sets these for the call, and multiplies into what it finds: left behind by a call that failed,
            # they would unscale the retry twice.
            for name in ("grad_scale", "found_inf"):
                self.__dict__.pop(name, None)
            raise

    def _step(self, closure: Callable[[], Any] | None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        updates = self._collect()
        done = self._resume_interrupted(updates)
        lrs: dict[tuple[int, torch.device], Tensor] = {}
        for update in updates:
            if id(update.param) in done:
                continue
            lr = update.group["lr"]
            device = update.param.device
            key = (id(update.group), device)
            if key not in lrs:
                lrs[key] = torch.as_tensor(lr, dtype=torch.float64, device=device).reshape(())
            skipped = self._apply(update, lrs[key])
            self._interrupted.append((update.param, update.grad, update.grad._version))
            # Last: a warning may be turned into an exception.
            self._report_skip(update.name, skipped)
        self._interrupted = []
        return loss

    def _collect(self) -> list[Update]:
        for group_index, group in enumerate(self.param_groups):
            check_scheduled(group, f"param group {group_index}")
        updates = []
        for index, name, param, group in self._named_params():
            grad = param.grad
            if grad is None or param.numel() == 0:
                continue
            check_param(param, name)
            if grad.layout != torch.strided or grad.is_complex():
                raise ValueError(f"{name}: expected a dense real gradient, got {grad.layout}, {grad.dtype}; densify it")
            if not grad.is_floating_point() or grad.dtype == torch.float64:
                raise ValueError(f"{name}: expected a float32, bfloat16 or float16 gradient, got {grad.dtype}")
            if grad.is_inference():
                raise ValueError(
                    f"{name}: its gradient was made in inference mode; run the backward pass outside of it"
                )
            layout = self._layout(param, group)
            state = self.state.get(param)
            if grad.device != param.device or (state and state["exp_avg"].device != param.device):
                raise ValueError(
                    f"{name}: the weight is on {param.device}, its gradient or its state is not; move the model before "
                    "the first step, or load the optimizer's state_dict again after moving it"
                )
            if grad.shape != param.shape or (state and not layout.fits(state)):
                raise ValueError(
                    f"{name}: the weight has shape {tuple(param.shape)}, its gradient {tuple(grad.shape)}, and its "
                    "state was made for another shape or rank; it was changed since the last step: make a new "
                    "optimizer, or restore it"
                )
            registry.select("adam8bit_update", self._backend, param.device)
            updates.append(Update(param, grad, group, index, name, layout))
        return updates

    def _resume_interrupted(self, updates: list[Update]) -> set[int]:
        """Parameters to leave out because an interrupted step with these very gradients has updated them."""
        same = {id(update.param): update.grad for update in updates}
        if any(same.get(id(p)) is not g or g._version != version for p, g, version in self._interrupted):
            self._interrupted = []
        return {id(param) for param, _, _ in self._interrupted}

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch.optim's. Also gives up an interrupted step: the gradients it would continue with are gone."""
        self._interrupted = []
        super().zero_grad(set_to_none)

    def _apply(self, update: Update, lr: Tensor) -> int:
        """Updates one parameter. Returns how many of its steps have been skipped if this one was, else 0."""
        param, grad, group, layout = update.param, update.grad, update.group, update.layout
        fresh = not self.state.get(param)
        state = layout.new_state(param) if fresh else self.state[param]
        step, skipped = int(state["step"]), int(state["skipped"])
        options = ops.AdamOptions(
            lr,
            beta1=float(group["betas"][0]),
            beta2=float(group["betas"][1]),
            eps=float(group["eps"]),
            weight_decay=float(group["weight_decay"]),
            maximize=group["maximize"],
            grad_scale=getattr(self, "grad_scale", None),
            found_inf=getattr(self, "found_inf", None),
            rounding_seed=update.rounding_seed(),
        )
        changed: dict[str, Any] = {}
        if layout.side is None:
            ops.adam8bit_update(param, grad, adam_state(state), options, backend=self._backend)
        else:
            changed = refreshed(update, state)
            bases = {**state, **changed}
            shape = matrix_shape(param.shape)
            weight = param.reshape(shape)
            ops.galore_update(
                weight,
                grad.reshape(shape),
                bases["basis"],
                adam_state(state),
                options,
                side=layout.side,
                scale=float(group["scale"]),
                long_basis=bases.get("long_basis"),
                backend=self._backend,
            )
            if weight.data_ptr() != param.data_ptr():
                param.copy_(weight.view(param.shape))
        # Only now, when nothing can fail any more: a step that raised has changed nothing of this parameter. A skipped
        # step hasn't either: a basis found in a gradient that is not used goes with it.
        stepped, skips = int(state["step"]) > step, int(state["skipped"])
        if stepped:
            state.update(changed)
        if fresh and (stepped or skips):
            self.state[param] = state
        return skips if skips > skipped else 0

    def _report_skip(self, name: str, skipped: int) -> None:
        # At 1, 2, 4, 8, ... skipped steps: a broken run is told of it without being drowned in it.
        if skipped and skipped & (skipped - 1) == 0:
            warnings.warn(
                f"{name}: its gradient is NaN, infinite or beyond 1.8e19; its step was skipped, weight and state are "
                f"unchanged ({skipped} skipped so far)",
                NonFiniteGradientWarning,
                stacklevel=6,  # _step, step and torch's two wrappers of it lie between here and the caller
            )

    # ------------------------------------------------------------------ what it holds

    def skipped_steps(self) -> dict[str, int]:
        """Parameters (by position and, if named, name) of which steps were skipped, and how many."""
        counts = {name: int(self.state[p]["skipped"]) for _, name, p, _ in self._named_params() if self.state.get(p)}
        return {name: count for name, count in counts.items() if count}

    def state_bytes(self) -> int:
        """Bytes of optimizer state: what is held, and for parameters without a step yet, what will be.

        Nothing is allocated; parameters may be on the meta device.
        """
        total = 0
        for _, _, param, group in self._named_params():
            state = self.state.get(param)
            if not state and param.numel() == 0:
                continue  # it never takes a step
            if not state:
                state = self._layout(param, group).new_state(torch.empty_like(param, device="meta"))
            total += tensor_bytes(state)
        return total

    def __repr__(self) -> str:
        moments = "8-bit" if self._eight_bit else "float32"
        lines = [f"{type(self).__name__} ({moments} moments, backend {self._backend_name()})"]
        for index, group in enumerate(self.param_groups):
            layouts = [self._layout(param, group) for param in group["params"]]
            lines.append(f"  group {index}: {describe_group(group, layouts)}")
        return "\n".join(lines)

    def _backend_name(self) -> str:
        if self._backend != "auto":
            return self._backend
        devices = {param.device for group in self.param_groups for param in group["params"]} - {torch.device("meta")}
        chosen = {registry.select("galore_update", "auto", device).name for device in devices}
        return f"auto -> {', '.join(sorted(chosen)) or 'none yet'}"

    # ------------------------------------------------------------------ persistence

    def __getstate__(self) -> dict[str, Any]:
        own = {key: self.__dict__[key] for key in ("_backend", "_ranks_are_explicit")}
        return {**super().__getstate__(), **own, "_interrupted": []}

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain numbers, with a format version and a checksum of each parameter's state.

        Loads with ``weights_only=True``. As in torch.optim, the tensors are the optimizer's own, not copies: save or
        deep-copy the dict before the next step, or its checksums no longer fit. The groups' options are not part of
        the checksums (people edit a learning rate there); ``galore_kernels.checkpoint`` covers the whole file.
        """
        return serialization.add_header(super().state_dict(), type(self).__name__)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what ``state_dict()`` gave, copied to the parameters' devices and never cast.

        Raises:
            ValueError: it is of another version, optimizer, rank or shape, lacks fields, holds NaN or does not match
                its checksum. The message names the parameter; the optimizer is as it was.
        """
        state_dict = dict(state_dict)  # the hooks' to change, not the caller's
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            replaced = hook(self, state_dict)
            state_dict = state_dict if replaced is None else replaced
        state, groups = serialization.checked(
            state_dict, type(self).__name__, self.param_groups, list(self._named_params()), self._layout
        )
        self._interrupted = []
        self.__setstate__({"state": defaultdict(dict, state), "param_groups": groups})
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)


def _entry_name(entry: Any) -> str:
    return str(entry[0]) if isinstance(entry, tuple) else ""
