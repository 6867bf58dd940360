"""Checkpoint files that survive a kill at any moment and say so when their bytes have changed.

A file is what :func:`torch.save` writes (a zip archive) followed by a 56-byte footer::

    magic, 16 bytes | length of the archive, 8 bytes little-endian | SHA-256 of the archive, 32 bytes

Zip readers look for their directory from the end of a file and skip what follows it, so plain
``torch.load(path, weights_only=True)`` still opens these files, unverified, where this package is missing.

The digest is taken from the bytes on their way to the disk: a save holds no second copy of the tensors. Writing
to a temporary file that replaces the old one only when it is complete means that ``path`` always names a whole
checkpoint, the previous or the new one.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import struct
import zipfile
from collections.abc import Callable
from typing import Any, BinaryIO

import torch

__all__ = ["CheckpointError", "fsync_folder", "load", "save"]

_MAGIC = b"galore_kernels/1"
_FOOTER = struct.Struct("<16sQ32s")
_ZIP_START = b"PK\x03\x04"
_READ_BYTES = 1 << 20

# File systems that have no flock (some network mounts) answer with one of these.
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, or its file is not what :func:`save` wrote."""


def save(obj: Any, path: str | os.PathLike[str]) -> None:
    """Write ``obj`` to ``path``, replacing what is there only once the new file is complete and on the disk.

    Args:
        obj: tensors (any dtype, device, stride), numbers, strings, ``None``, and dicts, lists and tuples of them:
            what a weights-only load accepts. State dicts of modules and optimizers of this package qualify.
        path: file to write. A symbolic link is followed. The folder must exist; during the save it also holds
            ``.NAME.tmp``, which the next save of the same path reuses should this one be killed.

    Raises:
        CheckpointError: ``obj`` holds something that could not be loaded again, the disk is full or refuses the
            write, or another process or thread is saving to the same path. ``path`` is then as it was.
    """
    target = os.path.realpath(os.fspath(path))
    folder, name = os.path.split(target)
    if not os.path.isdir(folder):
        raise CheckpointError(f'cannot save "{target}": the folder "{folder}" does not exist; create it first')
    if os.path.isdir(target):
        raise CheckpointError(f'cannot save "{target}": expected the name of a file, it is a folder; add a file name')
    temporary = os.path.join(folder, f".{name}.tmp")
    try:
        file = _open_locked(temporary, target)
    except OSError as error:
        raise _write_failed(target, error) from error
    replaced = False
    try:
        with file:
            try:
                _write(obj, file, target)
                _check_loadable(temporary, target)
                os.replace(temporary, target)
                replaced = True
            finally:
                if not replaced:  # while the lock is still held, so that no other saver's file is removed
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(temporary)
    except OSError as error:
        raise _write_failed(target, error) from error
    fsync_folder(folder)


def load(path: str | os.PathLike[str], *, map_location: Any = None) -> Any:
    """Read back what :func:`save` wrote, after checking every byte of it against the checksum.

    Args:
        path: file written by :func:`save`.
        map_location: as in :func:`torch.load`. The load is always ``weights_only=True``.

    Raises:
        CheckpointError: the file is truncated, changed, or was not written by :func:`save`.
        FileNotFoundError: there is no such file.
    """
    name = os.fspath(path)
    with open(name, "rb") as file:
        _verify(file, name)
        file.seek(0)
        try:
            return torch.load(file, map_location=map_location, weights_only=True)
        except Exception as error:
            raise CheckpointError(
                f'"{name}" is intact (its checksum matches) but could not be loaded: {error}\nThe torch that reads it '
                f"({torch.__version__}) may be older than the one that wrote it, or map_location={map_location!r} may "
                "name a device that is not here: try map_location='cpu'"
            ) from error


class _HashingWriter:
    """What :func:`torch.save` writes to: passes the bytes on, digests them, and remembers what went wrong.

    torch's archive writer answers a failed write with an error about an unexpected file position, which hides the
    cause from the user; ``failure`` keeps it.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.digest = hashlib.sha256()
        self.length = 0
        self.failure: BaseException | None = None

    def write(self, data: bytes | memoryview) -> int:
        try:
            view = memoryview(data)
            self.file.write(view)
            self.digest.update(view)
            self.length += view.nbytes
            return view.nbytes
        except BaseException as error:
            self.failure = error
            raise

    def flush(self) -> None:
        self.file.flush()


def _write(obj: Any, file: BinaryIO, target: str) -> None:
    writer = _HashingWriter(file)
    try:
        torch.save(obj, writer)  # type: ignore[arg-type]  # torch asks only for write and flush
    except Exception as error:
        if writer.failure is not None:
            raise writer.failure from None
        raise CheckpointError(
            f'cannot save "{target}": the object cannot be pickled ({type(error).__name__}: {error}); save tensors, '
            "numbers, strings, and dicts, lists and tuples of them. The file that was there is unchanged"
        ) from error
    file.write(_FOOTER.pack(_MAGIC, writer.length, writer.digest.digest()))
    file.flush()
    os.fsync(file.fileno())


def _check_loadable(temporary: str, target: str) -> None:
    # A mapped load reads the structure and none of the tensors' pages: cheap, and it is the load that will be used.
    try:
        torch.load(temporary, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:
        raise CheckpointError(
            f'cannot save "{target}": a weights-only load would refuse it later: {error}\nSave tensors, numbers, '
            "strings, and dicts, lists and tuples of them instead. The file that was there is unchanged"
        ) from error


def _open_locked(temporary: str, target: str) -> BinaryIO:
    # One fixed name, so that a killed save leaves at most one temporary file, and a lock, so that two savers never
    # share it. The lock belongs to the file, not to the name: after waiting for neither, check that the name still
    # means the file that was locked, else a file that has meanwhile become `target` would be overwritten.
    while True:
        descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise CheckpointError(
                    f'cannot save "{target}": another process or thread is saving to it at this moment; give each '
                    "its own path (in a distributed run, save from one rank)"
                ) from error
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
            if _is_open_file(descriptor, temporary):
                os.ftruncate(descriptor, 0)
                return os.fdopen(descriptor, "wb")
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _is_open_file(descriptor: int, path: str) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(descriptor), os.stat(path, follow_symlinks=False))
    return False


def fsync_folder(folder: str | os.PathLike[str]) -> None:
    """Put the names in ``folder`` on the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_failed(target: str, error: OSError) -> CheckpointError:
    return CheckpointError(
        f'cannot save "{target}": {error.strerror or error}; free space or fix the permissions and save again. '
        "The file that was there is unchanged"
    )


def _verify(file: BinaryIO, name: str) -> None:
    size = os.fstat(file.fileno()).st_size
    length = size - _FOOTER.size
    if length < 0:
        raise _not_a_checkpoint(file, name, size)
    file.seek(length)
    magic, written, expected = _FOOTER.unpack(file.read(_FOOTER.size))
    if magic != _MAGIC:
        raise _not_a_checkpoint(file, name, size)
    if written != length:
        raise CheckpointError(
            f'"{name}" is damaged: its footer says {written} bytes, the file holds {length} before the footer; '
            "restore a copy or load an earlier checkpoint"
        )
    actual = _digest(file, length)
    if actual != expected:
        raise CheckpointError(
            f'"{name}" is damaged: expected SHA-256 {expected.hex()[:16]}..., its bytes have {actual.hex()[:16]}...; '
            "the file changed after it was written: restore a copy or load an earlier checkpoint"
        )


def _digest(file: BinaryIO, length: int) -> bytes:
    digest = hashlib.sha256()
    file.seek(0)
    left = length
    read: Callable[[int], bytes] = file.read
    while left > 0:
        chunk = read(min(_READ_BYTES, left))
        if not chunk:  # the file shrank while it was read: the digest will not match
            break
        digest.update(chunk)
        left -= len(chunk)
    return digest.digest()


def _not_a_checkpoint(file: BinaryIO, name: str, size: int) -> CheckpointError:
    file.seek(0)
    if file.read(len(_ZIP_START)) != _ZIP_START:
        found = f"a file of {size} bytes that is no archive of torch.save"
        remedy = "pass the path of a checkpoint written by galore_kernels.checkpoint.save"
    elif zipfile.is_zipfile(file):
        found = "an archive without the checksum, as plain torch.save writes it (or a damaged footer)"
        remedy = (
            "if you trust it, load it with torch.load(path, weights_only=True) and save it with "
            "galore_kernels.checkpoint.save"
        )
    else:
        found = f"the first {size} bytes of an archive, without its end: the file is truncated"
        remedy = "restore a copy or load an earlier checkpoint"
    return CheckpointError(f'"{name}": expected a checkpoint ending in its checksum, found {found}; {remedy}')
