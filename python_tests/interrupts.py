"""Ctrl-C while a function runs."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from typing import Any

import pytest


@contextlib.contextmanager
def interrupted(where: Any, name: str, monkeypatch: pytest.MonkeyPatch, *, after: bool = True) -> Iterator[None]:
    """``where.name`` is interrupted while it runs, so that it ends first; or, not ``after``, before it has begun."""
    original = getattr(where, name)

    def run(*args: Any, **kwargs: Any) -> None:
        if after:
            original(*args, **kwargs)
        signal.raise_signal(signal.SIGINT)

    # A background job of a shell starts with the signal ignored.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(where, name, run)
            yield
    finally:
        signal.signal(signal.SIGINT, handler)
