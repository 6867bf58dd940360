"""Products with a basis, in whichever format it is kept."""

from __future__ import annotations

import torch
from torch import Tensor

from galore_kernels.quantizers import basis_codes, dequantize_basis


def project_rows(rows: Tensor, basis: Tensor, basis_scale: Tensor | None) -> Tensor:
    """(T, r): ``rows`` (T, S) times the basis, in their dtype.

    Args:
        basis: (S, r), or with ``basis_scale`` (r,) the codes of ``galore_kernels.quantizers.quantize_basis``.
    """
    if basis_scale is None:
        return rows @ basis.to(rows.dtype)
    if rows.dtype == torch.float16:  # in which sums with codes, of up to 127, might overflow
        return rows @ dequantize_basis(basis, basis_scale).to(rows.dtype)
    return (rows @ basis_codes(basis, len(basis_scale)).to(rows.dtype)) * basis_scale.to(rows.dtype)
