"""Which documents a corpus has, in a fixed order, and which of them validate."""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

from .config import PretrainError

__all__ = ["VALIDATION_SHARE", "documents", "is_validation"]

VALIDATION_SHARE = 0.05

# Not part of every Python (distributions package them apart, or leave them out), installed beside the library, or
# not text that someone wrote (the build's own variables): they would make the corpus differ by machine.
_STDLIB_LEFT_OUT = frozenset(
    ("test", "tests", "idle_test", "idlelib", "tkinter", "turtledemo", "lib2to3", "distutils", "ensurepip",
     "site-packages", "dist-packages", "__pycache__")
)  # fmt: skip
_STDLIB_GENERATED = ("_sysconfigdata", "_sysconfig_vars")


def documents(text: Iterable[str]) -> Iterator[tuple[str, bytes]]:
    """Yield (name, content) of the files of a corpus.

    ``text`` names files and folders; of a folder, every file that is valid UTF-8 counts, hidden ones excepted. With
    no names: the Python standard library's modules.

    Raises:
        PretrainError: a name that is neither a file nor a folder.
    """
    paths = list(text)
    if not paths:
        yield from _standard_library()
    for given in paths:
        path = Path(given)
        if path.is_file():
            yield path.name, path.read_bytes()
        elif path.is_dir():
            for file in sorted(path.rglob("*")):
                relative = file.relative_to(path)
                if file.is_file() and not any(part.startswith(".") for part in relative.parts):
                    content = file.read_bytes()
                    if _is_text(content):
                        yield relative.as_posix(), content
        else:
            raise PretrainError(f"--text {given}: there is no such file or folder")


def is_validation(name: str) -> bool:
    """Whether a document validates, decided by its name alone: adding files moves no other file across."""
    draw = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
    return draw < VALIDATION_SHARE * 2**64


def _standard_library() -> Iterator[tuple[str, bytes]]:
    root = Path(sysconfig.get_path("stdlib"))
    for file in sorted(root.rglob("*.py")):
        relative = file.relative_to(root)
        if _STDLIB_LEFT_OUT.isdisjoint(relative.parts) and not file.name.startswith(_STDLIB_GENERATED):
            yield relative.as_posix(), file.read_bytes()


def _is_text(content: bytes) -> bool:
    try:
        content.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return b"\0" not in content
