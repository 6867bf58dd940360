"""int8 weights: one scale for each group of 256 consecutive elements of a row.

A weight is ``codes * scale``, codes from -127 to 127. An update rounds stochastically, as Q-GaLore's does (Zhang et
al., arXiv 2407.08296), for its steps are small parts of a code's. Q-GaLore finds the scales anew in every step: then
every weight is rounded in every step, moved or not, and those roundings add up. Here a group keeps its scale as long
as its codes fit and use half of their range, so that a weight that is not moved keeps its code.
"""

from __future__ import annotations

import torch
from torch import Tensor

GROUP_SIZE = 256
"""Elements of a row that share a scale; a row's last group may have fewer."""

LARGEST_CODE = 127

# Elements that are dequantized at a time: on a CPU their float32 products take memory too.
ELEMENTS_AT_ONCE = 2**22

#: A scale is kept while the largest magnitude is from LEAST_CODE to LARGEST_CODE times it.
LEAST_CODE = 64

#: What the largest magnitude becomes under a new scale: then it can grow by 13 % before the next.
NEW_SCALE_CODE = 112


def weight_scale_shape(shape: tuple[int, int]) -> tuple[int, int]:
    """Shape of the scales of an (m, n) weight: (m, ceil(n / 256))."""
    return shape[0], -(-shape[1] // GROUP_SIZE)


def _in_groups(matrix: Tensor) -> Tensor:
    """(m, groups, 256), with zeros behind a row's last element."""
    groups = weight_scale_shape((matrix.shape[0], matrix.shape[1]))[1]
    padded = torch.nn.functional.pad(matrix, (0, groups * GROUP_SIZE - matrix.shape[1]))
    return padded.view(matrix.shape[0], groups, GROUP_SIZE)


def _per_element(scale: Tensor, columns: int) -> Tensor:
    return scale.repeat_interleave(GROUP_SIZE, dim=1)[:, :columns]


def quantize_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales of a weight, rounded to nearest; each group's largest magnitude becomes 127.

    Args:
        weight: (m, n) float32, bfloat16 or float16.

    Returns:
        Codes (m, n) int8; scale (m, ceil(n / 256)) float32, 0 for a group of zeros.
    """
    wide = weight.float()
    scale = _in_groups(wide).abs().amax(dim=2) / LARGEST_CODE
    spread = _per_element(scale, wide.shape[1])
    codes = (wide / torch.where(spread > 0, spread, 1.0)).round_().clamp_(-LARGEST_CODE, LARGEST_CODE)
    return codes.to(torch.int8), scale


def dequantize_weight(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """(m, n) weight of codes (m, n) and scales (m, ceil(n / 256)): float32 products, rounded to ``dtype``."""
    weight = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    rows_at_once = max(1, ELEMENTS_AT_ONCE // max(1, codes.shape[1]))
    for part in range(0, codes.shape[0], rows_at_once):
        rows = slice(part, part + rows_at_once)
        _dequantize(codes[rows], scale[rows], weight[rows])
    return weight


def _dequantize(codes: Tensor, scale: Tensor, weight: Tensor) -> None:
    groups = codes.shape[1] // GROUP_SIZE
    whole = groups * GROUP_SIZE
    if groups:
        spread = scale[:, :groups, None].expand(-1, -1, GROUP_SIZE)
        torch.mul(
            codes[:, :whole].unflatten(1, (groups, GROUP_SIZE)),
            spread,
            out=weight[:, :whole].unflatten(1, (groups, GROUP_SIZE)),
        )
    if whole < codes.shape[1]:
        torch.mul(codes[:, whole:], scale[:, groups:], out=weight[:, whole:])


def requantize_weight(weight: Tensor, scale: Tensor, random16: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales of an updated weight, rounded stochastically.

    With x = weight / scale, the code is floor(x) + 1 with the probability x - floor(x), else floor(x). The probability
    is a number of 65536ths, to nearest even, so that a weight that is a code times the scale keeps that code.

    Args:
        weight: (m, n) float32.
        scale: (m, ceil(n / 256)), that of the codes from which the weight was updated.
        random16: (m, n) integers, uniform on 0 .. 65535.

    Returns:
        Codes (m, n) int8; scale: the old where 64 scale <= absmax <= 127 scale in its group, else absmax / 112.
    """
    absmax = _in_groups(weight).abs().amax(dim=2)
    kept = (absmax <= scale * LARGEST_CODE) & (absmax >= scale * LEAST_CODE)
    new = torch.where(kept, scale, absmax / NEW_SCALE_CODE)
    spread = _per_element(new, weight.shape[1])
    x = torch.where(spread > 0, weight / spread, torch.zeros_like(weight))
    floor = x.floor()
    codes = floor + (random16 < ((x - floor) * 65536).round_())
    return codes.clamp_(-LARGEST_CODE, LARGEST_CODE).to(torch.int8), new
