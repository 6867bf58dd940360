"""What is planned: a model's shape, an optimizer and the modes of a training step, checked."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Any

import torch

from galore_kernels.plan.errors import PlanError
from galore_kernels.plan.shapes import LlamaShape, Matrix
from galore_kernels.quantizers import BASIS_FORMATS
from galore_kernels.subspace import PROJ_TYPES, REFRESH_SCHEDULES, projection_side

__all__ = ["Settings"]

CHOICES: dict[str, tuple[str, ...]] = {
    "weights": ("fp32", "bf16", "int8"),
    "gradients": ("dense", "factored"),
    "updates": ("whole", "layerwise"),
    "checkpointing": ("none", "layer"),
    "proj_type": tuple(kind for kind in PROJ_TYPES if kind != "full"),
    "refresh_schedule": REFRESH_SCHEDULES,
    "step": ("ordinary", "refresh"),
    "device": ("cuda", "cpu"),
}


@dataclass(frozen=True)
class Settings:
    """One training step of one model on one device.

    Attributes:
        rank: of the projections; counts for optimizers that project.
        weights: format of the projected matrices: "fp32", "bf16" (all parameters have that dtype) or "int8" (codes
            and scales; embedding, head and norms are bfloat16, as is all computation).
        gradients: "dense", or "factored": R, (L, r), instead of the matrices' (m, n).
        updates: "whole" (after backward), or "layerwise": within it, each gradient freed at once.
        checkpointing: of activations: "none", or each "layer" (as Transformers' ``gradient_checkpointing``).
        tokens: batch x sequence. sequence: length of a sequence, or None for one of all tokens.
        basis_format: None (the dtype of computation), "int8" or "int4".
        refresh_schedule: "periodic" refreshes all bases in one step; the others spread them over ``update_proj_gap``.
        step: one that refreshes bases, or an "ordinary" one between.
        device: what the workspaces are of: on a GPU tensors are updated and bases found in groups, on a CPU singly.
    """

    shape: LlamaShape
    rank: int = 128
    weights: str = "bf16"
    gradients: str = "dense"
    updates: str = "whole"
    checkpointing: str = "none"
    tokens: int = 2048
    sequence: int | None = None
    basis_format: str | None = None
    proj_type: str = "std"
    refresh_schedule: str = "periodic"
    update_proj_gap: int = 200
    step: str = "refresh"
    device: str = "cuda"

    def __post_init__(self) -> None:
        for key, choices in CHOICES.items():
            check_choice(key, getattr(self, key), choices)
        if self.basis_format is not None:
            check_choice("basis_format", self.basis_format, BASIS_FORMATS)
        for key in ("rank", "tokens", "update_proj_gap"):
            _check_count(key, getattr(self, key))
        if self.sequence is not None:
            _check_count("sequence", self.sequence)
            if self.tokens % self.sequence:
                raise PlanError(
                    f"tokens={self.tokens}: expected a multiple of sequence ({self.sequence}); "
                    "tokens are batch x sequence"
                )

    @classmethod
    def of(cls, shape: LlamaShape, options: dict[str, Any]) -> Settings:
        """From options by name.

        Raises:
            PlanError: one that there is not, or out of range.
        """
        unknown = sorted(options.keys() - cls.__dataclass_fields__.keys())
        if unknown:
            raise PlanError(f"unknown option(s) {', '.join(unknown)}: expected {', '.join(cls.__dataclass_fields__)}")
        return cls(shape, **options)

    @property
    def dtype(self) -> torch.dtype:
        """In which the model computes, and of its weights that are not int8."""
        return torch.float32 if self.weights == "fp32" else torch.bfloat16

    @property
    def positions(self) -> int:
        """Length of a sequence."""
        return self.sequence or self.tokens

    def side(self, matrix: Matrix) -> str:
        """ "left" or "right"."""
        return projection_side(self.proj_type, matrix.rows, matrix.cols)

    def long_short(self, matrix: Matrix) -> tuple[int, int]:
        """(L, S) of a projected matrix."""
        size = (matrix.rows, matrix.cols)
        return size if self.side(matrix) == "right" else (size[1], size[0])

    def rank_of(self, matrix: Matrix) -> int:
        """The rank is at most the smaller dimension."""
        return min(self.rank, matrix.rows, matrix.cols)

    def lowrank(self, matrix: Matrix) -> int:
        """Elements of R, (L, r)."""
        return self.long_short(matrix)[0] * self.rank_of(matrix)

    def due(self, matrices: int) -> int:
        """How many of so many matrices have their bases refreshed in this step."""
        if self.step == "ordinary":
            return 0
        return matrices if self.refresh_schedule == "periodic" else -(-matrices // self.update_proj_gap)


def check_choice(key: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raises PlanError naming the nearest choice."""
    if value in choices:
        return
    close = difflib.get_close_matches(str(value), choices, n=1)
    remedy = f'did you mean "{close[0]}"?' if close else "choose one of them"
    raise PlanError(f"{key}={value!r}: expected one of {', '.join(choices)}; {remedy}")


def _check_count(key: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise PlanError(f"{key}={value!r}: expected an integer >= 1; pass a positive whole number")
