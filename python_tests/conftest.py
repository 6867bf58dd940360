"""Shared fixtures. What tests compare with is in ``oracle.py``, how closely in ``tolerances.py``."""

from __future__ import annotations

import contextlib
import os
import zlib
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings
from stand_ins import DEVICE_BACKENDS, serving
from update_cases import BACKENDS

# The same examples in every run, no time limit per example (a shared CI core may pause at any moment), no files.
# Before Triton is first imported: its kernels serve CPU tensors in its interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

settings.register_profile("galore_kernels", derandomize=True, deadline=None, database=None, max_examples=60)
settings.load_profile("galore_kernels")

#: The modules with the operations' own tests.
OPERATIONS = {
    "test_apollo_update",
    "test_adam8bit_update",
    "test_galore_update",
    "test_galore_update_quantized",
    "test_int8_weight",
    "test_ops_library",
    "test_quantize_blockwise",
    "test_rotate_moments",
}


@pytest.fixture
def cuda_stand_in() -> Iterator[str]:
    """The name "cuda", under which the CUDA kernels serve CPU tensors during the test."""
    with serving("cuda") as name:
        yield name


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The name of each of the test's backends in turn, which serves CPU tensors during the test whatever it is."""
    with serving(request.param) as name:
        yield name


@pytest.fixture
def fast_backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The name of each of them that is compared with the reference."""
    with serving(request.param) as name:
        yield name


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Operations are tested on every backend, what is built on them on those that are made for the CPU."""
    # pytest's importlib mode puts the folder in front: python_tests.test_galore_update.
    of_operations = metafunc.module.__name__.rpartition(".")[2] in OPERATIONS
    names = [name for name in BACKENDS if of_operations or name not in DEVICE_BACKENDS]
    if "backend" in metafunc.fixturenames:
        metafunc.parametrize("backend", names, indirect=True)
    if "fast_backend" in metafunc.fixturenames:
        fast = [name for name in names if name != "reference"]
        metafunc.parametrize("fast_backend", fast, indirect=True)


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--all-devices``: what interpreter and emulation would take half an hour more for."""
    parser.addoption("--all-devices", action="store_true", help="every test of an operation on CUDA and Triton")


#: Of so many of the operations' tests on a device's backend one runs where a CPU stands in for the device.
ONE_OF = {"triton": 16, "cuda": 4}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out most of the operations' tests on stand-ins for devices, which are slow; what runs is drawn by name.

    The devices' kernels have tests of their own, which all run.
    """
    if config.getoption("--all-devices") or torch.cuda.is_available():
        return
    left_out = [item for item in items if zlib.crc32(item.nodeid.encode()) % ONE_OF.get(_backend_of(item), 1)]
    config.hook.pytest_deselected(items=left_out)
    dropped = set(left_out)
    items[:] = [item for item in items if item not in dropped]


def _backend_of(item: pytest.Item) -> str:
    params = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
    return str(params.get("backend") or params.get("fast_backend"))


@pytest.fixture(autouse=True)
def _one_thread_and_one_seed() -> None:
    # On two shared cores torch's products are slower with two threads than with one.
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _away_from_the_checkout(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Runs every test in an empty folder: ``python -c`` and ``-m`` then import the installed package."""
    with contextlib.chdir(tmp_path_factory.mktemp("working_directory")):
        yield
