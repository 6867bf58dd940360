"""A prepared model's weights as a plain model has them."""

from __future__ import annotations

import os

import torch
from torch import nn

from galore_kernels.nn.factored_linear import Int8Linear


def plain_state_dict(model: nn.Module, device: torch.device | str | None = None) -> dict[str, torch.Tensor]:
    """The ``state_dict`` that the model would have unprepared: int8 weights in the dtype that they had before.

    It is made anew at each call, and takes the memory of a plain model on ``device``, where tensors are moved one by
    one; None leaves each where it is.
    """
    modules = model.named_modules(remove_duplicate=False)
    layers = {name: layer for name, layer in modules if isinstance(layer, Int8Linear)}
    moved: dict[object, torch.Tensor] = {}  # those that share their memory go on sharing it
    plain: dict[str, torch.Tensor] = {}
    for key, value in model.state_dict().items():
        name, _, own = key.rpartition(".")
        place: object = (value.data_ptr(), value.shape, value.stride()) if value.numel() else key
        if name not in layers or own not in ("weight_codes", "weight_scale"):
            plain[key] = moved[place] = moved[place] if place in moved else value.to(device=device)
        elif own == "weight_codes":
            weight = moved[place] if place in moved else layers[name].weight.to(device=device)
            plain[f"{name}.weight" if name else "weight"] = moved[place] = weight
    return plain


def save_safetensors(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Writes ``plain_state_dict`` to a safetensors file, which is replaced only once the new one is complete.

    Of tensors that share their memory (tied weights) the first is written, as Transformers does, which ties them again.

    Raises:
        ImportError: the package safetensors is not installed.
    """
    try:
        from safetensors.torch import save_file
    except ImportError as error:
        raise ImportError(
            f"save_safetensors needs the package safetensors ({error}): pip install safetensors"
        ) from error
    tensors: dict[str, torch.Tensor] = {}
    written: set[tuple[int, torch.Size]] = set()
    for key, value in plain_state_dict(model, "cpu").items():
        place = (value.data_ptr(), value.shape)
        if place not in written or value.numel() == 0:
            tensors[key] = value.detach().contiguous()
            written.add(place)
    target = os.path.realpath(os.fspath(path))
    temporary = f"{target}.tmp"
    save_file(tensors, temporary, metadata={"format": "pt"})
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, target)
