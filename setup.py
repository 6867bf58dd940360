"""Builds ``galore_kernels._native`` with CMake; everything else about the package stands in pyproject.toml.

Environment variables that the build reads:
    CUDACXX, CUDA_HOME    where nvcc is; PATH is searched after them
    CUDAARCHS             CUDA architectures, in CMake's form: "80-real;90-real;90-virtual"
    GALORE_KERNELS_CUDA   "0" builds the CPU backend alone, "1" fails where there is no nvcc;
                          unset builds the CUDA backend where there is an nvcc, and says what it found
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def find_nvcc() -> str | None:
    """Path of nvcc, or None where there is none or GALORE_KERNELS_CUDA=0."""
    wanted = os.environ.get("GALORE_KERNELS_CUDA", "")
    if wanted not in ("", "0", "1"):
        raise SystemExit(f"GALORE_KERNELS_CUDA={wanted!r}: expected 0, 1 or unset")
    if wanted == "0":
        return None
    if "CUDACXX" in os.environ:
        nvcc = shutil.which(os.environ["CUDACXX"])
        if nvcc is None:
            raise SystemExit(f"CUDACXX={os.environ['CUDACXX']!r}: no such program")
        return nvcc
    search_path = [os.environ.get("PATH", os.defpath)]
    if "CUDA_HOME" in os.environ:
        search_path.insert(0, os.path.join(os.environ["CUDA_HOME"], "bin"))
    nvcc = shutil.which("nvcc", path=os.pathsep.join(search_path))
    if nvcc is None and wanted == "1":
        raise SystemExit("GALORE_KERNELS_CUDA=1, but neither CUDA_HOME nor PATH leads to nvcc: set CUDACXX to it")
    return nvcc


class CMakeBuild(build_ext):
    """Compiles the extension with CMake and ninja, in setuptools' own temporary folder."""

    def build_extension(self, ext: Extension) -> None:
        """Configures and builds, into the place where setuptools expects the extension."""
        # Imported here because reading the metadata needs none of them.
        import cmake
        import ninja
        import pybind11

        nvcc = find_nvcc()
        output = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        options = {
            "CMAKE_BUILD_TYPE": "Release",
            "CMAKE_LIBRARY_OUTPUT_DIRECTORY": output,
            "CMAKE_MAKE_PROGRAM": Path(ninja.BIN_DIR, "ninja"),
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
            "GK_VERSION": self.distribution.get_version(),
            "GK_CUDA": "ON" if nvcc else "OFF",
        }
        if nvcc:
            options["CMAKE_CUDA_COMPILER"] = nvcc
        definitions = [f"-D{name}={value}" for name, value in options.items()]
        run_cmake = str(Path(cmake.CMAKE_BIN_DIR, "cmake"))
        # --fresh: a cache of an earlier build names that build's environment, which pip has deleted since.
        subprocess.run(
            [run_cmake, "--fresh", "-G", "Ninja", "-S", ROOT, "-B", self.build_temp, *definitions], check=True
        )
        subprocess.run([run_cmake, "--build", self.build_temp], check=True)


class CleanBuild(build):
    """Starts from an empty library folder: setuptools would ship what an earlier checkout left in it."""

    def run(self) -> None:
        """Empties the folder, then builds."""
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


setup(
    ext_modules=[Extension("galore_kernels._native", sources=[])],
    cmdclass={"build": CleanBuild, "build_ext": CMakeBuild},
)
