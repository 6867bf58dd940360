"""A small model with layers of every kind that matters to prepared and layerwise training, and its training loop."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

WIDTH, INNER, VOCABULARY = 64, 160, 50

#: Of the projected group. 160 x 32 moments are 8-bit, 64 x 32 float32.
RANK = 32


class Block(nn.Module):
    """A wide and a tall matrix, one with a bias, and a square one."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.mlp_up = nn.Linear(WIDTH, INNER)
        self.mlp_down = nn.Linear(INNER, WIDTH, bias=False)
        self.attn_mix = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(T, WIDTH) to the same."""
        x = x + self.mlp_down(nn.functional.silu(self.mlp_up(self.norm(x))))
        return x + torch.tanh(self.attn_mix(x))


class Model(nn.Module):
    """Predicts a token from the one before it."""

    def __init__(self, blocks: int = 2, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.to(dtype)

    def forward(self, tokens: Tensor) -> Tensor:
        """(..., VOCABULARY) logits of (...) tokens."""
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def batch(step: int, micro: int = 0) -> Tensor:
    """(4, 12) tokens of a step's micro-batch."""
    return torch.randint(VOCABULARY, (4, 12), generator=torch.Generator().manual_seed(1000 * step + micro))


def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
    """Of predicting a fixed permutation of the tokens."""
    order = torch.randperm(VOCABULARY, generator=torch.Generator().manual_seed(7)).to(tokens.device)
    return nn.functional.cross_entropy(model(tokens).flatten(0, 1).float(), order[tokens].flatten())


def backward_passes(model: nn.Module, step: int, accumulate: int = 1) -> Tensor:
    """Runs a step's forward and backward passes; the mean loss."""
    losses = []
    for micro in range(accumulate):
        loss = loss_of(model, batch(step, micro)) / accumulate
        loss.backward()
        losses.append(loss.detach())
    return torch.stack(losses).sum()


def run(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: Iterable[int],
    *,
    accumulate: int = 1,
    before_step: Callable[[], Any] | None = None,
) -> list[float]:
    """Trains in the usual order; the losses."""
    losses = []
    for step in steps:
        losses.append(float(backward_passes(model, step, accumulate)))
        if before_step is not None:
            before_step()
        optimizer.step()
        optimizer.zero_grad()
    return losses
