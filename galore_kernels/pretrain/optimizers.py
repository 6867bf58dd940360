"""The optimizers that ``--optimizer`` can choose, built for one model from one configuration."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from typing import Any

import torch

from . import rivals
from .config import Config

__all__ = ["build_optimizer", "package_versions", "subspace_report"]

_BETAS = (0.9, 0.999)

# Which modules' linear layers are projected, as in the GaLore paper: attention and MLP.
_TARGETS = ("attn", "mlp")


def build_optimizer(model: torch.nn.Module, config: Config) -> torch.optim.Optimizer:
    """Optimizer of ``config`` over all parameters of ``model``; those that project do so to the same matrices.

    For factored gradients and int8 weights the model's layers are prepared.

    Raises:
        PretrainError: the package of the chosen rival is not installed.
    """
    return _BUILDERS[config.optimizer](model, config)


def subspace_report(optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Any]]:
    """What ours tells of its subspaces; empty for the rivals, and before the first step."""
    report = getattr(optimizer, "subspace_report", None)
    return report() if callable(report) else {}


def package_versions() -> dict[str, str]:
    """Version of every package that has a say in the result, ``"not installed"`` included."""
    names = ("galore-kernels", "torch", "transformers", "numpy", "bitsandbytes", "galore-torch", "apollo-torch")
    return {name: _version(name) for name in names}


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _adam_options(config: Config) -> dict[str, Any]:
    return {"betas": _BETAS, "eps": config.eps}


def _adafactor_options(_: Config) -> dict[str, Any]:
    # As in the GaLore repository's torchrun_main.py; eps is another thing than Adam's, and stays Adafactor's.
    return {"relative_step": False, "scale_parameter": False}


def _ours(
    class_name: str, own_options: Callable[[Config], dict[str, Any]] = _adam_options, **of_groups: Any
) -> Callable[[torch.nn.Module, Config], torch.optim.Optimizer]:
    def build(model: torch.nn.Module, config: Config) -> torch.optim.Optimizer:
        import galore_kernels

        weights = None if config.weights == "float" else config.weights
        if config.gradients == "factored":
            galore_kernels.prepare(model, list(_TARGETS), config.rank, proj_type=config.proj_type, weights=weights)
        elif weights is not None:
            galore_kernels.prepare(model, list(_TARGETS), rank=None, weights=weights)
        groups = galore_kernels.galore_param_groups(
            model,
            target_modules=list(_TARGETS),
            rank=config.rank,
            update_proj_gap=config.update_proj_gap,
            scale=config.scale,
            proj_type=config.proj_type,
            refresh_method=config.refresh_method,
            refresh_schedule=config.refresh_schedule,
            warm_start=config.warm_start,
            async_refresh=config.async_refresh,
            moments_on_refresh=config.moments_on_refresh,
            basis_format=config.basis_format,
            **of_groups,
        )
        optimizer_class = getattr(galore_kernels, class_name)
        optimizer: Any = optimizer_class(
            groups, lr=config.lr, weight_decay=config.weight_decay, seed=config.seed, **own_options(config)
        )
        if config.updates == "layerwise":
            return galore_kernels.LayerwiseOptimizer(
                optimizer, accumulation_steps=config.accumulate, max_grad_norm=config.clip or None
            )
        return optimizer

    return build


def _adamw(model: torch.nn.Module, config: Config) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        model.parameters(), lr=config.lr, betas=_BETAS, eps=config.eps, weight_decay=config.weight_decay
    )


def _adamw8bit(model: torch.nn.Module, config: Config) -> torch.optim.Optimizer:
    bitsandbytes = rivals.import_rival("bitsandbytes", "bitsandbytes")
    optimizer: torch.optim.Optimizer = bitsandbytes.optim.AdamW8bit(
        model.parameters(), lr=config.lr, betas=_BETAS, eps=config.eps, weight_decay=config.weight_decay
    )
    return optimizer


def _galore_torch(model: torch.nn.Module, config: Config) -> torch.optim.Optimizer:
    optimizer_class = rivals.import_rival("galore_torch", "galore-torch").GaLoreAdamW
    optimizer: torch.optim.Optimizer = optimizer_class(
        _galore_torch_groups(model, config), lr=config.lr, betas=_BETAS, eps=config.eps,
        weight_decay=config.weight_decay, no_deprecation_warning=True,
    )  # fmt: skip
    return optimizer


def _galore_torch8bit(model: torch.nn.Module, config: Config) -> torch.optim.Optimizer:
    optimizer_class: Any = rivals.patched_galore_torch_adamw8bit()
    optimizer: torch.optim.Optimizer = optimizer_class(
        _galore_torch_groups(model, config), lr=config.lr, betas=_BETAS, eps=config.eps,
        weight_decay=config.weight_decay,
    )  # fmt: skip
    return optimizer


def _galore_torch_adafactor(model: torch.nn.Module, config: Config) -> torch.optim.Optimizer:
    optimizer_class = rivals.import_rival("galore_torch", "galore-torch").GaLoreAdafactor
    optimizer: torch.optim.Optimizer = optimizer_class(
        _galore_torch_groups(model, config), lr=config.lr, weight_decay=config.weight_decay,
        **_adafactor_options(config),
    )  # fmt: skip
    return optimizer


def _apollo_torch(model: torch.nn.Module, config: Config) -> torch.optim.Optimizer:
    optimizer_class = rivals.import_rival("apollo_torch", "apollo-torch").APOLLOAdamW
    optimizer: torch.optim.Optimizer = optimizer_class(
        _galore_torch_groups(model, config, proj="random", scale_type="channel"), lr=config.lr, betas=_BETAS,
        eps=config.eps, weight_decay=config.weight_decay,
    )  # fmt: skip
    return optimizer


def _galore_torch_groups(model: torch.nn.Module, config: Config, **own: Any) -> list[dict[str, Any]]:
    projected = [
        module.weight
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and any(target in name for target in _TARGETS)
    ]
    chosen = set(projected)
    return [
        {"params": [parameter for parameter in model.parameters() if parameter not in chosen]},
        {
            "params": projected,
            "rank": config.rank,
            "update_proj_gap": config.update_proj_gap,
            "scale": config.scale,
            "proj_type": config.proj_type,
            **own,
        },
    ]


_BUILDERS: dict[str, Callable[[torch.nn.Module, Config], torch.optim.Optimizer]] = {
    "galore8bit": _ours("GaLoreFusedAdam8bit"),
    "galore": _ours("GaLoreFusedAdamW"),
    "galore_adafactor": _ours("GaLoreFusedAdafactor", _adafactor_options),
    "apollo8bit": _ours("APOLLOFusedAdam8bit"),
    "apollo": _ours("APOLLOFusedAdamW"),
    "apollo_mini": _ours("APOLLOFusedAdamW", scale_type="tensor"),
    "adamw": _adamw,
    "adamw8bit": _adamw8bit,
    "galore_torch": _galore_torch,
    "galore_torch8bit": _galore_torch8bit,
    "galore_torch_adafactor": _galore_torch_adafactor,
    "apollo_torch": _apollo_torch,
}
