"""The Triton kernels compiled ahead of time, as shipped: no spill, shared memory that is there, exact arithmetic.

``bench/triton_registers.py`` compiles every tile of the tables; this the largest of each stage and dtype.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest

from galore_kernels.backends.triton import configuration

pytest.importorskip("triton")

SCRIPT = Path(__file__).parents[1] / "bench" / "triton_registers.py"
SHARED_MEMORY = {"sm_80": 166912, "sm_89": 101376, "sm_90": 232448}

Kernel = dict[str, Any]


@lru_cache(maxsize=8)
def report(architecture: str) -> dict[str, Any]:
    # Its own process: here Triton's interpreter may be on. The package as these tests find it, installed or on a path.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    command = [sys.executable, str(SCRIPT), "--quick", "--ptx", "--arch", architecture]
    ran = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert ran.returncode in (0, 1), ran.stderr  # 1: there are faults, which a test names
    found: dict[str, Any] = json.loads(ran.stdout)
    return found


@pytest.fixture(params=configuration.ARCHITECTURES)
def kernels(request: pytest.FixtureRequest) -> list[Kernel]:
    return list(report(request.param)["kernels"])


def of(kernels: list[Kernel], *names: str, where: Callable[[Kernel], bool] = lambda k: True) -> Iterator[Kernel]:
    """The kernels of these names; fails if there are none."""
    found = [k for k in kernels if k["kernel"].removesuffix("_kernel") in names and where(k)]
    assert found, names
    yield from found


PRODUCTS = ("project", "back_project_update")
ELEMENTS = (
    "prepare",
    "scale_and_check",
    "lowrank_adam",
    "check_gradient",
    "adam_update",
    "quantize_blockwise",
    "dequantize_blockwise",
    "long_norms",
    "gradient_factors",
    "scaled_gradient_update",
)


def test_every_kernel_is_looked_at(kernels: list[Kernel]) -> None:
    names = {f"{name}_kernel" for name in (*PRODUCTS, *ELEMENTS, "rotate_moments", "random_basis", "write_column")}
    assert {k["kernel"] for k in kernels} == names


def test_nothing_spills(kernels: list[Kernel]) -> None:
    for k in kernels:
        what = f"{k['architecture']} {k['case']} {k['kernel']}"
        assert 16 <= k["registers"] <= 255, what
        assert (k["spill_bytes"], k["stack_bytes"]) == (0, 0), what


def test_shared_memory_is_there(kernels: list[Kernel]) -> None:
    for k in kernels:
        assert k["shared_bytes"] <= SHARED_MEMORY[k["architecture"]], k["case"]
    assert any(k["shared_bytes"] > 16384 for k in kernels)  # the number is one


def test_the_report_names_faults(kernels: list[Kernel]) -> None:
    architecture = kernels[0]["architecture"]
    assert report(architecture)["faults"] == []
    program = (
        f"import sys; sys.path[:0] = [{str(SCRIPT.parent)!r}, *{sys.path!r}]; from triton_registers import *; "
        f"k = KernelResources({architecture!r}, 'case', 'kernel', 4, 255, 8, 16, 10**6); print(*k.faults(), sep='\\n')"
    )
    said = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout
    assert "8 bytes spilled, 16 bytes of stack" in said
    assert f"1000000 bytes of shared memory, of {SHARED_MEMORY[architecture]}" in said


def test_every_rounding_is_ieees(kernels: list[Kernel]) -> None:
    # Denormals are kept, quotients and roots are the nearest, and no multiply-add is contracted: what csrc/core/adam.h
    # computes. Of float32's products the matrix units' are another matter.
    for k in of(kernels, *ELEMENTS, *PRODUCTS, "rotate_moments"):
        for inexact in (".ftz", ".approx", "div.full", "fma."):
            assert inexact not in k["ptx"], f"{inexact} in {k['case']} {k['kernel']}"
    for k in of(kernels, "lowrank_adam", "adam_update"):
        assert "div.rn.f32" in k["ptx"]
        assert "sqrt.rn.f32" in k["ptx"]
    for k in of(kernels, "back_project_update", where=lambda k: "update int8/" in k["case"]):
        assert "div.rn.f32" in k["ptx"]
    for k in of(kernels, "prepare"):
        assert "div.rn.f64" in k["ptx"]
        assert "sqrt.rn.f64" in k["ptx"]


def is_aligned(kernel: Kernel) -> bool:
    return "unaligned" not in kernel["case"]


def has_codes(kernel: Kernel) -> bool:
    return bool(re.search("/int[48] ", kernel["case"]))


def is_drawn(kernel: Kernel) -> bool:
    return " drawn" in kernel["case"]


def test_aligned_operands_are_copied_asynchronously_sixteen_bytes_at_a_time(kernels: list[Kernel]) -> None:
    for k in of(kernels, *PRODUCTS, where=is_aligned):
        assert "cp.async.cg.shared.global" in k["ptx"], k["case"]
        # A tile's codes may be fewer than sixteen bytes for each thread; those of four or eight are copied so too.
        assert has_codes(k) or "cp.async.ca.shared.global" not in k["ptx"], k["case"]
        # Single elements are magnitudes of what is drawn.
        assert is_drawn(k) or not re.search(r"ld\.global[.\w]*\.b(8|16)\b", k["ptx"]), k["case"]


def test_weights_and_moments_move_as_vectors(kernels: list[Kernel]) -> None:
    for k in of(kernels, "back_project_update", "check_gradient", "scale_and_check", where=is_aligned):
        assert re.search(r"ld\.global[.\w]*\.v4\.b32", k["ptx"]), k["case"]
    for k in of(kernels, "project", "back_project_update", "lowrank_adam", "adam_update", where=is_aligned):
        assert re.search(r"st\.global[.\w]*\.v4\.b32", k["ptx"]), k["case"]
    # A thread's eight codes at once; single bytes are of the code's table.
    for k in of(kernels, "lowrank_adam", "adam_update"):
        assert re.search(r"ld\.global[.\w]*\.v2\.b32", k["ptx"]), k["case"]
        assert not re.search(r"st\.global[.\w]*\.b8", k["ptx"]), k["case"]


def test_products_run_on_the_matrix_units_in_bfloat16(kernels: list[Kernel]) -> None:
    # Also of float32: as the sum of three bfloat16, which is more exact than tf32 and as fast.
    for k in of(kernels, *PRODUCTS, "rotate_moments"):
        hopper = k["architecture"] == "sm_90" and is_aligned(k)
        assert re.search(r"wgmma\.mma_async[.\w]*\.bf16" if hopper else r"mma\.sync[.\w]*\.bf16", k["ptx"]), k["case"]
        assert "tf32" not in k["ptx"], k["case"]


def test_codes_beside_float32_take_half_its_products(kernels: list[Kernel]) -> None:
    # Three of bfloat16 instead of six: a code is one bfloat16, as is what is drawn, and a float32 the sum of three.
    def products(kernel: str, where: Callable[[Kernel], bool]) -> set[int]:
        some = of(kernels, kernel, where=lambda k: "fp32/fp32/" in k["case"] and where(k))
        return {len(re.findall(r"mma_async\.|mma\.sync\.", k["ptx"])) for k in some}

    for kernel in PRODUCTS:
        (whole,) = products(kernel, lambda k: not has_codes(k) and not is_drawn(k))
        (half,) = products(kernel, has_codes)
        assert 2 * half == whole
    assert products("project", is_drawn) == products("project", has_codes)
