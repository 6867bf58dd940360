"""The CUDA kernels as the compiler leaves them, for every architecture that is shipped. Needs nvcc, and no GPU."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest

from galore_kernels import _native

SCRIPT = Path(__file__).resolve().parents[1] / "bench" / "cuda_registers.py"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on this machine"),
    pytest.mark.skipif(not _native.build_info()["cuda_archs"], reason="built without CUDA"),
]


@pytest.fixture(scope="module")
def registers() -> ModuleType:
    spec = importlib.util.spec_from_file_location("cuda_registers", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look their annotations up
    spec.loader.exec_module(module)
    return module


def test_no_kernel_spills_and_every_one_fits(registers: ModuleType) -> None:
    kernels = registers.measure()
    of_galore_update = [k for k in kernels if k.name == "galore_update"]
    # Dtypes, sides, bases quantized or not, architectures: the parsing misses none.
    assert len(of_galore_update) == 2 * 2 * 2 * 3
    wrong = [k for k in kernels if k.spill_stores or k.spill_loads or k.stack or k.blocks == 0]
    assert not wrong, wrong


def test_two_panels_share_a_multiprocessor_of_hopper(registers: ModuleType) -> None:
    # While one waits for its matrix's other panels or works on moments, the other keeps the memory bus busy.
    kernels = registers.measure(architectures=(90,))
    assert {k.blocks for k in kernels if k.name == "galore_update"} == {2}


def test_a_spill_is_seen(registers: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "csrc" / "cuda"
    folder.mkdir(parents=True)
    (tmp_path / "CMakeLists.txt").write_text("set(GK_CUDA_OPTIONS -ftz=false)")
    (folder / "spills.cu").write_text("""
        namespace gk { __global__ void __launch_bounds__(1024, 2) prepare_kernel(float* x) {
            float v[128];
            for (int i = 0; i < 128; ++i) v[i] = x[threadIdx.x + i * 4096];
            __syncthreads();
            for (int j = 0; j < 128; ++j) for (int i = 0; i < 128; ++i) v[i] = v[i] * v[(i + j) % 128] + v[j];
            for (int i = 0; i < 128; ++i) x[threadIdx.x + i * 4096] = v[i];
        } }
    """)
    monkeypatch.setattr(registers, "ROOT", tmp_path)
    (kernel,) = registers.measure(architectures=(80,))
    assert kernel.registers == 32
    assert kernel.spill_stores > 0
