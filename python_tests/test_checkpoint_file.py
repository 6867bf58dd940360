"""galore_kernels.checkpoint: what is saved comes back, what has changed is refused, what fails leaves the old file."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import pickle
import random
import resource
import signal
import stat
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from galore_kernels import checkpoint
from galore_kernels.checkpoint import CheckpointError

FOOTER_BYTES = 56


def small_state(value: float = 1.0) -> dict[str, Any]:
    return {"step": 7, "weight": torch.full((3, 5), value), "codes": torch.arange(9, dtype=torch.uint8)}


def assert_same(left: Any, right: Any) -> None:
    assert type(left) is type(right)
    if isinstance(left, dict):
        assert list(left) == list(right)
        for key in left:
            assert_same(left[key], right[key])
    elif isinstance(left, (list, tuple)):
        assert len(left) == len(right)
        for one, other in zip(left, right, strict=True):
            assert_same(one, other)
    elif isinstance(left, torch.Tensor):
        assert left.dtype == right.dtype
        assert left.stride() == right.stride()
        assert torch.equal(left, right)
    else:
        assert left == right


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_everything_that_a_state_may_hold_comes_back(tmp_path: Path) -> None:
    shared = torch.arange(6.0)
    state = {
        "dtypes": [torch.ones(3, dtype=dtype) for dtype in
                   (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool,
                    torch.complex64)],
        "shapes": (torch.tensor(2.5), torch.zeros(0), torch.zeros(0, 4), torch.ones(1, 1, 1, 1)),
        "transposed": torch.arange(6).reshape(2, 3).t(),
        "strided": torch.arange(12)[1::3],
        "plain": {"none": None, "int": 2**70, "float": float("inf"), "text": "ü", "flag": True, 3: [(), {}]},
        "views": [shared[:3], shared[3:]],
    }  # fmt: skip
    path = tmp_path / "state.pt"
    checkpoint.save(state, path)
    assert_same(state, checkpoint.load(path))
    views = checkpoint.load(path)["views"]
    assert views[0].untyped_storage().data_ptr() == views[1].untyped_storage().data_ptr()


def test_an_optimizer_and_a_module_come_back(tmp_path: Path) -> None:
    module = torch.nn.Linear(4, 3)
    optimizer = torch.optim.AdamW(module.parameters())
    module(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    state = {"module": module.state_dict(), "optimizer": optimizer.state_dict()}
    checkpoint.save(state, tmp_path / "state.pt")
    loaded = checkpoint.load(tmp_path / "state.pt")
    assert_same(dict(state["module"]), dict(loaded["module"]))
    assert_same(state["optimizer"], loaded["optimizer"])


def test_plain_torch_can_read_the_file(tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    checkpoint.save(small_state(), path)
    assert_same(small_state(), torch.load(path, weights_only=True))
    assert_same(small_state(), torch.load(path, weights_only=True, mmap=True))


def test_map_location_is_passed_on(tmp_path: Path) -> None:
    checkpoint.save(small_state(), tmp_path / "state.pt")
    assert checkpoint.load(tmp_path / "state.pt", map_location="meta")["weight"].is_meta
    with pytest.raises(CheckpointError, match=r"(?s)intact.*map_location='cpu'"):
        checkpoint.load(tmp_path / "state.pt", map_location="no-such-device")


def test_every_flipped_bit_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    checkpoint.save(small_state(), path)
    content = path.read_bytes()
    with open(path, "r+b", buffering=0) as file:
        for place, byte in enumerate(content):
            for bit in range(8):
                os.pwrite(file.fileno(), bytes([byte ^ (1 << bit)]), place)
                with pytest.raises(CheckpointError):
                    checkpoint.load(path)
            os.pwrite(file.fileno(), bytes([byte]), place)
    assert_same(small_state(), checkpoint.load(path))


def test_flipped_bits_of_a_large_file_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    checkpoint.save({"weight": torch.randn(800_000)}, path)
    size = path.stat().st_size
    mebibyte = 2**20
    places = [0, size // 2, size - 1]  # first, middle, last
    places += [
        block * mebibyte + offset for block in (1, 2, 3) for offset in (-1, 0)
    ]  # around the blocks that are read
    places += [size - FOOTER_BYTES - 1, size - FOOTER_BYTES]  # around the start of the footer
    places += random.Random(0).sample(range(size), 40)
    with open(path, "r+b", buffering=0) as file:
        for place in places:
            byte = os.pread(file.fileno(), 1, place)[0]
            os.pwrite(file.fileno(), bytes([byte ^ 4]), place)
            with pytest.raises(CheckpointError, match=str(path)):
                checkpoint.load(path)
            os.pwrite(file.fileno(), bytes([byte]), place)
    checkpoint.load(path)


def test_truncations_are_refused(tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole.pt", tmp_path / "cut.pt"
    checkpoint.save(small_state(), whole)
    content = whole.read_bytes()
    end = len(content) - FOOTER_BYTES
    for length in sorted({*range(0, len(content), 7), *range(end - 80, len(content))}):  # zip's end record, the footer
        cut.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match=r"cut\.pt"):
            checkpoint.load(cut)
    cut.write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match="truncated; restore a copy"):
        checkpoint.load(cut)


@pytest.mark.parametrize("addition", [b"\0", b"x" * FOOTER_BYTES, None], ids=["a byte", "a footer's length", "itself"])
def test_appended_bytes_are_refused(tmp_path: Path, addition: bytes | None) -> None:
    path = tmp_path / "state.pt"
    checkpoint.save(small_state(), path)
    content = path.read_bytes()
    path.write_bytes(content + (addition if addition is not None else content))
    with pytest.raises(CheckpointError):
        checkpoint.load(path)


def test_bytes_cut_from_the_middle_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    checkpoint.save(small_state(), path)
    content = path.read_bytes()
    path.write_bytes(content[:100] + content[164:])
    with pytest.raises(CheckpointError, match=f"footer says {len(content) - FOOTER_BYTES} bytes, the file holds"):
        checkpoint.load(path)


@pytest.mark.parametrize(
    "content",
    [b"", b"hello", b"\x89PNG" + bytes(500), pickle.dumps({"weight": [1.0] * 50}), bytes(FOOTER_BYTES)],
    ids=["empty", "short text", "picture", "pickle", "zeros of a footer's length"],
)
def test_foreign_files_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "foreign.pt"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"foreign\.pt.*expected a checkpoint.*pass the path of a checkpoint"):
        checkpoint.load(path)


def test_a_file_of_plain_torch_save_is_refused_with_the_way_out(tmp_path: Path) -> None:
    path = tmp_path / "plain.pt"
    torch.save(small_state(), path)
    with pytest.raises(CheckpointError, match=r"without the checksum.*torch\.load\(path, weights_only=True\)"):
        checkpoint.load(path)
    checkpoint.save(torch.load(path, weights_only=True), path)  # what the error says to do
    assert_same(small_state(), checkpoint.load(path))


def test_a_payload_that_executes_code_is_refused_though_its_checksum_is_right(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "exploded"),)

    path = tmp_path / "bomb.pt"
    with open(path, "wb") as file:  # what someone could build who knows the format
        checkpoint._write({"bomb": Bomb()}, file, str(path))
    with pytest.raises(CheckpointError, match="intact"):
        checkpoint.load(path)
    assert not (tmp_path / "exploded").exists()


def test_a_missing_file_is_reported_as_such(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        checkpoint.load(tmp_path / "none.pt")


def test_a_path_that_cannot_be_a_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist; create it first"):
        checkpoint.save(small_state(), tmp_path / "no" / "state.pt")
    with pytest.raises(CheckpointError, match="it is a folder"):
        checkpoint.save(small_state(), tmp_path)
    assert names(tmp_path) == []


class NotPlain:
    pass


@pytest.mark.parametrize(
    "thing",
    [NotPlain(), torch.nn.Linear(2, 2), Path("x"), len, lambda: None, threading.Lock()],
    ids=["class", "module", "path", "builtin", "lambda", "lock"],
)
def test_what_could_not_be_loaded_is_refused_at_the_save(tmp_path: Path, thing: Any) -> None:
    path = tmp_path / "state.pt"
    checkpoint.save(small_state(), path)
    with pytest.raises(CheckpointError, match=r"(?s)state\.pt.*unchanged"):
        checkpoint.save(small_state(2.0) | {"thing": thing}, path)
    assert_same(small_state(), checkpoint.load(path))
    assert names(tmp_path) == ["state.pt"]


@contextlib.contextmanager
def largest_file(limit: int) -> Iterator[None]:
    """Make the kernel refuse to let any file grow beyond ``limit`` bytes, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, previous)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.5, 0.9, 0.999, 1.0])
def test_a_full_disk_leaves_the_old_checkpoint(tmp_path: Path, share: float) -> None:
    path = tmp_path / "state.pt"
    old, new = {"weight": torch.zeros(50_000)}, {"weight": torch.ones(50_000)}
    checkpoint.save(old, path)
    limit = int((path.stat().st_size - 1) * share)  # 1.0: all but the last byte of the footer
    with largest_file(limit), pytest.raises(CheckpointError, match=r"state\.pt.*File too large.*unchanged"):
        checkpoint.save(new, path)
    assert_same(old, checkpoint.load(path))
    assert names(tmp_path) == ["state.pt"]
    checkpoint.save(new, path)
    assert_same(new, checkpoint.load(path))


@pytest.mark.parametrize("call", ["fsync", "replace", "ftruncate", "open"])
def test_a_failing_system_call_leaves_the_old_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    path = tmp_path / "state.pt"
    checkpoint.save(small_state(), path)

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(CheckpointError, match="Input/output error"):
            checkpoint.save(small_state(2.0), path)
    assert_same(small_state(), checkpoint.load(path))
    checkpoint.save(small_state(3.0), path)
    assert names(tmp_path) == ["state.pt"]


def test_the_file_is_on_the_disk_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace

    def recorded_fsync(descriptor: int) -> None:
        calls.append("fsync folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "fsync file")
        fsync(descriptor)

    def recorded_replace(source: str, target: str) -> None:
        calls.append("replace")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(os, "replace", recorded_replace)
    checkpoint.save(small_state(), tmp_path / "state.pt")
    assert calls == ["fsync file", "replace", "fsync folder"]


def test_an_interrupt_in_the_middle_of_a_save_leaves_the_old_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "state.pt"
    checkpoint.save(small_state(), path)
    write = checkpoint._HashingWriter.write

    def interrupted(self: checkpoint._HashingWriter, data: bytes | memoryview) -> int:
        if self.length > 300:
            self.failure = KeyboardInterrupt()
            raise self.failure
        return write(self, data)

    monkeypatch.setattr(checkpoint._HashingWriter, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(small_state(2.0), path)
    assert_same(small_state(), checkpoint.load(path))
    assert names(tmp_path) == ["state.pt"]


def counted_state(count: int) -> dict[str, Any]:
    return {"count": count, "weights": [torch.full((60_000,), float(count)) for _ in range(4)]}


def start_child_that_saves(path: Path, first: int) -> int:
    with warnings.catch_warnings():  # Python 3.12 warns of forking beside torch's idle threads; the child uses none
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child:
        return child
    try:
        for count in range(first, first + 10**6):
            checkpoint.save(counted_state(count), path)
    finally:
        os._exit(1)


def test_kill_9_during_saves_always_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    checkpoint.save(counted_state(0), path)
    draw = random.Random(0)
    latest = 0
    for _ in range(60):
        child = start_child_that_saves(path, latest + 1)
        time.sleep(draw.uniform(0.0, 0.03))  # a save takes some milliseconds
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status), "the child failed by itself"
        state = checkpoint.load(path)
        assert state["count"] >= latest, "an older checkpoint came back"
        latest = state["count"]
        assert_same(counted_state(latest), state)
        assert set(names(tmp_path)) <= {"state.pt", ".state.pt.tmp"}
    assert latest > 0, "no child got as far as one save: the test shows nothing"
    checkpoint.save(small_state(), path)
    assert names(tmp_path) == ["state.pt"]


def test_a_temporary_file_left_by_a_kill_is_reused(tmp_path: Path) -> None:
    (tmp_path / ".state.pt.tmp").write_bytes(b"left over" * 10_000)  # longer than the new file
    checkpoint.save(small_state(), tmp_path / "state.pt")
    assert_same(small_state(), checkpoint.load(tmp_path / "state.pt"))
    assert names(tmp_path) == ["state.pt"]


def test_a_second_saver_of_the_same_path_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    checkpoint.save(small_state(), path)
    with open(tmp_path / ".state.pt.tmp", "wb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(CheckpointError, match=r"another process or thread is saving.*one rank"):
            checkpoint.save(small_state(2.0), path)
    assert_same(small_state(), checkpoint.load(path))


def test_a_saver_that_finishes_in_between_is_not_overwritten_in_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Between opening the temporary file and locking it, another saver completes it and gives it its name. Truncating
    # what was opened would then destroy the checkpoint.
    path, temporary = tmp_path / "state.pt", tmp_path / ".state.pt.tmp"
    checkpoint.save(small_state(1.0), path)
    content = path.read_bytes()
    flock = fcntl.flock
    calls: list[int] = []

    def late_flock(descriptor: int, operation: int) -> None:
        if not calls:
            os.pwrite(descriptor, content, 0)
            os.rename(temporary, path)
        calls.append(operation)
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", late_flock)
    checkpoint.save(small_state(2.0), path)
    assert len(calls) == 2, "the file that was locked had another name by then: open it again"
    assert_same(small_state(2.0), checkpoint.load(path))


def test_threads_that_save_to_one_path_leave_a_whole_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    unexpected: list[BaseException] = []
    saved = [0] * 4

    def save_once(number: int) -> None:
        try:
            checkpoint.save(counted_state(number), path)
            saved[number] += 1
        except CheckpointError as error:
            if "another process or thread" not in str(error):
                unexpected.append(error)
        except BaseException as error:
            unexpected.append(error)

    def save_often(number: int) -> None:
        for _ in range(40):
            save_once(number)

    threads = [threading.Thread(target=save_often, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        if path.exists():
            state = checkpoint.load(path)
            assert_same(counted_state(state["count"]), state)
    for thread in threads:
        thread.join()
    assert unexpected == []
    assert sum(saved) > 0
    assert names(tmp_path) == ["state.pt"]


def test_a_file_system_without_locks_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    checkpoint.save(small_state(), tmp_path / "state.pt")
    assert_same(small_state(), checkpoint.load(tmp_path / "state.pt"))


def test_a_symbolic_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    link = tmp_path / "latest.pt"
    link.symlink_to(tmp_path / "real" / "state.pt")
    checkpoint.save(small_state(), link)
    assert link.is_symlink()
    assert_same(small_state(), checkpoint.load(tmp_path / "real" / "state.pt"))


def test_the_file_is_readable_as_the_umask_says(tmp_path: Path) -> None:
    previous = os.umask(0o027)
    try:
        checkpoint.save(small_state(), tmp_path / "state.pt")
    finally:
        os.umask(previous)
    assert stat.S_IMODE((tmp_path / "state.pt").stat().st_mode) == 0o640


def test_a_save_holds_no_second_copy_of_the_tensors(tmp_path: Path) -> None:
    megabytes = 120
    program = f"""
import resource, torch
from galore_kernels import checkpoint
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
checkpoint.save({{"warm": torch.ones(10)}}, "state.pt")
state = {{"weight": torch.ones({megabytes} * 250_000)}}
before = peak()
checkpoint.save(state, "state.pt")
print(peak() - before)
"""
    result = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert float(result.stdout) < 0.25 * megabytes, f"{result.stdout.strip()} MB more"
