"""The native CPU backend: threaded, vectorised C++ (``csrc/cpu``), reached through addresses and sizes.

An update is one call, for one tensor or for many of one shape, and is done or not done when an interrupt arrives.
"""

from __future__ import annotations

import torch
from torch import Tensor

from galore_kernels import _native
from galore_kernels.backends.cpu.arguments import address, typed, workspace_bytes
from galore_kernels.backends.cpu.updates import Group, Single, bf16_magnitudes
from galore_kernels.backends.reference.rotate_moments import rotate_moments as rotate_both_sides
from galore_kernels.ops.adam import AdamState
from galore_kernels.ops.group import ADAFACTOR_OPERATIONS, ADAM_OPERATIONS
from galore_kernels.ops.random_basis import RandomBasis
from galore_kernels.ops.registry import Backend, register
from galore_kernels.quantizers import block_count

__all__ = ["workspace_bytes"]


def quantize_blockwise(x: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    codes = torch.empty(x.shape, dtype=torch.uint8)
    absmax = torch.empty(block_count(x.numel()), dtype=torch.float32)
    _native.quantize_blockwise(*typed(x), x.numel(), signed, address(codes), address(absmax), torch.get_num_threads())
    return codes, absmax


def dequantize_blockwise(codes: Tensor, absmax: Tensor, signed: bool) -> Tensor:
    values = torch.empty(codes.shape, dtype=torch.float32)
    _native.dequantize_blockwise(
        address(codes), address(absmax), codes.numel(), signed, address(values), torch.get_num_threads()
    )
    return values


def random_basis(short: int, basis: RandomBasis, device: torch.device) -> Tensor:
    drawn = torch.empty((short, basis.rank), dtype=torch.bfloat16)
    table, threads = bf16_magnitudes(basis.family), torch.get_num_threads()
    _native.random_basis(basis.seed, short, basis.rank, address(table), address(drawn), threads)
    return drawn


def _moments(state: AdamState) -> tuple[int, int, int, int]:
    return (
        address(state.exp_avg),
        address(state.exp_avg_sq),
        address(state.exp_avg_absmax),
        address(state.exp_avg_sq_absmax),
    )


def rotate_moments(
    source: AdamState, target: AdamState, rotation: Tensor, long_rotation: Tensor | None, beta1: float, beta2: float
) -> None:
    if long_rotation is not None:  # both sides projected: r x r moments, once in a refresh
        rotate_both_sides(source, target, rotation, long_rotation, beta1, beta2)
        return
    threads = torch.get_num_threads()
    rank, new_rank = rotation.shape
    workspace = torch.empty(_native.rotate_workspace_bytes(rank, new_rank, threads), dtype=torch.uint8)
    _native.rotate_moments(
        source.exp_avg.shape[0],
        address(rotation),
        rank,
        new_rank,
        *_moments(source),
        *_moments(target),
        beta1=beta1,
        beta2=beta2,
        step=int(source.step),
        workspace=address(workspace),
        threads=threads,
    )


def _refuses(device: torch.device) -> str | None:
    return None if device.type == "cpu" else f"it serves cpu tensors only, not {device}"


_single = Single()
register(
    Backend(
        name="cpu",
        kernels={
            "quantize_blockwise": quantize_blockwise,
            "dequantize_blockwise": dequantize_blockwise,
            "adam8bit_update": _single.adam8bit_update,
            "galore_update": _single.galore_update,
            "lowrank_update": _single.lowrank_update,
            "rotate_moments": rotate_moments,
            "random_basis": random_basis,
            "apollo_update": _single.apollo_update,
            "adafactor_update": _single.adafactor_update,
            "galore_adafactor_update": _single.galore_adafactor_update,
            "lowrank_adafactor_update": _single.lowrank_adafactor_update,
        },
        refuses=_refuses,
        describe=_native.build_info,
        group=Group,
        grouped=ADAM_OPERATIONS | ADAFACTOR_OPERATIONS,
        group_is_one_call=True,
    )
)
