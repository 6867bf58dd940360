"""GaLore's optimizers: ``GaLoreFusedAdam8bit`` and ``GaLoreFusedAdamW``."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from galore_kernels import ops
from galore_kernels.ops import registry
from galore_kernels.optim import serialization
from galore_kernels.optim.options import check_group, check_param, check_scheduled, matrix_shape
from galore_kernels.optim.state import Layout, adam_state, tensor_bytes
from galore_kernels.subspace import refresh_basis


class NonFiniteGradientWarning(UserWarning):
    """A tensor's step was skipped because its gradient is NaN, infinite or too large to have a second moment."""


class _Update:
    """One parameter's part of a step: what ``step()`` needs to know of it, checked before anything changes."""

    __slots__ = ("grad", "group", "index", "layout", "name", "param")

    def __init__(self, param: Tensor, group: dict[str, Any], index: int, name: str, layout: Layout) -> None:
        assert param.grad is not None
        self.param, self.grad, self.group, self.index = param, param.grad, group, index
        self.name, self.layout = name, layout


def _seed(*parts: object) -> int:
    """A 63-bit seed from the optimizer's seed and what it is for: the same in every process and after a resume."""
    text = ":".join(map(str, parts))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


class _GaLoreAdam(Optimizer):
    """Adam in the gradient's low-rank subspace. The subclasses choose the format of the moments."""

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
        }
        check_group(defaults, f"{type(self).__name__}(...)")
        self._seed = seed
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
        params = group["params"]
        if isinstance(params, set):
            raise TypeError(f"{where}: expected an ordered collection of parameters, got a set; pass a list")
        group["params"] = [params] if isinstance(params, Tensor) else list(params)
        explicit = "rank" in group
        if not explicit and self._ranks_are_explicit:
            group["rank"] = None
        group["rank_is_explicit"] = explicit
        group["betas"] = tuple(group.get("betas", self.defaults["betas"]))
        self._check_new_params(group["params"], where)
        first = f' ("{_entry_name(group["params"][0])}")' if group["params"] and _entry_name(group["params"][0]) else ""
        check_group({**self.defaults, **group}, where + first)
        super().add_param_group(group)

    def _check_new_params(self, entries: list[Any], where: str) -> None:
        present = {id(param) for group in self.param_groups for param in group["params"]}
        for position, entry in enumerate(entries):
            param = entry[1] if isinstance(entry, tuple) else entry
            name = f'{where}, parameter {position}' + (f' ("{_entry_name(entry)}")' if _entry_name(entry) else "")
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
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Performs one optimization step.

        Everything is checked before anything changes. If a call raises half-way (out of memory, say), calling
        ``step()`` again with the same gradients continues where it stopped, so that no parameter is updated twice.

        A tensor whose gradient is NaN, infinite or beyond 1.8e19 is skipped: weight and state stay as they are, a
        ``NonFiniteGradientWarning`` names it, ``skipped_steps()`` counts it.

        Args:
            closure: reevaluates the model and returns the loss; run with gradients enabled.

        Returns:
            The closure's result, or None.

        Raises:
            ValueError: an option out of range, or a sparse, complex or wrongly shaped gradient; names the parameter.
        """
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
                lrs[key] = torch.as_tensor(lr, dtype=torch.float64).reshape(()).to(device)
            self._apply(update, lrs[key])
            self._interrupted.append((update.param, update.grad, update.grad._version))
        self._interrupted = []
        return loss

    def _collect(self) -> list[_Update]:
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
            layout = self._layout(param, group)
            moments = self.state[param]["exp_avg"].shape if self.state.get(param) else layout.moments
            if grad.shape != param.shape or tuple(moments) != layout.moments:
                raise ValueError(
                    f"{name}: weight {tuple(param.shape)}, gradient {tuple(grad.shape)} and state {tuple(moments)} do "
                    "not fit; it was resized since the last step: make a new optimizer, or restore the shape"
                )
            registry.select("adam8bit_update", self._backend, param.device)
            updates.append(_Update(param, group, index, name, layout))
        return updates

    def _resume_interrupted(self, updates: list[_Update]) -> set[int]:
        """Parameters to leave out because an interrupted step with these very gradients has updated them."""
        same = {id(update.param): update.grad for update in updates}
        if any(same.get(id(p)) is not g or g._version != version for p, g, version in self._interrupted):
            self._interrupted = []
        return {id(param) for param, _, _ in self._interrupted}

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch.optim's. Also gives up an interrupted step: the gradients it would continue with are gone."""
        self._interrupted = []
        super().zero_grad(set_to_none)

    def _apply(self, update: _Update, lr: Tensor) -> None:
        param, grad, group, layout = update.param, update.grad, update.group, update.layout
        fresh = not self.state.get(param)
        state = layout.new_state(param) if fresh else self.state[param]
        skipped = int(state["skipped"])
        options = ops.AdamOptions(
            lr,
            beta1=float(group["betas"][0]),
            beta2=float(group["betas"][1]),
            eps=float(group["eps"]),
            weight_decay=float(group["weight_decay"]),
            maximize=group["maximize"],
            grad_scale=getattr(self, "grad_scale", None),
            found_inf=getattr(self, "found_inf", None),
            rounding_seed=self._rounding_seed(update),
        )
        if layout.side is None:
            ops.adam8bit_update(param, grad, adam_state(state), options, backend=self._backend)
            changed: dict[str, Any] = {}
        else:
            changed = self._refresh(update, state)
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
        # Only now, when nothing can fail any more: a step that raised has changed nothing of this parameter.
        state.update(changed)
        if fresh:
            self.state[param] = state
        self._report_skip(update.name, skipped, int(state["skipped"]))

    def _rounding_seed(self, update: _Update) -> int | None:
        if not update.group["stochastic_rounding"] or update.param.dtype != torch.bfloat16:
            return None
        return _seed(self._seed, update.index, "rounding")

    def _refresh(self, update: _Update, state: dict[str, Any]) -> dict[str, Any]:
        """The entries that a refresh of the subspace changes; empty if none is due.

        Due at the steps 0, T, 2T, ..., counted before the increment, and until a first basis has been found: a
        gradient that is zero or not finite has none, and the previous basis is kept.
        """
        if int(state["step"]) % update.group["update_proj_gap"] and state["refreshes"]:
            return {}
        gradient = update.grad.reshape(matrix_shape(update.param.shape))
        oriented = gradient if update.layout.side == "right" else gradient.T
        matrices = {"basis": oriented, "long_basis": oriented.T}
        rank, refreshes = update.layout.rank, state["refreshes"]
        assert rank is not None
        changed: dict[str, Any] = {}
        for name in update.layout.bases:
            changed[name] = refresh_basis(
                matrices[name],
                rank,
                previous=state[name],
                seed=_seed(self._seed, update.index, name, refreshes),
                method=update.group["refresh_method"],
            ).to(update.param.dtype)
        if refreshes or all(bool(basis.any()) for basis in changed.values()):
            changed["refreshes"] = refreshes + 1
        return changed

    def _report_skip(self, name: str, before: int, after: int) -> None:
        # At 1, 2, 4, 8, ... skipped steps: a broken run is told of it without being drowned in it.
        if after > before and after & (after - 1) == 0:
            warnings.warn(
                f"{name}: its gradient is NaN, infinite or beyond 1.8e19; its step was skipped, weight and state are "
                f"unchanged ({after} skipped so far)",
                NonFiniteGradientWarning,
                stacklevel=4,
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
            if not state:
                state = self._layout(param, group).new_state(torch.empty_like(param, device="meta"))
            total += tensor_bytes(state)
        return total

    def __repr__(self) -> str:
        lines = [f"{type(self).__name__} ({self._moments_name()} moments, backend {self._backend_name()})"]
        for index, group in enumerate(self.param_groups):
            layouts = [self._layout(param, group) for param in group["params"]]
            projected = [layout for layout in layouts if layout.rank is not None]
            parts = [f"lr {float(group['lr']):g}", f"weight_decay {float(group['weight_decay']):g}"]
            if projected:
                ranks = sorted({layout.rank for layout in projected if layout.rank is not None})
                parts.insert(
                    0,
                    f"{len(projected)} projected to rank {', '.join(map(str, ranks))} ({group['proj_type']}, scale "
                    f"{group['scale']:g}, refreshed every {group['update_proj_gap']} steps, {group['refresh_method']})",
                )
            if len(projected) < len(layouts):
                parts.insert(1 if projected else 0, f"{len(layouts) - len(projected)} at full rank")
            lines.append(f"  group {index}: {'; '.join(parts)}")
        return "\n".join(lines)

    def _moments_name(self) -> str:
        return "8-bit" if self._eight_bit else "float32"

    def _backend_name(self) -> str:
        devices = {param.device for group in self.param_groups for param in group["params"]} - {torch.device("meta")}
        chosen = {registry.select("galore_update", self._backend, device).name for device in devices}
        return f"{self._backend} -> {', '.join(sorted(chosen))}" if self._backend == "auto" else self._backend

    # ------------------------------------------------------------------ persistence

    def __getstate__(self) -> dict[str, Any]:
        own = {key: self.__dict__[key] for key in ("_seed", "_backend", "_ranks_are_explicit")}
        return {**super().__getstate__(), **own, "_interrupted": []}

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain numbers, with a format version and a checksum of each parameter's state.

        Loads with ``weights_only=True``. As in torch.optim, the tensors are the optimizer's own, not copies.
        """
        return serialization.add_header(super().state_dict(), type(self).__name__)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what ``state_dict()`` gave, copied to the parameters' devices and never cast.

        Raises:
            ValueError: it is of another version, optimizer, rank or shape, lacks fields, holds NaN or does not match
                its checksum. The message names the parameter; the optimizer is as it was.
        """
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            replaced = hook(self, state_dict)
            state_dict = state_dict if replaced is None else replaced
        state, groups = serialization.checked(
            state_dict, type(self).__name__, self.param_groups, list(self._named_params()), self._layout
        )
        self._interrupted = []
        self.__setstate__({"state": state, "param_groups": groups})
        for hook in self._optimizer_load_state_dict_post_hooks.values():
            hook(self)


def _entry_name(entry: Any) -> str:
    return str(entry[0]) if isinstance(entry, tuple) else ""


class GaLoreFusedAdam8bit(_GaLoreAdam):
    """GaLore with 8-bit Adam moments (Zhao et al., arXiv 2403.03507; Dettmers et al., arXiv 2110.02861).

    Matrices keep Adam's moments in a rank-r subspace of their gradient, found anew every ``update_proj_gap`` steps;
    everything else (norms, biases, what is left out) takes full-rank 8-bit Adam, and tensors whose moments have fewer
    than 4096 elements keep them in float32. The update is ``galore_kernels.ops.galore_update``.

    Which matrices are projected: given an iterable of parameters, every matrix with min(m, n) > rank (name the ones
    you mean with ``galore_param_groups``: embeddings are matrices too); given groups of which some carry ``rank``,
    exactly those groups' matrices, the rank clamped to min(m, n). ``rank=None`` means full rank.

    Args:
        params: parameters, (name, parameter) pairs, or groups with any of the options below as keys; a group's
            value overrides the constructor's.
        lr: learning rate >= 0, a float or a 0-d tensor.
        betas: decay rates of the moments, in [0, 1).
        eps: added to sqrt(v) before bias correction, as galore_torch does; >= 0.
        weight_decay: decoupled decay, ``lr * weight_decay * w`` after the update; >= 0.
        rank: r >= 1, or None for full rank.
        update_proj_gap: steps T between refreshes of the subspace, >= 1.
        scale: GaLore's alpha, > 0.
        proj_type: "std" projects the smaller dimension, "reverse_std" the larger, "left" rows, "right" columns,
            "full" both.
        refresh_method: "randomized" (range finder) or "svd" (exact).
        stochastic_rounding: round bfloat16 weights stochastically; other dtypes round to nearest in any case.
        maximize: ascend instead of descend.
        project_nd: project tensors of three and more dimensions (convolutions) as (first, rest) matrices.
        seed: of the refresh's sketches and of stochastic rounding.
        backend: "auto", "cpu" or "reference"; see ``galore_kernels.backend_info()``.

    Raises:
        ValueError, TypeError: an argument out of range; names argument, group and remedy.
    """

    _eight_bit = True


class GaLoreFusedAdamW(_GaLoreAdam):
    """GaLore with float32 Adam moments; everything else as ``GaLoreFusedAdam8bit``."""

    _eight_bit = False
