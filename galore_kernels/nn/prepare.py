"""``prepare`` and ``unprepare``: a model's linear layers with factored gradients, and back."""

from __future__ import annotations

from typing import TypeVar, cast

import torch
from torch import nn

from galore_kernels.nn.carried_gradient import DenseGradient, hollow
from galore_kernels.nn.factored_linear import FactoredLinear, Int8Linear
from galore_kernels.nn.flattened import check_unflattened
from galore_kernels.nn.lowrank_gradient import LowRankGradient
from galore_kernels.nn.targets import TargetModules, nothing_matches, target_linears
from galore_kernels.ops.projection import long_short
from galore_kernels.subspace import projection_side

Model = TypeVar("Model", bound=nn.Module)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def prepare(
    model: Model,
    target_modules: TargetModules = ("attn", "mlp"),
    rank: int | None = 128,
    *,
    proj_type: str = "std",
    weights: str | None = None,
) -> Model:
    """Gives a model's linear layers factored gradients, of which none of size (m, n) ever exists; or int8 weights.

    The gradient of a linear layer's weight is G = dY.T @ X. Projected it is R = dY.T @ (X @ P), which takes
    T r (m + n) multiplications instead of T m n, and (L, r) numbers instead of m n. A prepared layer's backward pass
    computes R, as the gradient of a small parameter of the layer, ``lowrank``; on the right side its forward pass keeps
    X @ P (T, r) for that instead of X (not within ``torch.compile``, which decides itself what to keep). Accumulation,
    clipping (by R's norm), GradScaler and DDP work on R as on any gradient. The weight itself does not require a
    gradient, and is updated by the optimizer, which finds it through the small parameter.

        model = prepare(model, target_modules=["attn", "mlp"], rank=128)
        optimizer = GaLoreFusedAdam8bit(galore_param_groups(model, ["attn", "mlp"]), lr=1e-2)

    The first basis of a layer is found in its first backward pass, from dY and X, and used at once. Where a refresh is
    due, the layer keeps dY and X of the step's backward passes; the optimizer's step finds the next basis in them,
    which is used from the next step on (as with ``async_refresh=True`` without factored gradients). No (m, n) gradient
    is formed then either, but where the decomposition is exact (``refresh_method="svd"``, and ranks of about half of
    min(m, n)) and there are more tokens than min(m, n): then one layer's at a time. The factors of all micro-batches
    are kept: with many of them, ``refresh_schedule="staggered"`` keeps those of a few layers at a time.
    ``torch.autograd.grad`` is a backward pass too.

    With ``weights="int8"`` the layers keep their weights in int8, a scale for each group of 256 (after Q-GaLore, Zhang
    et al., arXiv 2407.08296): a byte for each element instead of two or four, and no copy of higher precision anywhere.
    The optimizer updates the codes, rounding stochastically; the forward and the backward pass dequantize one layer's
    at a time. See ``galore_kernels.nn.Int8Linear`` for their ``state_dict``, ``plain_state_dict`` for a plain model's.

    With ``weights="int8"`` and ``rank=None`` the layers have int8 weights and gradients of full size, (m, n), as the
    gradients of a small-memory parameter, ``dense``: for APOLLO's optimizers, which scale the whole gradient, or for
    GaLore's to project as they do without ``prepare``. ``LayerwiseOptimizer`` keeps one such gradient at a time. The
    optimizer's group says rank and ``proj_type``; all else is as for parameters that are not prepared.

        model = prepare(model, target_modules=["attn", "mlp"], rank=None, weights="int8")
        optimizer = LayerwiseOptimizer(APOLLOFusedAdam8bit(galore_param_groups(model, rank=256), lr=1e-2))

    Where ``torch.distributed`` has several processes, they find each basis together, in the mean of their gradients,
    as DDP's averaging of R asks for: each has to use all prepared layers in its first backward pass, in one order.
    Its exchange is that of one gradient of full size for each refresh of a layer, for the gradient's norm.

    Layers are changed in place: hooks, names, ``state_dict`` keys and shapes stay. Layers that share a weight share its
    gradient; layers whose weight does not require a gradient are left alone.

    Args:
        model: whose ``nn.Linear`` layers are looked through.
        target_modules: as of ``galore_param_groups``.
        rank: r >= 1, at most min(m, n) of each layer (larger ones are clamped); None, with int8 weights, for gradients
            of full size.
        proj_type: "std" projects the smaller dimension, "reverse_std" the larger, "left" rows, "right" columns.
        weights: None keeps them as they are; "int8".

    Returns:
        ``model``.

    Raises:
        ValueError: nothing matches; an argument out of range; a layer that can't be prepared: one of another class
            than ``nn.Linear`` (PEFT wraps such), one that is prepared already, one whose weight is also another
            module's. Names the layer; nothing has changed.
    """
    if rank is None and weights is None:
        raise ValueError(
            'rank=None with weights=None: expected weights="int8", for plain layers have full gradients as they are; '
            "pass that, or a rank"
        )
    if rank is None and proj_type != "std":
        raise ValueError(
            f"proj_type={proj_type!r} with rank=None: nothing is projected here; give it to the optimizer's groups"
        )
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise ValueError(f"rank={rank!r}: expected an integer >= 1; 128 is GaLore's default")
    if proj_type == "full":
        raise ValueError('proj_type="full": expected one side for factored gradients; choose "std", "left" or "right"')
    if weights not in (None, "int8"):
        raise ValueError(f'weights={weights!r}: expected None or "int8"; None keeps the weights as they are')
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise ValueError(
            "model: expected one that DDP does not wrap yet, for it has counted the gradients; prepare first"
        )
    _refuse_wrappers(model)
    targets = target_linears(model, target_modules)
    layers = {name: layer for name, layer in targets.items() if layer.weight.requires_grad}
    for name, layer in targets.items():
        _check(name, layer)
    if not layers:
        raise nothing_matches(model, target_modules)
    _refuse_shared(model, layers)
    sides = {name: projection_side(proj_type, *layer.weight.shape) for name, layer in layers.items()}
    prepared: dict[int, FactoredLinear] = {}
    for name, layer in layers.items():
        weight = layer.weight
        layer.__class__ = FactoredLinear if weights is None else Int8Linear
        factored = cast(FactoredLinear, layer)
        first = prepared.setdefault(id(weight), factored)
        if first is not factored:
            factored.gradient = first.gradient
            setattr(factored, first.gradient.name, first.carrier)
            if isinstance(first, Int8Linear):
                del layer.weight
                factored.weight_codes, factored.weight_scale = first.weight_codes, first.weight_scale
            continue
        if isinstance(factored, Int8Linear):
            del factored.weight
            factored.quantize(weight.detach())
        else:
            weight.requires_grad_(False)
            weight.grad = None
        if rank is None:
            cast(Int8Linear, factored).dense = nn.Parameter(hollow(weight, weight.shape))
            factored.gradient = DenseGradient(factored)
        else:
            side, own_rank = sides[name], min(rank, *weight.shape)
            long, _ = long_short(tuple(weight.shape), side)
            factored.lowrank = nn.Parameter(torch.zeros((long, own_rank), dtype=weight.dtype, device=weight.device))
            factored.gradient = LowRankGradient(factored, side, own_rank)
    return model


def unprepare(model: Model) -> Model:
    """Undoes ``prepare``: all factored layers are plain ``nn.Linear`` layers again, with the weights as they now are.

    Returns:
        ``model``.
    """
    weights: dict[int, nn.Parameter] = {}
    for layer in [module for module in model.modules() if isinstance(module, FactoredLinear)]:
        key = id(layer.gradient)
        if key not in weights:
            own = nn.Parameter(layer.weight) if isinstance(layer, Int8Linear) else layer.weight
            weights[key] = cast(nn.Parameter, own)
            weights[key].requires_grad_(True)
        layer.gradient.unbind()
        delattr(layer, layer.gradient.name)
        if isinstance(layer, Int8Linear):
            del layer.weight_codes, layer.weight_scale
        del layer.gradient
        layer.__class__ = nn.Linear  # type: ignore[assignment]
        layer.weight = weights[key]
    return model


def _check(name: str, layer: nn.Linear) -> None:
    if isinstance(layer, FactoredLinear):
        raise ValueError(f"{name}: it is prepared already; unprepare the model first, or name other target_modules")
    if not layer.weight.requires_grad:
        return
    if "forward" in layer.__dict__:
        raise ValueError(
            f"{name}: its forward method was replaced, as Accelerate's hooks for offloading and device maps do, and "
            "would still be the plain layer's; prepare the model before that, or leave the layer out"
        )
    if type(layer) is not nn.Linear:
        raise ValueError(
            f"{name}: expected a torch.nn.Linear, got {type(layer).__name__}, whose forward pass may be another; "
            "leave it out of target_modules"
        )
    if type(layer.weight) is not nn.Parameter:
        raise ValueError(
            f"{name}: expected its weight to be a plain torch.nn.Parameter, got {type(layer.weight).__name__}: it is "
            "computed from others (weight_norm, pruning) or sharded; prepare the model before, or leave the layer out"
        )
    if layer.weight.dtype not in DTYPES:
        raise ValueError(
            f"{name}: expected a float32, bfloat16 or float16 weight, got {layer.weight.dtype}; convert it"
        )
    if layer.weight.numel() == 0:
        raise ValueError(f"{name}: its weight is empty; leave it out of target_modules")


def _refuse_wrappers(model: nn.Module) -> None:
    for name, param in model.named_parameters():
        check_unflattened(param, name)
    for name, module in model.named_modules():
        if isinstance(getattr(module, "base_layer", None), nn.Module):
            raise ValueError(
                f"{name}: {type(module).__name__} wraps a layer (base_layer), as PEFT's adapters do, whose weight is "
                "trained through the wrapper; merge the adapters and unload them, or train without factored gradients"
            )


def _refuse_shared(model: nn.Module, layers: dict[str, nn.Linear]) -> None:
    """Raises ValueError if a weight is used by a module that isn't prepared, whose gradient would be lost."""
    weights = {id(layer.weight): name for name, layer in layers.items()}
    mine = {id(layer) for layer in layers.values()}
    for other_name, module in model.named_modules():
        for param in module.parameters(recurse=False):
            if id(param) in weights and id(module) not in mine:
                raise ValueError(
                    f"{weights[id(param)]}: its weight is also {other_name}'s ({type(module).__name__}), which has a "
                    "gradient of full size; leave it out of target_modules"
                )
