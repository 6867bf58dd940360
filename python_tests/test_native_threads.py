"""csrc/cpu/thread_pool.cpp, csrc/cpu/dispatch.cpp: threads, forks and instruction sets do not change results."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from native_calls import (
    DTYPE_CODES,
    Scalars,
    adam_update,
    back_project_update,
    dequantize,
    lowrank_adam,
    project,
    quantize,
    random_state,
)
from torch import Tensor

from galore_kernels import _native

# In ascending order; which of them a machine has is asked of the module itself.
INSTRUCTION_SETS = ["generic", "avx2", "avx512", "avx512_bf16"]


def elementwise_results(threads: int) -> list[Tensor]:
    """Everything that must be the same to the bit on every machine."""
    generator = torch.Generator().manual_seed(0)
    results: list[Tensor] = []
    n = 60_003  # several tasks of 64 blocks, and a tail
    for dtype in DTYPE_CODES:
        x = (torch.randn(n, generator=generator) * 1e-2).to(dtype)
        for signed in (True, False):
            codes, absmax = quantize(x, signed=signed, threads=threads)
            results += [codes, absmax, dequantize(codes, absmax, signed=signed, threads=threads)]
        for eight_bit in (True, False):
            state = random_state(n, eight_bit=eight_bit, generator=generator)
            param = torch.randn(n, generator=generator).to(dtype)
            seed = 11 if dtype == torch.bfloat16 else None
            adam_update(param, x, state, Scalars(), rounding_seed=seed, threads=threads)
            results += [param, *state.tensors()]
            lowrank = torch.randn(n, generator=generator)
            lowrank_adam(lowrank, state, Scalars(), threads=threads)
            results += [lowrank, *state.tensors()]
    return results


def product_results(threads: int) -> list[Tensor]:
    """What may differ between instruction sets, which sum in different ways, but not between threads."""
    generator = torch.Generator().manual_seed(1)
    results: list[Tensor] = []
    rows, cols, rank = 430, 1030, 37
    for dtype in DTYPE_CODES:
        grad = torch.randn(rows, cols, generator=generator).to(dtype)
        for side, short in (("right", cols), ("left", rows)):
            basis = (torch.randn(short, rank, generator=generator) / short**0.5).to(dtype)
            lowrank, _ = project(grad, basis, side, threads=threads)
            weight = torch.randn(rows, cols, generator=generator).to(dtype)
            # Independent of the projection's own rounding, so that one tolerance fits each product.
            update = torch.randn(lowrank.shape, generator=generator)
            seed = 11 if dtype == torch.bfloat16 else None
            back_project_update(weight, update, basis, side, Scalars(), rounding_seed=seed, threads=threads)
            results += [lowrank, weight]
    return results


def code_results(threads: int) -> list[Tensor]:
    """int8 weights: the same to the bit everywhere, for these sums are exact. Their rows end within a group."""
    generator = torch.Generator().manual_seed(2)
    results: list[Tensor] = []
    rows, cols, rank = 430, 1030, 37
    for dtype in (torch.float32, torch.bfloat16):
        for side, short, long in (("right", cols, rows), ("left", rows, cols)):
            basis = torch.randint(-8, 9, (short, rank), generator=generator).to(dtype)
            update = torch.randint(-8, 9, (long, rank), generator=generator).float()
            codes = torch.randint(-127, 128, (rows, cols), generator=generator).to(torch.int8)
            scale = 10 ** torch.empty(rows, 5).uniform_(-2, 1, generator=generator)  # kept and renewed ones
            back_project_update(
                codes, update, basis, side, Scalars(), rounding_seed=11, weight_scale=scale, threads=threads
            )
            results += [codes, scale]
    return results


def equal(first: list[Tensor], second: list[Tensor]) -> bool:
    return len(first) == len(second) and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("threads", [2, 3, 8, 1000])  # more than the cores; more than the tasks
def test_results_do_not_depend_on_the_number_of_threads(threads: int) -> None:
    assert equal(elementwise_results(1), elementwise_results(threads))
    assert equal(product_results(1), product_results(threads))
    assert equal(code_results(1), code_results(threads))


def test_concurrent_callers() -> None:
    """Eight Python threads that each ask for three: one gets the pool, none gets another's results."""
    expected = elementwise_results(1), product_results(1)
    barrier = threading.Barrier(8)

    def work() -> bool:
        barrier.wait()
        return all(
            equal(elementwise_results(3), expected[0]) and equal(product_results(3), expected[1]) for _ in range(3)
        )

    with ThreadPoolExecutor(8) as executor:
        assert all(future.result() for future in [executor.submit(work) for _ in range(8)])


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_forked_child_has_threads_of_its_own() -> None:
    """Forked after the pool has started: the child's copy of it has no threads, and must not wait for them."""
    expected = product_results(4)
    child = os.fork()
    if child == 0:
        # No pytest in the child: it only computes and leaves its verdict in the exit status.
        right = equal(product_results(4), expected)
        os._exit(0 if right and len(os.listdir("/proc/self/task")) == 4 else 1)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert equal(product_results(4), expected)


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    # The child finds this file's modules, and the package where the parent found it.
    paths = [str(Path(__file__).parent), *(p for p in sys.path if p)]
    variables = {**os.environ, **environment, "PYTHONPATH": os.pathsep.join(paths)}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=variables, timeout=120, check=False
    )


def test_exit_with_sleeping_workers_is_prompt_and_clean() -> None:
    result = run_python("import test_native_threads as t; t.elementwise_results(4); print('done')")
    assert (result.returncode, result.stdout, result.stderr) == (0, "done\n", "")


def test_fewer_threads_when_the_system_refuses_more() -> None:
    """The address space has room for the tensors, not for a thread's stack of 1 GB; the result is the same."""
    code = """
import os, resource, sys
if "STACKS" not in os.environ:  # a process takes its threads' stack size from the limit it was started under
    resource.setrlimit(resource.RLIMIT_STACK, (1 << 30, resource.getrlimit(resource.RLIMIT_STACK)[1]))
    os.execve(sys.executable, sys.orig_argv, {**os.environ, "STACKS": "large", "OMP_NUM_THREADS": "1"})
import test_native_threads as t
expected = t.elementwise_results(1)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (512 << 20), resource.RLIM_INFINITY))
print(t.equal(t.elementwise_results(64), expected), len(os.listdir("/proc/self/task")))
"""
    result = run_python(code)
    assert (result.returncode, result.stdout) == (0, "True 1\n"), result.stderr


def test_flush_to_zero_set_by_the_process_does_not_reach_the_kernels() -> None:
    x = torch.full((256,), 1e-40)
    expected = quantize(x, signed=False)
    torch.set_flush_denormal(True)
    try:
        flushed = quantize(x, signed=False)
    finally:
        torch.set_flush_denormal(False)
    assert equal(list(flushed), list(expected))


def available_instruction_sets() -> list[str]:
    return INSTRUCTION_SETS[: INSTRUCTION_SETS.index(_native.build_info()["isa"]) + 1]


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_every_instruction_set(isa: str, tmp_path: Path) -> None:
    """The builds that this processor would not choose: products within rounding, everything else to the bit."""
    if isa not in available_instruction_sets():
        pytest.skip(f"this processor does not have {isa}")
    path = tmp_path / "results.pt"
    code = f"""
import json, torch
import test_native_threads as t
torch.save((t.elementwise_results(2) + t.code_results(2), t.product_results(2)), {json.dumps(str(path))})
print(t._native.build_info()["isa"])
"""
    result = run_python(code, GALORE_KERNELS_ISA=isa)
    assert (result.returncode, result.stdout) == (0, isa + "\n"), result.stderr
    elementwise, products = torch.load(path, weights_only=True)
    assert equal(elementwise, elementwise_results(1) + code_results(1))
    for theirs, ours in zip(products, product_results(1), strict=True):
        # The order of the sums may move a 16-bit weight to its neighbour; fp32 results by a few roundings of terms
        # that are about as large as the largest result.
        tolerance = 2 * torch.finfo(ours.dtype).eps
        torch.testing.assert_close(theirs, ours, rtol=tolerance, atol=8 * 2.0**-23 * ours.abs().max().item())


def test_unknown_instruction_set_is_refused_by_the_import() -> None:
    result = run_python("import galore_kernels._native", GALORE_KERNELS_ISA="avx513")
    assert result.returncode != 0
    assert "GALORE_KERNELS_ISA=avx513: expected one that this processor supports" in result.stderr
    assert "generic" in result.stderr
