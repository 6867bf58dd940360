"""The CUDA kernels executed by the CPU: ``csrc/cuda/*.cu`` compiled by g++ against an emulation of what they use.

``load()`` gives them as a module, with the functions that ``galore_kernels._native`` has for CUDA. Of a device the
emulation has threads, barriers, shuffles, shared memory, asynchronous copies, ``ldmatrix``, ``mma.sync`` and
cooperative launches (``include/execution.h``); not its memory model, its speed, or its rounding inside a product of
matrices.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import importlib.util
import os
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pybind11

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]

_OPTIONS = ["-std=c++17", "-O2", "-g1", "-fPIC", "-ffp-contract=off", "-Wall", "-Wextra", "-Wno-unknown-pragmas"]
_SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]


def _sources() -> list[Path]:
    kernels = ROOT / "csrc" / "cuda"
    return [*sorted(kernels.glob("*.cu")), kernels / "bindings.cpp", *sorted(HERE.glob("*.cpp"))]


def _digest(options: list[str]) -> str:
    files = [*HERE.rglob("*.h"), *HERE.glob("*.cpp"), *(ROOT / "csrc" / "core").iterdir()]
    files += (ROOT / "csrc" / "cuda").iterdir()
    digest = hashlib.sha256(" ".join([sys.version, *options]).encode())
    for path in sorted(files):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")


def build(*, sanitize: bool = False, extra: tuple[Path, ...] = (), name: str = "_simt") -> Path:
    """Compiles the module, or finds it compiled under ``build/``; about fifteen seconds on two cores.

    Args:
        sanitize: with AddressSanitizer and UndefinedBehaviorSanitizer; the process that loads it must have been
            started with ``LD_PRELOAD`` of ``g++ -print-file-name=libasan.so``.
        extra: sources instead of the kernels, the bindings and ``module.cpp``. name: the module's.
    """
    folders = [HERE / "include", HERE, ROOT / "csrc", pybind11.get_include(), sysconfig.get_path("include")]
    options = [*_OPTIONS, *(_SANITIZE if sanitize else []), *(f"-I{folder}" for folder in folders)]
    sources = (
        [HERE / f"{part}.cpp" for part in ("execution", "fiber", "runtime")] + list(extra) if extra else _sources()
    )
    key = _digest([*options, name, *(path.read_text() for path in extra)])
    target = ROOT / "build" / f"simt-{key}" / f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}"
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with _alone(target.parent / "lock"):
        if not target.exists():
            _compile_to(target, sources, options, sanitize=sanitize)
    return target


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """One process at a time: tests that run side by side want the same build."""
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _compile_to(target: Path, sources: list[Path], options: list[str], *, sanitize: bool) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        objects = [str(Path(folder, f"{i}.o")) for i in range(len(sources))]
        commands = [
            ["g++", *options, "-x", "c++", "-c", str(source), "-o", out]
            for source, out in zip(sources, objects, strict=True)
        ]
        with ThreadPoolExecutor(max_workers=min(2, os.cpu_count() or 1)) as pool:
            list(pool.map(_run, commands))
        linked = Path(folder, target.name)
        _run(["g++", "-shared", *(_SANITIZE if sanitize else []), *objects, "-o", str(linked)])
        linked.replace(target)  # whole or not at all


def load_module(path: Path, name: str = "_simt") -> ModuleType:
    """Imports a module that ``build`` made."""
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path}: not an extension module")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def load() -> ModuleType:
    """The kernels; what ``GALORE_KERNELS_SIMT`` names instead, if it is set (a sanitized build)."""
    named = os.environ.get("GALORE_KERNELS_SIMT")
    return load_module(Path(named) if named else build())
