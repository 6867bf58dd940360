"""``quantize_blockwise`` and ``dequantize_blockwise``. Contract: ``galore_kernels.ops.quantize_blockwise``."""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from triton import language as tl

from galore_kernels.backends.triton import configuration
from galore_kernels.backends.triton.adam import tile_offsets
from galore_kernels.backends.triton.code_tables import code_tables
from galore_kernels.backends.triton.codes import block_absmax, decode, encode
from galore_kernels.backends.triton.elements import BLOCK, multiple, to_float
from galore_kernels.backends.triton.launch import launch
from galore_kernels.quantizers import block_count


@triton.jit(do_not_specialize=["elements"])
def quantize_blockwise_kernel(
    x: tl.tensor,
    codes: tl.tensor,
    absmax: tl.tensor,
    maps: tl.tensor,
    first_codes: tl.tensor,
    elements: tl.int64,
    SIGNED: tl.constexpr,
    MULTIPLE: tl.constexpr,
    BLOCKS: tl.constexpr,
) -> None:
    elements = multiple(elements, MULTIPLE)
    blocks, offsets = tile_offsets(tl.program_id(0), BLOCKS)
    there = offsets < elements
    values = to_float(tl.load(x + offsets, there, other=0.0))
    largest = block_absmax(values)
    tl.store(codes + offsets, encode(values, largest, maps, first_codes, SIGNED), there)
    tl.store(absmax + blocks, largest, blocks * BLOCK < elements)


@triton.jit(do_not_specialize=["elements"])
def dequantize_blockwise_kernel(
    codes: tl.tensor,
    absmax: tl.tensor,
    maps: tl.tensor,
    values: tl.tensor,
    elements: tl.int64,
    SIGNED: tl.constexpr,
    MULTIPLE: tl.constexpr,
    BLOCKS: tl.constexpr,
) -> None:
    elements = multiple(elements, MULTIPLE)
    blocks, offsets = tile_offsets(tl.program_id(0), BLOCKS)
    there = offsets < elements
    scale = tl.load(absmax + blocks, blocks * BLOCK < elements, other=0.0)
    decoded = decode(tl.load(codes + offsets, there, other=0), scale[:, None], maps, SIGNED)
    tl.store(values + offsets, decoded, there)


def _known_factor(*tensors: Tensor) -> int:
    aligned = all(tensor.data_ptr() % 16 == 0 for tensor in tensors)
    return configuration.known_factor(tensors[0].numel(), aligned)


def quantize_into(x: Tensor, codes: Tensor, absmax: Tensor, *, signed: bool) -> None:
    """codes, absmax = the 8-bit code of ``x``."""
    tile = configuration.element_tile("quantize_blockwise", x.numel())
    launch(
        quantize_blockwise_kernel,
        -(-block_count(x.numel()) // tile.blocks),
        x.device,
        x,
        codes,
        absmax,
        *code_tables(x.device),
        x.numel(),
        SIGNED=signed,
        MULTIPLE=_known_factor(x, codes),
        BLOCKS=tile.blocks,
        warps=tile.warps,
    )


def quantize_blockwise(x: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    codes = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
    absmax = torch.empty(block_count(x.numel()), dtype=torch.float32, device=x.device)
    quantize_into(x, codes, absmax, signed=signed)
    return codes, absmax


def dequantize_blockwise(codes: Tensor, absmax: Tensor, signed: bool) -> Tensor:
    values = torch.empty(codes.shape, dtype=torch.float32, device=codes.device)
    tile = configuration.element_tile("dequantize_blockwise", codes.numel())
    launch(
        dequantize_blockwise_kernel,
        -(-block_count(codes.numel()) // tile.blocks),
        codes.device,
        codes,
        absmax,
        code_tables(codes.device)[0],
        values,
        codes.numel(),
        SIGNED=signed,
        MULTIPLE=_known_factor(codes, values),
        BLOCKS=tile.blocks,
        warps=tile.warps,
    )
    return values
