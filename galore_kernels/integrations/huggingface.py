"""The optimizers in Hugging Face's Trainer (transformers >= 5.2), and in what is built on it, as TRL's SFTTrainer is.

from galore_kernels.integrations.huggingface import SubspaceCallback, trainer_optimizer

trainer = Trainer(
    model, args, train_dataset=texts, callbacks=[SubspaceCallback()],
    optimizer_cls_and_kwargs=trainer_optimizer(args, target_modules=["attn", "mlp"], rank=128, scale=0.25),
)
"""

from __future__ import annotations

import ast
import difflib
import inspect
import statistics
from collections.abc import Collection, Mapping
from functools import cache
from typing import Any

from torch import nn
from torch.optim import Optimizer

from galore_kernels import optim
from galore_kernels.nn import INSTEAD_OF_FLATTENING, TargetModules, lowrank_gradient_of
from galore_kernels.optim import LayerwiseOptimizer, galore_param_groups


def trainer_optimizer(
    args: Any,
    optimizer: str | type[Optimizer] = "GaLoreFusedAdam8bit",
    *,
    target_modules: TargetModules | None = None,
    layerwise: bool = False,
    max_grad_norm: float | None = None,
    **options: Any,
) -> tuple[Any, dict[str, Any]]:  # the Trainer's annotation knows classes of optimizers only
    """What ``Trainer(optimizer_cls_and_kwargs=...)`` takes.

    The optimizer gets all that TrainingArguments say of it: ``learning_rate``, ``weight_decay`` (of the parameters that
    the Trainer itself would let decay: no biases, no norms), ``adam_beta1``, ``adam_beta2``, ``adam_epsilon`` (where
    its class has ``betas``), and ``optim_args``. They are read when the Trainer makes the optimizer. ``optim`` is not
    looked at.

    Only trainable parameters are given to it: of a PEFT model the adapters. Those whose names are targets are projected
    as any other matrix, their ranks clamped to min(m, n); a weight with several names is projected if one is a target.

    Processes may share the work by DDP, FSDP2 or ZeRO stage 0; what flattens the matrices is refused.

    Args:
        args: the Trainer's TrainingArguments.
        optimizer: the name of an optimizer of ``galore_kernels``, or its class.
        target_modules: the layers whose weights are projected, as ``optim_target_modules`` names them: a list of
            strings, each a part of a layer's name or a regular expression for all of it; a string, such an expression;
            or "all-linear", which here leaves out the output head (add it by a list, ``[".*"]``, to have it as
            Transformers does). None takes ``args.optim_target_modules``.
        layerwise: update each parameter within the backward pass, by a ``LayerwiseOptimizer`` of the arguments'
            ``gradient_accumulation_steps`` and ``max_grad_norm``. The norm that the Trainer logs is 0 then: when it
            looks, the gradients are gone.
        max_grad_norm: of layerwise updates, where that of the arguments is 0: to clip them under accumulation.
        options: of the optimizer's class, and of the projected groups; they go before ``optim_args``, those before the
            other arguments. Without ``rank`` the class's own.

    Raises:
        ValueError, TypeError: an argument that doesn't fit, here; what does not fit the model, when the Trainer makes
            the optimizer.
    """
    optimizer_class = _optimizer_class(optimizer)
    _options(args, optimizer_class, options)
    _targets(args, target_modules)
    _refuse_flattening(args)
    if layerwise:
        _refuse_layerwise(args)
    if max_grad_norm is not None and (not layerwise or args.max_grad_norm):
        raise ValueError(
            f"max_grad_norm={max_grad_norm}: expected None unless layerwise=True and TrainingArguments have "
            "max_grad_norm=0; set it there instead"
        )
    kwargs = {"args": args, "optimizer": optimizer_class, "target_modules": target_modules, "layerwise": layerwise}
    return TrainerOptimizerFactory, {**kwargs, "max_grad_norm": max_grad_norm, "options": options}


class TrainerOptimizerFactory:
    """Makes an optimizer of a model and what ``trainer_optimizer`` has put beside it; the Trainer calls it."""

    def __call__(
        self,
        model: nn.Module,
        *,
        args: Any,
        optimizer: type[Optimizer],
        target_modules: TargetModules | None,
        layerwise: bool,
        max_grad_norm: float | None,
        options: Mapping[str, Any],
    ) -> Optimizer:
        """The optimizer.

        Raises:
            ValueError: no trainable layer is a target; a target's weight is not a matrix.
        """
        chosen = _options(args, optimizer, options)
        weight_decay = chosen.pop("weight_decay", 0.0)
        ranks = {key: chosen.pop(key) for key in ("rank", "rank_budget") if key in chosen}
        if not any(lowrank_gradient_of(param) for param in model.parameters()):  # whose ranks are their own
            ranks.setdefault("rank", _parameters(optimizer)["rank"].default)
        groups = galore_param_groups(model, _targets(args, target_modules), **ranks)
        _refuse_flattened(groups)
        made = optimizer(_by_decay(groups, _decaying(model), weight_decay), **chosen)
        if not layerwise:
            return made
        steps, norm = args.gradient_accumulation_steps, args.max_grad_norm or max_grad_norm or None
        return LayerwiseOptimizer(made, accumulation_steps=steps, max_grad_norm=norm)  # type: ignore[arg-type]


# ---------------------------------------------------------------------- what the arguments say


def _optimizer_class(optimizer: str | type[Optimizer]) -> type[Optimizer]:
    known = {name: value for name, value in vars(optim).items() if name in optim.__all__ and _projects(value)}
    found = known.get(optimizer) if isinstance(optimizer, str) else optimizer
    if not _projects(found):
        close = difflib.get_close_matches(str(optimizer), known, n=1)
        remedy = f'; did you mean "{close[0]}"?' if close else ""
        raise ValueError(
            f"optimizer={optimizer!r}: expected one of {', '.join(known)}, or the class of one with the option rank"
            f"{remedy}"
        )
    return found  # type: ignore[return-value]


def _projects(value: object) -> bool:
    return isinstance(value, type) and issubclass(value, Optimizer) and "rank" in _parameters(value)


def _parameters(optimizer: type[Optimizer]) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(optimizer).parameters


def _options(args: Any, optimizer: type[Optimizer], options: Mapping[str, Any]) -> dict[str, Any]:
    """The constructor's arguments: those of TrainingArguments, under ``optim_args``, under ``options``."""
    accepted = {name for name in _parameters(optimizer) if name != "params"}
    common = {"lr": args.learning_rate, "weight_decay": args.weight_decay}
    if "betas" in accepted:  # Adafactor's eps is another thing than Adam's
        common |= {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
    if "relative_step" in accepted:  # as the Trainer's own galore_adafactor: its learning rate counts, and is the step
        common |= {"relative_step": False, "scale_parameter": False}
    own = {**_parsed(args.optim_args), **options}
    for name in own:
        if name not in accepted:
            close = difflib.get_close_matches(name, accepted, n=1)
            remedy = f'; did you mean "{close[0]}"?' if close else ""
            raise TypeError(f"{optimizer.__name__} has no option {name!r}, but {', '.join(sorted(accepted))}{remedy}")
    return {**{name: value for name, value in common.items() if name in accepted}, **own}


def _parsed(optim_args: str | None) -> dict[str, Any]:
    parsed: dict[str, Any] = {}
    for item in (optim_args or "").replace(" ", "").split(","):
        name, equals, value = item.partition("=")
        if item and not (name and equals and value):
            raise ValueError(f'optim_args={optim_args!r}: expected "name=value, name=value", got {item!r} in it')
        if item:
            parsed[name] = _literal(value)
    return parsed


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _targets(args: Any, target_modules: TargetModules | None) -> TargetModules:
    targets = args.optim_target_modules if target_modules is None else target_modules
    if targets is None:
        raise ValueError(
            "target_modules: expected the layers to project, got none; pass target_modules, or set "
            'optim_target_modules in TrainingArguments: ["attn", "mlp"], as in GaLore\'s paper, or "all-linear"'
        )
    return "all-linear" if targets == "all_linear" else targets


def _refuse_flattening(args: Any) -> None:
    host, plugin = None, getattr(args, "deepspeed_plugin", None)
    if plugin is not None and plugin.zero_stage != 0:
        host = f"DeepSpeed ZeRO {plugin.zero_stage}"
    fsdp = args.fsdp_plugin_args if getattr(args, "fsdp", None) else {"fsdp_version": 2}
    if fsdp is None:
        host = "XLA's FSDP"
    elif fsdp.get("fsdp_version") != 2:  # the default of transformers 5.2
        host = 'FSDP1 (fsdp_config={"version": 2} is FSDP2)'
    if host is not None:
        raise ValueError(
            f"TrainingArguments ask for {host}, which flattens the matrices that are to be projected; "
            f"{INSTEAD_OF_FLATTENING}"
        )


def _refuse_layerwise(args: Any) -> None:
    if args.fp16:
        raise ValueError(
            "layerwise=True with fp16=True: weights are updated before the gradient scaler knows whether to skip the "
            "step; set bf16=True instead"
        )
    if args.gradient_accumulation_steps > 1 and args.max_grad_norm:
        raise ValueError(
            f"layerwise=True with gradient_accumulation_steps={args.gradient_accumulation_steps} and max_grad_norm="
            f"{args.max_grad_norm} in TrainingArguments: in an epoch's last step, where it is shorter, the Trainer "
            "would clip gradients that are still held, and LayerwiseOptimizer clips them too; set max_grad_norm=0 "
            f"there, and pass max_grad_norm={args.max_grad_norm} to trainer_optimizer"
        )


# ---------------------------------------------------------------------- groups


def _decaying(model: nn.Module) -> set[str]:
    """The names of the parameters that decay, as the Trainer says."""
    from transformers import Trainer

    return set(Trainer.get_decay_parameter_names(None, model))  # type: ignore[arg-type]  # it makes no use of self


def _by_decay(groups: list[dict[str, Any]], decaying: Collection[str], weight_decay: float) -> list[dict[str, Any]]:
    """Each group as two, of which the second doesn't decay; empty ones are left out."""
    split = []
    for group in groups:
        for decays in (True, False):
            params = [(name, param) for name, param in group["params"] if (name in decaying) is decays]
            if params:
                split.append({**group, "params": params, "weight_decay": weight_decay if decays else 0.0})
    return split


def _refuse_flattened(groups: list[dict[str, Any]]) -> None:
    for group in groups:
        for name, param in group["params"]:
            if "rank" in group and (param.dim() != 2 or param.numel() == 0):
                raise ValueError(
                    f"{name}: expected a matrix to project, got shape {tuple(param.shape)}; leave the layer out of "
                    f"target_modules, or, if what wraps the model has flattened it, {INSTEAD_OF_FLATTENING}"
                )


# ---------------------------------------------------------------------- the callback


class _SubspaceEvents:
    """The events that ``SubspaceCallback`` answers."""

    def __init__(self) -> None:
        self._state_bytes: int | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Counts the bytes of the optimizer's state. Raises TypeError if it is none of ours."""
        self._state_bytes = _unwrapped(kwargs.get("optimizer")).state_bytes()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """Adds the summary to the logs of a training step."""
        if logs is None or "loss" not in logs:
            return
        summary = subspace_summary(_unwrapped(kwargs.get("optimizer")))
        if self._state_bytes is not None:
            summary["optimizer_state_bytes"], self._state_bytes = self._state_bytes, None
        logs.update(summary)
        state.log_history[-1].update(summary)


def subspace_summary(optimizer: Any) -> dict[str, float]:
    """Numbers for a log, of ``optimizer.subspace_report()`` and ``optimizer.skipped_steps()``.

    Returns:
        ``subspace_refreshes``, of all matrices together; where there was one, ``subspace_rank`` and
        ``subspace_captured``, means over the matrices; after the second ``subspace_overlap``, the mean of those that
        have one; ``skipped_steps``, those of all parameters, if there are any.
    """
    entries = list(optimizer.subspace_report().values())
    summary: dict[str, float] = {"subspace_refreshes": sum(entry["refreshes"] for entry in entries)}
    for key in ("rank", "captured", "overlap"):
        values = [float(entry[key]) for entry in entries if entry[key] is not None]
        if values:
            summary[f"subspace_{key}"] = statistics.fmean(values)
    skipped = sum(optimizer.skipped_steps().values())
    return {**summary, "skipped_steps": skipped} if skipped else summary


def _unwrapped(optimizer: Any) -> Any:
    """The optimizer in accelerate's wrapper."""
    inner = optimizer if hasattr(optimizer, "subspace_report") else getattr(optimizer, "optimizer", None)
    if not hasattr(inner, "subspace_report"):
        raise TypeError(
            f"SubspaceCallback: expected an optimizer with a subspace_report, got {type(inner or optimizer).__name__}; "
            "pass the Trainer optimizer_cls_and_kwargs=trainer_optimizer(args, ...)"
        )
    return inner


@cache
def _callback_class() -> type:
    from transformers import TrainerCallback

    text = """Logs a summary of the optimizer's subspaces with every training loss: see ``subspace_summary``.

    The first log also has ``optimizer_state_bytes``. The Trainer calls the integrations that ``report_to`` names before
    the callbacks that it is given; for them to see the summary as well, put this one first:
    ``trainer.callback_handler.callbacks.insert(0, SubspaceCallback())``.
    """
    return type("SubspaceCallback", (_SubspaceEvents, TrainerCallback), {"__doc__": text, "__module__": __name__})


def __getattr__(name: str) -> Any:
    """``SubspaceCallback``, a class of which Transformers has the base: made when it is first asked for."""
    if name == "SubspaceCallback":
        return _callback_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
