"""The tensors of a step as they come and go, and the most that live together."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

__all__ = ["PARTS", "Timeline"]

#: What bytes are counted as. Gradients of activations, and weights that are dequantized for a moment, are activations.
PARTS = ("weights", "gradients", "moments", "basis", "activations", "logits", "update workspace", "refresh workspace")


@dataclass
class Timeline:
    """Tensors by name while a step is walked through; remembers the moment at which they were most.

    Attributes:
        moment: what happens now; set it before making what belongs to it.
        peak: the most bytes that lived together. peak_moment: when. peak_parts: their bytes by part.
        peak_tensors: their bytes by name.
    """

    moment: str = ""
    peak: int = 0
    peak_moment: str = ""
    peak_parts: dict[str, int] = field(default_factory=dict)
    peak_tensors: dict[str, int] = field(default_factory=dict)
    _live: dict[str, tuple[str, int]] = field(default_factory=dict)
    _kept: dict[str, tuple[str, str]] = field(default_factory=dict)
    _total: int = 0

    def make(self, name: str, part: str, size: int) -> None:
        """A tensor of ``size`` bytes comes to life. One that is alive under this name grows."""
        before = self._live.get(name, (part, 0))[1]
        self._live[name] = (part, before + size)
        self._total += size
        if self._total > self.peak:
            self.peak, self.peak_moment = self._total, self.moment
            self.peak_parts = dict.fromkeys(PARTS, 0)
            for of, count in self._live.values():
                self.peak_parts[of] += count
            self.peak_tensors = {tensor: count for tensor, (_, count) in self._live.items()}

    def free(self, *names: str) -> None:
        """Tensors that are needed no more. Names that are not alive count as freed: modes leave tensors out."""
        for name in names:
            size = self._live.pop(name, ("", 0))[1]
            self._total -= size
            if name in self._kept:
                self.make(*self._kept.pop(name), size)

    def keep(self, name: str, under: str, part: str) -> None:
        """When the tensor is freed it goes on living, as part of what lives under another name."""
        self._kept[name] = (under, part)

    def shrink(self, name: str, size: int) -> None:
        """``size`` bytes of the tensors under one name are needed no more."""
        part, before = self._live[name]
        self._live[name] = (part, before - size)
        self._total -= size

    def lives(self, name: str) -> bool:
        """Whether a tensor of this name does."""
        return name in self._live

    def rename(self, old: str, new: str) -> None:
        """A tensor goes on under another name, in place of one that is not alive."""
        self._live[new] = self._live.pop(old)

    @contextmanager
    def during(self, name: str, part: str, size: int) -> Iterator[None]:
        """A tensor that lives within the block alone."""
        self.make(name, part, size)
        yield
        self.free(name)

    @property
    def total(self) -> int:
        """Bytes now."""
        return self._total
