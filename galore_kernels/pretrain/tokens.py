"""Bytes or a tokenizer's ids."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .config import PretrainError
from .presets import PRESETS

__all__ = ["Tokenization"]


@dataclass(frozen=True)
class Tokenization:
    """How text becomes token ids. Without a tokenizer, a token is a byte, and byte 0 ends a document."""

    tokenizer: Any
    end: int
    dtype: type[np.unsignedinteger[Any]]
    name: str | None

    @classmethod
    def load(cls, name: str | None) -> Tokenization:
        """Bytes for ``None``, else the tokenizer that transformers knows by this name (a local folder included)."""
        if name is None:
            return cls(None, 0, np.uint8, None)
        from transformers import AutoTokenizer  # heavy, and not needed for bytes

        try:
            tokenizer = AutoTokenizer.from_pretrained(name)
        except Exception as error:  # transformers raises many kinds, none of which says what to do
            raise PretrainError(
                f"--tokenizer {name}: transformers could not load it ({error}); give the name of a tokenizer on the "
                "hub, a folder written by save_pretrained, or leave the option out to train on bytes"
            ) from error
        end = tokenizer.eos_token_id
        if end is None:
            raise PretrainError(
                f"--tokenizer {name}: it has no end-of-text token to put between documents; set its eos_token and "
                "save it with save_pretrained"
            )
        dtype = np.uint16 if len(tokenizer) <= 2**16 else np.uint32
        return cls(tokenizer, int(end), dtype, name)

    def vocabulary(self, preset: str) -> int:
        """Rows of the embedding: 256 for bytes; with a tokenizer, its size, but no less than the preset's."""
        if self.tokenizer is None:
            return 256
        return max(len(self.tokenizer), PRESETS[preset].vocabulary)

    def encode(self, content: bytes) -> npt.NDArray[Any]:
        """Token ids of one document, with the token that ends it."""
        if self.tokenizer is None:
            return np.frombuffer(content + b"\0", dtype=np.uint8)
        text = content.decode("utf-8", errors="replace")
        ids = self.tokenizer.encode(text, add_special_tokens=False, verbose=False)
        return np.asarray([*ids, self.end], dtype=self.dtype)
