"""A row's tensors made on the device, for matrix sets of which there is room for one."""

from __future__ import annotations

import torch
from floor import orient
from problem import Case, Problem
from torch import Tensor


class SharedProblem(Problem):
    """A problem whose implementations share the weights too: 7B's fit once beside the rivals' states, not ten times.

    Numbers come from the device's generator; the gradients are normal, and so are the weights when ``weights()`` is
    called. ``lowrank_grads`` is empty.
    """

    def __init__(self, case: Case, device: torch.device) -> None:
        self.case, self.device = case, device
        self.operation, self.rank = case.operation, case.rank
        self._weights = [torch.empty(shape, dtype=case.dtype, device=device) for shape in case.shapes]
        rng = torch.Generator(device).manual_seed(2)
        self.grads = [torch.empty_like(weight).normal_(0, 1e-2, generator=rng) for weight in self._weights]
        self.bases = [] if case.rank is None else self._make_bases(case.rank, rng)
        self.lowrank_grads = []

    def _make_bases(self, rank: int, rng: torch.Generator) -> list[Tensor]:
        # One decomposition for each size; permuting its rows keeps the columns orthonormal, and every matrix has a
        # basis of its own memory.
        made: dict[int, Tensor] = {}
        bases = []
        for shape in self.case.shapes:
            short = orient(shape)[1]
            if short not in made:
                normal = torch.randn(short, rank, generator=rng, device=self.device)
                made[short] = torch.linalg.qr(normal)[0].to(self.case.dtype)
            bases.append(made[short][torch.randperm(short, generator=rng, device=self.device)].contiguous())
        return bases

    def weights(self) -> list[Tensor]:
        """The weights, set back: each implementation is checked from the same start, then all are timed on the same."""
        rng = torch.Generator(self.device).manual_seed(1)
        for weight in self._weights:
            weight.normal_(0, 0.02, generator=rng)
        return list(self._weights)
