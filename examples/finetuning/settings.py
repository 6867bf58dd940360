"""The sizes of everything, and the methods that are compared."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["FULL", "METHODS", "QUICK", "Method", "Settings"]


@dataclass(frozen=True)
class Settings:
    """Sizes; the defaults are those of the committed results.

    Attributes:
        packages: classes.
        snippets: at most so many of each class for training, validation, test.
        snippet_characters: of a snippet, rounded up to whole lines.
        tokens: of a row; longer snippets are cut.
        pretrain_files: read at most so many.
        update_proj_gap: steps between refreshes of GaLore's subspaces.
        save_steps: steps between checkpoints.
    """

    packages: int = 8
    snippets: tuple[int, int, int] = (240, 60, 120)
    snippet_characters: int = 160
    tokens: int = 48
    vocabulary: int = 2048
    hidden: int = 128
    layers: int = 4
    heads: int = 4
    batch: int = 16
    pretrain_files: int = 10_000
    pretrain_steps: int = 3000
    pretrain_lr: float = 2e-3
    epochs: int = 3
    update_proj_gap: int = 50
    save_steps: int = 25

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for fingerprints and results."""
        return asdict(self)


FULL = Settings()
QUICK = Settings(
    packages=2, snippets=(24, 8, 8), tokens=16, vocabulary=300, hidden=32, layers=1, heads=2, batch=8,
    pretrain_files=10, pretrain_steps=6, epochs=3, update_proj_gap=2, save_steps=5,
)  # fmt: skip


@dataclass(frozen=True)
class Method:
    """What is trained, and how.

    Attributes:
        name: of the method's folders and its row in the table.
        kind: "adamw", "galore" (the encoder's matrices projected, the rest at full rank) or "lora" (adapters on the
            same matrices, and the head).
        rank: of GaLore and LoRA.
        frozen_embeddings: leave them as they were pre-trained, as LoRA does.
        from_scratch: begin with random weights.
    """

    name: str
    kind: str
    rank: int = 0
    frozen_embeddings: bool = False
    from_scratch: bool = False


_ALL = (
    Method("adamw-scratch", "adamw", from_scratch=True),
    Method("adamw", "adamw"),
    Method("galore-r4", "galore", 4),
    Method("galore-r8", "galore", 8),
    Method("galore-r4-frozen", "galore", 4, frozen_embeddings=True),
    Method("galore-r8-frozen", "galore", 8, frozen_embeddings=True),
    Method("lora-r4", "lora", 4),
    Method("lora-r8", "lora", 8),
)

METHODS = {method.name: method for method in _ALL}
