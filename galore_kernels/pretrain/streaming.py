"""A data set of the Hugging Face hub, streamed once into a file of tokens.

The stream itself cannot be positioned at a step; a file can. It also makes every corpus the same kind of thing: an
array of tokens. Its size is bounded by ``--dataset-tokens``.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .config import Config, PretrainError
from .documents import VALIDATION_SHARE, is_validation
from .tokens import Tokenization

__all__ = ["streamed_tokens"]


def streamed_tokens(config: Config, tokenization: Tokenization, cache: Path) -> tuple[npt.NDArray[Any], int]:
    """Tokens of ``config.dataset`` ("NAME" or "NAME:CONFIGURATION"), memory-mapped, and how many of them train.

    Documents of its ``train`` split are taken in order until there are ``config.dataset_tokens`` training tokens and
    a twentieth as many for validation; a document validates by the hash of its number. A second run finds the file
    in ``cache``.

    Raises:
        PretrainError: ``datasets`` is missing, or the data set cannot be opened, is empty or has no such column.
    """
    key = json.dumps([config.dataset, config.dataset_column, config.dataset_tokens, config.tokenizer])
    stem = f"dataset-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    tokens, facts = cache / f"{stem}.tokens", cache / f"{stem}.json"
    if not facts.exists():
        cache.mkdir(parents=True, exist_ok=True)
        boundary = _write(tokens, _texts(config), config.dataset_tokens, tokenization)
        _replace(facts, json.dumps({"training_tokens": boundary, "of": json.loads(key)}).encode())
    boundary = int(json.loads(facts.read_text())["training_tokens"])
    return np.memmap(tokens, dtype=tokenization.dtype, mode="r"), boundary


def _texts(config: Config) -> Iterator[str]:
    try:
        import datasets
    except ImportError as error:
        raise PretrainError("--dataset needs the package datasets, which is missing: pip install datasets") from error
    name, _, configuration = str(config.dataset).partition(":")
    try:
        stream = datasets.load_dataset(name, configuration or None, split="train", streaming=True)
    except Exception as error:  # datasets raises many kinds
        raise PretrainError(
            f"--dataset {config.dataset}: {error}\nexpected NAME or NAME:CONFIGURATION of a data set with a train split"
        ) from error
    column = config.dataset_column
    for row in stream:
        if not isinstance(row.get(column), str):
            columns = ", ".join(sorted(row))
            raise PretrainError(f"--dataset-column {column}: expected a column of text; {name} has {columns}")
        yield row[column]


def _write(path: Path, texts: Iterable[str], wanted: int, tokenization: Tokenization) -> int:
    temporary = path.with_name(path.name + ".tmp")
    held_out: list[npt.NDArray[Any]] = []  # in memory until the training tokens are out
    held_out_limit = int(wanted * VALIDATION_SHARE) + 1
    held_out_tokens = written = 0
    with open(temporary, "wb") as file:
        for number, text in enumerate(texts):
            ids = tokenization.encode(text.encode("utf-8", errors="replace"))
            if is_validation(str(number)):
                held_out.append(ids[: held_out_limit - held_out_tokens])
                held_out_tokens += len(held_out[-1])
            else:
                ids = ids[: wanted - written]
                file.write(ids.tobytes())
                written += len(ids)
            if written >= wanted and held_out_tokens >= held_out_limit:
                break
        for ids in held_out:
            file.write(ids.tobytes())
        file.flush()
        os.fsync(file.fileno())
    if written + held_out_tokens == 0:
        temporary.unlink()
        raise PretrainError("--dataset: the stream ended without any text")
    os.replace(temporary, path)
    return written


def _replace(path: Path, content: bytes) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)
