"""The emulation that executes the CUDA kernels: that it computes what the PTX ISA says, and shows what is wrong."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simt
import torch

SEEDS = range(8)
THREADS = 128
LAUNCH_FAILURE, TOO_LARGE, INVALID_CONFIGURATION, INVALID_VALUE = 719, 720, 9, 1
SOURCE = Path(simt.__file__).parent / "selftest" / "selftest.cpp"


@pytest.fixture(scope="module")
def selftest() -> Any:
    return simt.load_module(simt.build(extra=(SOURCE,), name="_simt_selftest"), "_simt_selftest")


def outcomes(selftest: Any, kernel: str, right: bool) -> set[bool]:
    """Whether the kernel's result is right, over several seeds."""
    found = set()
    for seed in SEEDS:
        selftest.set_seed(seed)
        out = np.zeros(4 * THREADS, np.int32)
        numbers = np.arange(4 * THREADS, dtype=np.int32)
        half_a_block = (np.arange(THREADS, dtype=np.int32) + THREADS // 2) % THREADS
        if kernel == "exchange":
            assert selftest.exchange(out, right) == 0
            found.add(bool((out[:THREADS] == half_a_block).all()))
        elif kernel == "copy":
            assert selftest.copy(numbers, out, right) == 0
            found.add(bool((out == (numbers + 100) % (4 * THREADS)).all()))
        else:
            assert selftest.reuse(-numbers - 1, out, right) == 0
            found.add(bool((out[:THREADS] == half_a_block).all()))
    return found


@pytest.mark.parametrize("kernel", ["exchange", "copy", "reuse"])
def test_a_missing_barrier_or_wait_shows(selftest: Any, kernel: str) -> None:
    assert outcomes(selftest, kernel, right=True) == {True}
    assert False in outcomes(selftest, kernel, right=False)


@pytest.mark.parametrize("mode", [0, 1])
def test_threads_that_part_are_reported(selftest: Any, mode: int, capfd: pytest.CaptureFixture[str]) -> None:
    assert selftest.divergent(mode) == LAUNCH_FAILURE
    assert "simt: block 0, thread" in capfd.readouterr().err


def test_blocks_of_a_cooperative_launch_meet(selftest: Any) -> None:
    for seed in SEEDS:
        selftest.set_seed(seed)
        counter, seen = np.zeros(1, np.uint32), np.zeros(4, np.uint32)
        assert selftest.meet(counter, 4, seen, 4, True) == 0
        assert seen.tolist() == [4, 4, 4, 4]


def test_blocks_that_wait_for_one_that_never_runs_are_reported(
    selftest: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    # An ordinary launch promises nothing about which blocks run at once: here they run one after another.
    assert selftest.meet(np.zeros(1, np.uint32), 2, np.zeros(2, np.uint32), 2, False) == LAUNCH_FAILURE
    assert "nobody makes progress" in capfd.readouterr().err
    assert selftest.meet(np.zeros(1, np.uint32), 5, np.zeros(5, np.uint32), 5, True) == TOO_LARGE


def test_launches_that_a_device_refuses(selftest: Any) -> None:
    assert selftest.launch_empty(0, 32, 128) == INVALID_CONFIGURATION
    assert selftest.launch_empty(1, 2048, 128) == INVALID_CONFIGURATION
    assert selftest.launch_empty(1, 32, 100 * 1024) == INVALID_VALUE
    assert selftest.launch_empty(1, 32, 99 * 1024) == 0  # more than 48 KB, which launch() asks for


@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix(selftest: Any, transposed: bool, capfd: pytest.CaptureFixture[str]) -> None:
    # PTX ISA 9.7.14.5.15: thread i gets row i / 4, elements 2 (i % 4) and the next, of each 8 x 8 matrix.
    matrices = np.arange(4 * 64, dtype=np.uint16).reshape(4, 8, 8)
    out = np.zeros((32, 4, 2), np.uint16)
    words = out.view(np.uint32).reshape(32, 4)
    assert selftest.matrices(matrices, words, transposed, 0) == 0
    expected = matrices.transpose(0, 2, 1) if transposed else matrices
    for thread in range(32):
        for q in range(4):
            row, column = thread // 4, 2 * (thread % 4)
            assert words[thread, q] == int(expected[q, row, column]) | int(expected[q, row, column + 1]) << 16
    assert selftest.matrices(matrices, words, transposed, 4) == LAUNCH_FAILURE  # rows not on 16 bytes
    assert "ldmatrix" in capfd.readouterr().err


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mma(selftest: Any, dtype: torch.dtype) -> None:
    # PTX ISA 9.7.14.5.8: with g = thread / 4, t = thread % 4, element i of a fragment lies at
    #   A: row g + 8 ((i / 2) % 2), column 2 t + i % 2 + 8 (i / 4);  B: row 2 t + i % 2 + 8 (i / 2), column g;
    #   C: row g + 8 (i / 2), column 2 t + i % 2.
    a, b, c = torch.randn(16, 16).to(dtype), torch.randn(16, 8).to(dtype), torch.randn(16, 8)
    fragments_a, fragments_b = torch.zeros(32, 8, dtype=dtype), torch.zeros(32, 4, dtype=dtype)
    fragments_c = np.zeros((32, 4), np.float32)
    for thread in range(32):
        g, t = divmod(thread, 4)
        for i in range(8):
            fragments_a[thread, i] = a[g + 8 * (i // 2 % 2), 2 * t + i % 2 + 8 * (i // 4)]
        for i in range(4):
            fragments_b[thread, i] = b[2 * t + i % 2 + 8 * (i // 2), g]
            fragments_c[thread, i] = c[g + 8 * (i // 2), 2 * t + i % 2]
    words = [x.view(torch.int32).numpy().view(np.uint32).copy() for x in (fragments_a, fragments_b)]
    assert selftest.multiply(*words, fragments_c, dtype == torch.bfloat16) == 0
    expected = (a.double() @ b.double() + c.double()).float()
    for thread in range(32):
        g, t = divmod(thread, 4)
        for i in range(4):
            assert fragments_c[thread, i] == pytest.approx(float(expected[g + 8 * (i // 2), 2 * t + i % 2]), abs=1e-6)


def sanitized(script: str, module: Path) -> subprocess.CompletedProcess[str]:
    """Python with the sanitizers' runtimes in it."""
    runtimes = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    environment = {
        **os.environ,
        "LD_PRELOAD": ":".join(runtimes),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python's own
        "GALORE_KERNELS_SIMT": str(module),
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]),
    }
    return subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=500)


@pytest.mark.slow
def test_an_overrun_of_shared_memory_is_caught() -> None:
    module = simt.build(sanitize=True, extra=(SOURCE,), name="_simt_selftest")
    script = f"""
import simt
from pathlib import Path
selftest = simt.load_module(Path({str(module)!r}), "_simt_selftest")
assert selftest.overrun(128, 0) == 0
print("the kernel inside its memory ran")
selftest.overrun(124, 0)
"""
    done = sanitized(script, module)
    assert "the kernel inside its memory ran" in done.stdout, done.stderr
    assert "heap-buffer-overflow" in done.stderr
    assert "overrun_kernel" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", ["test_cuda_kernels.py", "test_cuda_int8_weight.py", "test_cuda_apollo_update.py"])
def test_the_kernels_run_clean_under_the_sanitizers(name: str) -> None:
    tests = Path(__file__).parent / name
    arguments = ["-q", "-x", "-c", str(simt.ROOT / "pyproject.toml"), "--rootdir", str(simt.ROOT), str(tests)]
    done = sanitized(f"import pytest; raise SystemExit(pytest.main({arguments!r}))", simt.build(sanitize=True))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
