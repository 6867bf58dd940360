"""The unfused GaLore step: G @ P, Adam, back-projection, in plain torch calls for torch.compile."""

from __future__ import annotations

import torch
from problem import BETAS, LR, SCALE
from torch import Tensor
from torch.nn.functional import pad

from galore_kernels.quantizers import BLOCK_SIZE, dynamic_map, rounding_thresholds

EPS = 1e-8


class Moment:
    """One moment in 8 bits: codes and absmax by blocks of 256, the last one filled up with zeros."""

    def __init__(self, elements: int, signed: bool, device: torch.device) -> None:
        blocks = -(-elements // BLOCK_SIZE)
        self.values, self.thresholds = dynamic_map(signed).to(device), rounding_thresholds(signed).to(device)
        zero = int((dynamic_map(signed) == 0).nonzero())
        self.codes = torch.full((blocks, BLOCK_SIZE), zero, dtype=torch.uint8, device=device)
        self.absmax = torch.zeros((blocks, 1), device=device)

    def decoded(self) -> Tensor:
        """(blocks, 256) float32."""
        return self.values[self.codes.int()] * self.absmax

    def store(self, moment: Tensor) -> None:
        """Nearest codes."""
        absmax = moment.abs().amax(dim=1, keepdim=True)
        scaled = moment / torch.where(absmax == 0, 1.0, absmax)
        self.codes.copy_(torch.bucketize(scaled, self.thresholds))
        self.absmax.copy_(absmax)


class Chain:
    """One matrix and its state.

    Args:
        eight_bit: moments in 8 bits, else in float32, which saves torch the work of coding.
    """

    def __init__(self, weight: Tensor, grad: Tensor, basis: Tensor, side: str, *, eight_bit: bool) -> None:
        self.weight, self.grad, self.basis, self.right = weight, grad, basis, side == "right"
        self.eight_bit = eight_bit
        device, long = weight.device, weight.shape[0 if self.right else 1]
        self.shape = (long, basis.shape[1])
        self.elements = long * basis.shape[1]
        self.steps = torch.zeros((), device=device)
        if eight_bit:
            self.first, self.second = (Moment(self.elements, signed, device) for signed in (True, False))
        else:
            self.m, self.v = (torch.zeros(self.shape, device=device) for _ in range(2))

    def factors(self) -> tuple[Tensor, Tensor]:
        """The moments' update; the change of the weight is minus the product of the results."""
        beta1, beta2 = BETAS
        lowrank = ((self.grad if self.right else self.grad.T) @ self.basis).float()
        if self.eight_bit:
            lowrank = pad(lowrank.flatten(), (0, -self.elements % BLOCK_SIZE)).view(-1, BLOCK_SIZE)
            m, v = self.first.decoded(), self.second.decoded()
        else:
            m, v = self.m, self.v
        m = beta1 * m + (1 - beta1) * lowrank
        v = beta2 * v + (1 - beta2) * lowrank * lowrank
        self.steps.add_(1)
        rate = LR * SCALE * torch.sqrt(1 - beta2**self.steps) / (1 - beta1**self.steps)
        direction = rate * m / (v.sqrt() + EPS)
        if self.eight_bit:
            self.first.store(m)
            self.second.store(v)
            direction = direction.flatten()[: self.elements].view(self.shape)
        else:
            self.m.copy_(m)
            self.v.copy_(v)
        direction = direction.to(self.basis.dtype)
        return (direction, self.basis.T) if self.right else (self.basis, direction.T)

    def step(self) -> None:
        """The whole update."""
        a, b = self.factors()
        self.weight.sub_(a @ b)
