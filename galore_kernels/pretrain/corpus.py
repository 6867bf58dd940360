"""Text to windows of tokens, and which window comes when.

Nothing here has state. The windows of step s are a function of (corpus, seed, s), so a resumed run continues with
the windows it would have seen.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from .config import Config, PretrainError
from .documents import VALIDATION_SHARE, documents, is_validation
from .streaming import streamed_tokens
from .tokens import Tokenization

__all__ = ["Corpus", "load_corpus"]


@dataclass
class Corpus:
    """Tokens cut into windows.

    Attributes:
        tokens: 1-D array of token ids (memory-mapped for streamed data sets).
        train: index of the first token of each training window, int64.
        validation: the same of the ``val_windows`` windows that every run on this corpus validates on.
        sequence: tokens in a window.
        vocabulary: number of token ids.
        sha256: fingerprint of tokens and split; a run resumes only on the corpus it began with.
        description: where the text came from, for people.
    """

    tokens: npt.NDArray[Any]
    train: npt.NDArray[np.int64]
    validation: npt.NDArray[np.int64]
    sequence: int
    vocabulary: int
    sha256: str
    description: str
    _order: tuple[int, int, npt.NDArray[np.int64]] | None = field(default=None, init=False, repr=False)

    def facts(self) -> dict[str, Any]:
        """What identifies the corpus and its split, as plain values."""
        return {
            "sha256": self.sha256,
            "vocabulary": self.vocabulary,
            "training_windows": len(self.train),
            "validation_windows": len(self.validation),
        }

    def rows(self, starts: npt.NDArray[np.int64]) -> torch.Tensor:
        """Windows as an int64 tensor (len(starts), sequence)."""
        picked = self.tokens[starts[:, None] + np.arange(self.sequence, dtype=np.int64)]
        return torch.from_numpy(picked.astype(np.int64))

    def training_rows(self, step: int, count: int, seed: int) -> torch.Tensor:
        """The ``count`` windows of step ``step``: every window once per epoch, in an order drawn from the seed."""
        serial = np.arange(step * count, (step + 1) * count, dtype=np.int64)
        epochs, places = np.divmod(serial, len(self.train))
        starts = np.empty(count, dtype=np.int64)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            starts[here] = self.train[self._epoch_order(seed, int(epoch))[places[here]]]
        return self.rows(starts)

    def _epoch_order(self, seed: int, epoch: int) -> npt.NDArray[np.int64]:
        if self._order is None or self._order[:2] != (seed, epoch):
            self._order = (seed, epoch, _permutation(len(self.train), seed, epoch))
        return self._order[2]


def load_corpus(config: Config, cache: Path) -> Corpus:
    """Read the configured text (``cache`` is the folder where streamed data sets are kept as tokens).

    Raises:
        PretrainError: no text, too little of it, a missing package, or a tokenizer that cannot be loaded.
    """
    tokenization = Tokenization.load(config.tokenizer)
    if config.dataset is not None:
        tokens, boundary = streamed_tokens(config, tokenization, cache)
        description = f"dataset {config.dataset}"
    else:
        found = list(documents(config.text))
        tokens, boundary = _tokenized(found, tokenization)
        source = ", ".join(config.text) if config.text else "the Python standard library"
        description = f"{len(found)} files of {source}"
    length = config.sequence
    if config.split == "file":
        train = _window_starts(0, boundary, length)
        validation = _window_starts(boundary, len(tokens), length)
    else:
        starts = _window_starts(0, len(tokens), length)
        shuffled = starts[_permutation(len(starts), seed=0, epoch=0)]
        cut = round(len(starts) * VALIDATION_SHARE)
        validation, train = np.sort(shuffled[:cut]), np.sort(shuffled[cut:])
    if len(train) == 0 or len(validation) == 0:
        raise PretrainError(
            f"{description}: {len(train)} training and {len(validation)} validation windows of {length} tokens; "
            "expected at least one of each: give more text, a shorter --sequence, or --split window"
        )
    # The same windows for every seed and optimizer, spread over the validation text, so that runs compare pairwise.
    picked = _permutation(len(validation), seed=0, epoch=1)[: config.val_windows]
    fingerprint = hashlib.sha256(np.ascontiguousarray(tokens).view(np.uint8).data)
    fingerprint.update(f"{boundary} {config.split} {tokens.dtype}".encode())
    return Corpus(tokens, train, validation[picked], length, tokenization.vocabulary(config.preset),
                  fingerprint.hexdigest(), description)  # fmt: skip


def _window_starts(begin: int, end: int, length: int) -> npt.NDArray[np.int64]:
    return np.arange(begin, end - length + 1, length, dtype=np.int64)


def _tokenized(found: Iterable[tuple[str, bytes]], tokenization: Tokenization) -> tuple[npt.NDArray[Any], int]:
    """All tokens, those of training documents first, and how many those are."""
    parts: tuple[list[npt.NDArray[Any]], list[npt.NDArray[Any]]] = ([], [])
    for name, content in found:
        parts[is_validation(name)].append(tokenization.encode(content))
    boundary = sum(len(part) for part in parts[False])
    return np.concatenate([np.zeros(0, tokenization.dtype), *parts[False], *parts[True]]), boundary


def _permutation(count: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    # Sorting raw words of a counter-based generator: numpy keeps those the same for ever, its shuffles it may change.
    words = np.random.Philox(key=seed, counter=[0, 0, 0, epoch]).random_raw(count)
    return np.argsort(words, kind="stable")
