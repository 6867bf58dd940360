"""What the build promises: the native module and what it says of itself, the metadata, sdist and wheel."""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import galore_kernels
from galore_kernels import _native

ROOT = Path(__file__).resolve().parents[1]
INFO = _native.build_info()

needs_cuda_build = pytest.mark.skipif(not INFO["cuda_archs"], reason="built without nvcc")


def test_the_installed_package_is_tested_not_the_checkout() -> None:
    assert not Path(galore_kernels.__file__).is_relative_to(ROOT / "galore_kernels"), (
        "the checkout's galore_kernels shadows the installed one: start the tests with ./run test or pytest, "
        "not with python -m pytest, and install with pip install ."
    )


def test_one_version_everywhere() -> None:
    assert importlib.metadata.version("galore-kernels") == galore_kernels.__version__ == INFO["version"]


def test_torch_is_the_only_runtime_dependency() -> None:
    requirements = importlib.metadata.requires("galore-kernels") or []
    assert [requirement for requirement in requirements if "extra ==" not in requirement] == ["torch>=2.6"]


def test_build_info() -> None:
    assert set(INFO) == {"compiler", "cuda_archs", "isa", "version"}
    assert INFO["compiler"]
    assert INFO["isa"] in {"generic", "avx2", "avx512", "avx512_bf16"}


def test_the_cuda_functions_exist_where_cuda_was_built() -> None:
    for name in ("cuda_quantize_blockwise", "cuda_dequantize_blockwise"):
        assert hasattr(_native, name) == bool(INFO["cuda_archs"])


@needs_cuda_build
def test_a_cuda_call_that_cannot_run_raises() -> None:
    # No machine has this device: "invalid device ordinal" where there is a GPU, what is missing where there is none.
    x, codes, absmax = (ctypes.c_float * 1)(), (ctypes.c_uint8 * 1)(), (ctypes.c_float * 1)()
    addresses = [ctypes.addressof(buffer) for buffer in (x, codes, absmax)]
    with pytest.raises(RuntimeError, match=r"CUDA|device"):
        _native.cuda_quantize_blockwise(addresses[0], 0, 1, True, addresses[1], addresses[2], 9999, 0)
    with pytest.raises(RuntimeError, match=r"CUDA|device"):
        _native.cuda_dequantize_blockwise(addresses[1], addresses[2], 1, True, addresses[0], 9999, 0)


@needs_cuda_build
def test_the_static_cuda_runtime_is_hidden() -> None:
    # Exported, its functions would be resolved to the libcudart of another version that torch has loaded.
    with pytest.raises(AttributeError):
        ctypes.CDLL(_native.__file__).cudaGetDeviceCount  # noqa: B018 (the look-up is what raises)


def test_the_package_is_typed() -> None:
    package = Path(galore_kernels.__file__).parent
    assert (package / "py.typed").is_file()
    assert (package / "_native.pyi").is_file()


def build(source: Path, hook: str, output: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Calls a hook of the build backend as pip does, without the network: the build's requirements are installed."""
    output.mkdir(exist_ok=True)
    call = f"import sys; from setuptools import build_meta; build_meta.{hook}(sys.argv[1])"
    return subprocess.run(
        [sys.executable, "-c", call, str(output)],
        cwd=source,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    # A copy, because setuptools leaves an egg-info folder where it builds.
    unwanted = shutil.ignore_patterns(".*", "build", "dist", "runs", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, folder / "checkout", ignore=unwanted)
    result = build(folder / "checkout", "build_sdist", folder / "out")
    assert result.returncode == 0, result.stderr
    (archive,) = (folder / "out").iterdir()
    # Not tarfile: Debian 12's lacks the filter argument, which Python 3.12 warns about where it is not given.
    subprocess.run(["tar", "-xf", str(archive), "-C", str(folder)], check=True)
    return folder / archive.name.removesuffix(".tar.gz")


def test_the_sdist_has_all_that_the_build_reads(sdist: Path) -> None:
    wanted = {path.relative_to(ROOT) for path in (ROOT / "csrc").rglob("*") if path.is_file()}
    wanted |= {
        path.relative_to(ROOT)
        for path in (ROOT / "galore_kernels").rglob("*")
        if path.suffix in {".py", ".pyi", ".typed"}
    }
    wanted |= {Path(name) for name in ("CMakeLists.txt", "LICENSE", "README.md", "pyproject.toml", "setup.py")}
    assert not sorted(path for path in wanted if not (sdist / path).is_file())


@pytest.fixture(scope="module")
def cpu_wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from the unpacked sdist as on a machine without nvcc."""
    output = tmp_path_factory.mktemp("wheel")
    result = build(sdist, "build_wheel", output, GALORE_KERNELS_CUDA="0")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "building the CPU backend alone" in result.stdout
    (wheel,) = output.iterdir()
    return wheel


@pytest.mark.slow  # compiles the CPU backend
def test_a_wheel_of_the_sdist_works_without_nvcc(cpu_wheel: Path, tmp_path: Path) -> None:
    shutil.unpack_archive(cpu_wheel, tmp_path, "zip")
    script = "from galore_kernels import _native; print(_native.__file__, _native.build_info()['cuda_archs'])"
    run = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": str(tmp_path), "PYTHONSAFEPATH": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    path, archs = run.stdout.split(maxsplit=1)
    assert Path(path).is_relative_to(tmp_path)
    assert archs.strip() == "[]"


@pytest.mark.slow  # needs the objects that the wheel was linked from
@pytest.mark.usefixtures("cpu_wheel")
def test_kernel_objects_share_no_function(sdist: Path) -> None:
    # The linker keeps one copy of a weak function, of whatever instruction set: an AVX-512 one would crash elsewhere.
    objects = sorted(sdist.glob("build/temp*/CMakeFiles/kernels_*/csrc/cpu/kernels.cpp.o"))
    assert objects
    for path in objects:
        symbols = subprocess.run(["nm", str(path)], capture_output=True, text=True, check=True).stdout.splitlines()
        assert not [symbol for symbol in symbols if symbol.split()[-2] in set("WVu")], path


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"GALORE_KERNELS_CUDA": "yes"}, "GALORE_KERNELS_CUDA='yes': expected 0, 1 or unset"),
        ({"CUDACXX": "/nowhere/nvcc"}, "CUDACXX='/nowhere/nvcc': no such program"),
        ({"GALORE_KERNELS_CUDA": "1", "CUDA_HOME": "/nowhere", "PATH": ""}, "neither CUDA_HOME nor PATH leads to nvcc"),
    ],
)
def test_the_build_refuses_a_cuda_setting_it_cannot_meet(
    sdist: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    environment: dict[str, str],
    message: str,
) -> None:
    monkeypatch.delenv("CUDACXX", raising=False)
    result = build(sdist, "build_wheel", tmp_path / "out", **environment)
    assert result.returncode != 0
    assert message in result.stderr
