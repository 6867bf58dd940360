"""Quantized bases: one scale for each column, which the update operations multiply in between their two products.

A column of P is ``codes * scale``. Whole numbers up to 127 are exact in bfloat16, so that a product with the codes
loses nothing, and the scales fold into the low-rank tensors: G @ P = (G @ codes) * scale and
U @ P.T = (U * scale) @ codes.T.

- "int8": codes int8 (S, r), from -127 to 127.
- "int4": codes from -7 to 7, two to a byte: uint8 (S, ceil(r / 2)). Column 2j is the low half of byte j, column 2j + 1
  the high half, both in two's complement; the high half of an odd rank's last byte is 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

BASIS_FORMATS: tuple[str, ...] = ("int8", "int4")
"""The formats of a quantized basis."""

BASIS_CODE_DTYPES = {"int8": torch.int8, "int4": torch.uint8}
"""The dtype that tells the format of a basis' codes."""

_LARGEST = {"int8": 127, "int4": 7}

# Parts of a column's largest magnitude at which codes end: of a Gaussian column four bits lose least at about 0.6.
_CLIPS = {"int8": (1.0,), "int4": (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)}


def basis_code_shape(short: int, rank: int, basis_format: str) -> tuple[int, int]:
    """Shape of the codes of an (S, r) basis."""
    return short, rank if basis_format == "int8" else -(-rank // 2)


def quantize_basis(basis: Tensor, basis_format: str) -> tuple[Tensor, Tensor]:
    """Codes and scales of a basis; the scale is the one of least squares, a zero column's is 0.

    Args:
        basis: (S, r) float32. basis_format: "int8" or "int4".

    Returns:
        Codes as the module's docstring has them, contiguous; scale (r,) float32.
    """
    largest = _LARGEST[basis_format]
    absmax = basis.abs().amax(dim=0)
    best_error = torch.full_like(absmax, torch.inf)
    codes, scale = torch.zeros_like(basis), torch.zeros_like(absmax)
    for clip in _CLIPS[basis_format]:
        step = absmax * (clip / largest)
        tried = (basis / torch.where(step > 0, step, 1.0)).round_().clamp_(-largest, largest)
        squares = tried.square().sum(dim=0)
        fitted = (basis * tried).sum(dim=0) / torch.where(squares > 0, squares, 1.0)
        error = (basis - tried * fitted).square().sum(dim=0)
        better = error < best_error
        codes, scale = torch.where(better, tried, codes), torch.where(better, fitted, scale)
        best_error = torch.where(better, error, best_error)
    whole = codes.to(torch.int8).contiguous()
    return (whole if basis_format == "int8" else _packed(whole)), scale


def _packed(codes: Tensor) -> Tensor:
    if codes.shape[1] % 2:
        codes = torch.nn.functional.pad(codes, (0, 1))
    halves = codes.view(torch.uint8) & 0xF
    return halves[:, 0::2] | halves[:, 1::2] << 4


def basis_codes(codes: Tensor, rank: int) -> Tensor:
    """(S, r) float32 whole numbers of a basis' codes in either format."""
    if codes.dtype == torch.int8:
        return codes.float()
    halves = torch.stack([codes & 0xF, codes >> 4], dim=2).flatten(1)[:, :rank].to(torch.int8)
    return torch.where(halves > 7, halves - 16, halves).float()


def dequantize_basis(codes: Tensor, scale: Tensor) -> Tensor:
    """(S, r) float32 basis of ``quantize_basis``'s result."""
    return basis_codes(codes, scale.shape[0]) * scale
