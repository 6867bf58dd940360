"""Shared fixtures. What tests compare with is in ``oracle.py``, how closely in ``tolerances.py``."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings
from stand_ins import standing_in
from update_cases import CPU_BACKENDS

# The same examples in every run, no time limit per example (a shared CI core may pause at any moment), no files.
settings.register_profile("galore_kernels", derandomize=True, deadline=None, database=None, max_examples=60)
settings.load_profile("galore_kernels")


@pytest.fixture
def cuda_stand_in() -> Iterator[str]:
    """The name "cuda", under which the CUDA kernels serve CPU tensors during the test."""
    with standing_in("cuda"):
        yield "cuda"


@pytest.fixture(params=CPU_BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """The name of each backend that serves CPU tensors, in turn."""
    return str(request.param)


@pytest.fixture(params=[name for name in CPU_BACKENDS if name != "reference"])
def fast_backend(request: pytest.FixtureRequest) -> str:
    """The name of each backend that is compared with the reference."""
    return str(request.param)


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
