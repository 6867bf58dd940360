"""A small model of prepared layers, its twin with dense gradients, and their training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from optimizer_cases import OptimizerClass
from torch import Tensor, nn

from galore_kernels import GaLoreFusedAdamW, galore_param_groups, prepare
from galore_kernels.optim.base import LowRankOptimizer

RANK = 16
VOCABULARY, WIDTH, HIDDEN = 32, 40, 260

TARGETS = ["mlp"]


class Model(nn.Module):
    """A language model whose next token is that of a table: 260 x 16 moments are 8-bit, those of 40 x 16 float32."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.mlp_up = nn.Linear(WIDTH, HIDDEN)  # right side
        self.mlp_down = nn.Linear(HIDDEN, WIDTH, bias=False)  # left side
        self.mlp_square = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        x = x + self.mlp_down(nn.functional.silu(self.mlp_up(x)))
        return self.head(x + torch.tanh(self.mlp_square(x)))


Batch = tuple[Tensor, Tensor]


def batch(step: int, micro: int = 0, tokens: int = 48) -> Batch:
    """Tokens and the next ones; in the first step those of all micro-batches are the same."""
    rng = torch.Generator().manual_seed(100 * step + (micro if step else 0))
    inputs = torch.randint(0, VOCABULARY, (2, tokens // 2), generator=rng)
    return inputs, (inputs * 7 + 3) % VOCABULARY


def loss_of(model: nn.Module, data: Batch) -> Tensor:
    return nn.functional.cross_entropy(model(data[0]).flatten(0, 1).float(), data[1].flatten())


@dataclass
class Run:
    """A model and its optimizer, prepared or not.

    ``options``: of the projected group; ``before_step`` is called in place of nothing, with the run.
    """

    factored: bool
    optimizer_class: OptimizerClass = GaLoreFusedAdamW
    backend: str = "auto"
    dtype: torch.dtype = torch.float32
    lr: float = 1e-2
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        self.model: nn.Module = Model().to(self.dtype)
        if self.factored:
            prepare(self.model, TARGETS, RANK, proj_type=self.options.get("proj_type", "std"))
        self.optimizer = self.new_optimizer()
        self.steps = 0

    def new_optimizer(self) -> LowRankOptimizer:
        # The lag that factored gradients have.
        options = {"update_proj_gap": 10, **self.options} | ({} if self.factored else {"async_refresh": True})
        groups = galore_param_groups(self.model, TARGETS, rank=RANK, **options)
        return self.optimizer_class(groups, lr=self.lr, backend=self.backend)

    def backward(self, micro_batches: int = 1) -> float:
        total = 0.0
        for micro in range(micro_batches):
            loss = loss_of(self.model, batch(self.steps, micro)) / micro_batches
            loss.backward()
            total += loss.item()
        return total

    def train(
        self, steps: int, micro_batches: int = 1, before_step: Callable[[Run], None] | None = None
    ) -> list[float]:
        """The losses of as many steps more."""
        losses = []
        for _ in range(steps):
            losses.append(self.backward(micro_batches))
            if before_step is not None:
                before_step(self)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.steps += 1
        return losses

    def weights(self) -> dict[str, Tensor]:
        return {name: value.detach().clone() for name, value in self.model.state_dict().items()}


def largest_difference(one: list[float], other: list[float]) -> float:
    assert len(one) == len(other)
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


def carriers(model: nn.Module) -> dict[str, Tensor]:
    """The parameters whose gradients are low-rank."""
    return {name: param for name, param in model.named_parameters() if name.endswith("lowrank")}
