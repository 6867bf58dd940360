"""Matrices of known singular values, and how much of one a basis captures."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Spectrum = Callable[[int, int], Tensor]


def index(size: int) -> Tensor:
    """1 to ``size``, in float64."""
    return torch.arange(1, size + 1, dtype=torch.float64)


DECAYING: dict[str, Spectrum] = {
    "geometric": lambda size, rank: 0.9 ** index(size),  # below fp32's eps within the matrix
    "1/i": lambda size, rank: 1 / index(size),
    "1/i^2": lambda size, rank: index(size) ** -2,  # the last columns are near 16-bit rounding noise
    "1/sqrt(i)": lambda size, rank: index(size) ** -0.5,  # the slowest that must still reach 0.99
    "rank r/3": lambda size, rank: (index(size) <= rank // 3).double(),  # fewer directions than columns
    "rank r": lambda size, rank: (index(size) <= rank).double(),  # exactly as many
    "rank r+8": lambda size, rank: 0.99 ** index(size) * (index(size) <= rank + 8),  # exactly the sketch
    "step 10:1": lambda size, rank: torch.where(index(size) <= rank, 10.0, 1.0).double(),
}
NOISE_LIKE: dict[str, Spectrum | None] = {
    "0.99^i": lambda size, rank: 0.99 ** index(size),  # falls by a quarter over the basis
    "step 1.1:1": lambda size, rank: torch.where(index(size) <= rank, 1.1, 1.0).double(),  # hardest: no gap to find
    "Gaussian noise": None,
}


def _orthonormal(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    return torch.linalg.qr(torch.randn(rows, columns, generator=generator, dtype=torch.float64)).Q


def matrix_of_spectrum(sigma: Tensor, rows: int, columns: int, seed: int) -> Tensor:
    """A float64 (rows, columns) matrix with these singular values and random singular vectors."""
    generator = torch.Generator().manual_seed(seed)
    size = sigma.numel()
    return (_orthonormal(rows, size, generator) * sigma) @ _orthonormal(columns, size, generator).T


def gradient(name: str, rows: int, columns: int, rank: int, seed: int) -> Tensor:
    """A float64 matrix of one of these spectra, which may depend on the rank that is asked of it."""
    spectrum = DECAYING[name] if name in DECAYING else NOISE_LIKE[name]
    if spectrum is None:
        return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return matrix_of_spectrum(spectrum(min(rows, columns), rank), rows, columns, seed)


def energy_share(grad: Tensor, basis: Tensor) -> float:
    """|G @ P|_F^2 over the exact top-r energy, in float64."""
    exact = torch.linalg.svdvals(grad.double())[: basis.shape[1]].square().sum()
    return ((grad.double() @ basis.double()).square().sum() / exact).item()
