"""What is behind every optimizer: groups, what it holds, persistence."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from galore_kernels.nn import LowRankGradient, WeightCodes, carried_gradient_of, check_unflattened
from galore_kernels.ops import registry
from galore_kernels.optim import serialization
from galore_kernels.optim.auto_rank import check_budget, undecided
from galore_kernels.optim.factored import check_dense, check_factored
from galore_kernels.optim.given import Given
from galore_kernels.optim.one_by_one import OneByOne
from galore_kernels.optim.options import AUTO, SUBSPACE_DEFAULTS, check_group, check_param
from galore_kernels.optim.shard import check_sharding, is_dtensor, shard_of
from galore_kernels.optim.sharded_state import as_dtensors
from galore_kernels.optim.state import describe_group, refresh_record, tensor_bytes


class LowRankOptimizer(OneByOne):
    """What all optimizers are but for their rule and their constructor.

    Args:
        params: parameters, (name, parameter) pairs, or groups.
        defaults: every key of a group but ``params``, with the constructor's values.
        backend: "auto" or a backend's name.
    """

    def __init__(self, params: Iterable[Any], defaults: dict[str, Any], backend: str) -> None:
        registry.check_backend_name(backend)
        if isinstance(params, Tensor):
            raise TypeError("params: expected an iterable of tensors or groups, got a Tensor; wrap it in a list")
        entries = list(params)
        defaults = {**SUBSPACE_DEFAULTS, **defaults}
        check_group(defaults, f"{type(self).__name__}(...)", self.rule)
        self._backend = backend
        # Given groups of which some carry a rank, exactly those are projected.
        self._ranks_are_explicit = any(isinstance(entry, dict) and "rank" in entry for entry in entries)
        #: Of the ``LayerwiseOptimizer`` that wraps this one.
        self.layerwise_hooks: list[RemovableHandle] = []
        self._given = Given()
        self._forget()
        super().__init__(entries, defaults)
        self._is_made = True
        self._adopt()
        params = [param for group in self.param_groups for param in group["params"]]
        shards = [shard_of(param) for param in params if not param.is_meta]
        self._agree([shard for shard in shards if shard is not None])

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
        if group.get("rank", AUTO) != AUTO:
            group.setdefault("rank_budget", None)  # the constructor's is for those that are chosen
        group[serialization.HEADER] = serialization.origin(type(self).__name__)
        for key in self.rule.own_keys:
            value = group.get(key, self.defaults[key])
            group[key] = tuple(value) if isinstance(value, list) else value
        self._check_new_params(group, where)
        first = f' ("{_entry_name(group["params"][0])}")' if group["params"] and _entry_name(group["params"][0]) else ""
        check_group({**self.defaults, **group}, where + first, self.rule)
        if undecided({**self.defaults, **group}):
            params = [entry[1] if isinstance(entry, tuple) else entry for entry in group["params"]]
            check_budget({**self.defaults, **group, "params": params}, self._layout)
        for position, param in enumerate(group["params"]):
            tensor = param[1] if isinstance(param, tuple) else param
            name = _parameter_name(where, position, param)
            check_sharding(tensor, {**self.defaults, **group}, name, self._refuser)
            gradient, complete = carried_gradient_of(tensor), {**self.defaults, **group, "params": [tensor]}
            if isinstance(gradient, LowRankGradient):
                if not self.rule.takes_lowrank:
                    raise ValueError(
                        f"{where}: a layer of shape {tuple(gradient.weight.shape)} was prepared with rank "
                        f"{gradient.rank}, and its full gradient is never there, which {type(self).__name__} scales; "
                        'unprepare the model, or prepare it with rank=None, weights="int8"'
                    )
                check_factored(gradient, complete, where)
            elif gradient is not None:
                check_dense(tensor, self._layout(tensor, complete), complete, where)
        super().add_param_group(group)
        self._has_agreed = False
        self._given.add(self.param_groups[-1]["params"])
        if self._is_made:
            self._adopt()

    def _check_new_params(self, group: dict[str, Any], where: str) -> None:
        present = {id(param) for group in self.param_groups for param in group["params"]}
        for position, entry in enumerate(group["params"]):
            if isinstance(entry, tuple) and not (len(entry) == 2 and isinstance(entry[0], str)):
                raise TypeError(
                    f"{where}, parameter {position}: expected a tensor or a (name, tensor) pair, got a tuple of "
                    f"{', '.join(type(item).__name__ for item in entry)}; pass model.named_parameters()"
                )
            param = entry[1] if isinstance(entry, tuple) else entry
            name = _parameter_name(where, position, entry)
            if not isinstance(param, WeightCodes):  # which have no gradient: what updates them is another parameter
                check_param(param, name)
            check_unflattened(param, name)
            if id(param) in present:
                raise ValueError(f"{name}: given twice; pass each parameter once (tied weights are one parameter)")
            present.add(id(param))

    # ------------------------------------------------------------------ what it holds

    def skipped_steps(self) -> dict[str, int]:
        """Parameters (by position and, if named, name) of which steps were skipped, and how many."""
        counts = {name: int(self.state[p]["skipped"]) for _, name, p, _ in self._named_params() if self.state.get(p)}
        return {name: count for name, count in counts.items() if count}

    def subspace_report(self) -> dict[str, dict[str, Any]]:
        """What the last refresh of each projected parameter found, by the parameter's position and, if named, name.

        Returns:
            For each that has a basis: ``rank``; ``captured``, the estimated share of the gradient's energy in it;
            ``overlap`` with the basis before, 1 if the subspace stayed and r / S if chance alone is left of it (None
            at the first); both None where they are unknown, as of drawn bases; ``refreshes``; ``refreshed_at``, the
            steps taken before the last; ``interval``, steps from then to the next. Takes over what an asynchronous
            refresh has found, and waits for it.
        """
        self.take_pending()
        report = {}
        for _, name, param, group in self._named_params():
            state = self.state.get(param)
            if state and state.get("refreshes"):
                record, layout = refresh_record(state), self._layout(param, group)
                report[name] = {
                    "rank": layout.rank,
                    "captured": record.captured or None,  # 0: drawn, or brought over from elsewhere
                    "overlap": record.overlap if record.refreshes > 1 and not layout.draws else None,
                    "refreshes": record.refreshes,
                    "refreshed_at": record.refreshed_at,
                    "interval": record.interval,
                }
        return report

    def state_bytes(self) -> int:
        """Bytes of optimizer state: what is held, and for parameters without a step yet, what will be.

        Before ``rank="auto"`` has been decided, its budget counts, which is an upper bound.
        Nothing is allocated; parameters may be on the meta device.
        """
        total = 0
        for group in filter(undecided, self.param_groups):
            projects = any(self._layout(param, group).rank is not None for param in group["params"])
            total += group["rank_budget"] if projects else 0
        for _, _, param, group in self._named_params():
            state = self.state.get(param)
            if undecided(group) and self._layout(param, group).rank is not None:
                continue
            if not state and (param.numel() == 0 or not param.requires_grad):
                continue  # it takes no step
            if not state:
                state = self._layout(param, group).new_state(torch.empty_like(param, device="meta"))
            total += tensor_bytes(state)
        return total

    def __repr__(self) -> str:
        lines = [f"{type(self).__name__} ({self.rule!r}, backend {self._backend_name()})"]
        for index, group in enumerate(self.param_groups):
            layouts = [self._layout(param, group) for param in group["params"] if param.requires_grad]
            lines.append(f"  group {index}: {describe_group(group, layouts, self.rule)}")
        return "\n".join(lines)

    def _backend_name(self) -> str:
        devices = {param.device for group in self.param_groups for param in group["params"]} - {torch.device("meta")}
        name, chosen = self._backend, {self._backend}
        if name == "auto":
            chosen = {registry.select(self.rule.served_by, name, device).name for device in devices}
            name = f"auto -> {', '.join(sorted(chosen)) or 'none yet'}"
        full_rank = all(registry.implements(self.rule.full_rank, one) for one in chosen)
        return name if full_rank else f"{name}, at full rank reference"

    # ------------------------------------------------------------------ persistence

    def __getstate__(self) -> dict[str, Any]:
        self.take_pending()
        own = {key: self.__dict__[key] for key in ("_backend", "_ranks_are_explicit")}
        return {**super().__getstate__(), **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("layerwise_hooks", [])
        if "_given" not in self.__dict__:  # else groups were loaded, of the parameters that were held
            self._given = Given()
            self._given.add(param for group in self.param_groups for param in group["params"])
        self._forget()
        self._is_made = True
        self._adopt()

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain numbers, with a format version and a checksum of each parameter's state.

        Loads with ``weights_only=True``. As in torch.optim, the tensors are the optimizer's own, not copies: save or
        deep-copy the dict before the next step, or its checksums no longer fit. The groups' options are not part of
        the checksums (people edit a learning rate there); ``galore_kernels.checkpoint`` covers the whole file.

        Moments of DTensors (``fully_shard``) are DTensors, divided as the parameter; ``torch.distributed.checkpoint``
        saves them, and loads them into any number of processes. It leaves the checksums out.
        """
        self.take_pending()
        state_dict = super().state_dict()
        for index, _, param, group in self._named_params():
            if is_dtensor(param) and index in state_dict["state"]:
                state_dict["state"][index] = as_dtensors(state_dict["state"][index], self._layout(param, group))
        return serialization.add_header(state_dict, type(self).__name__)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what ``state_dict()`` gave, copied to the parameters' devices and never cast.

        Parameters that are DTensors take DTensors, or whole tensors, of which each process keeps its part.

        Raises:
            ValueError: it is of another version, optimizer, rank or shape, lacks fields, holds NaN or does not match
                its checksum. The message names the parameter; the optimizer is as it was.
        """
        if self.packed.gradients():
            raise RuntimeError(
                "load_state_dict: expected no gradients that are projected by the bases of before (reduce_lowrank); "
                "call zero_grad() first, or load before the backward pass"
            )
        state_dict = dict(state_dict)  # the hooks' to change, not the caller's
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            replaced = hook(self, state_dict)
            state_dict = state_dict if replaced is None else replaced
        state, groups = serialization.checked(
            state_dict, type(self).__name__, self.param_groups, list(self._named_params()), self._layout, self.rule
        )
        self.__setstate__({"state": defaultdict(dict, state), "param_groups": groups})
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)


def _parameter_name(where: str, position: int, entry: Any) -> str:
    return f"{where}, parameter {position}" + (f' ("{_entry_name(entry)}")' if _entry_name(entry) else "")


def _entry_name(entry: Any) -> str:
    return str(entry[0]) if isinstance(entry, tuple) else ""
