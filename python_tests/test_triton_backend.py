"""The Triton backend without its kernels: what it refuses and says, and that it imports Triton only to run."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from galore_kernels.backends import triton as triton_backend
from galore_kernels.backends.triton import availability, make_backend

CPU, CUDA, META = torch.device("cpu"), torch.device("cuda"), torch.device("meta")


@pytest.fixture
def interpreter(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Lets a test say whether kernels are interpreted: ``interpreter.setattr(availability, "interpreted", ...)``."""
    monkeypatch.setattr(availability, "installed", lambda: True)
    return monkeypatch


def test_the_registered_backend_serves_gpus_alone(interpreter: pytest.MonkeyPatch) -> None:
    interpreter.setattr(availability, "interpreted", lambda: False)
    refuses = make_backend().refuses
    assert refuses(CUDA) is None
    assert refuses(torch.device("xpu")) is None
    assert refuses(CPU) == "it serves cuda and xpu tensors only, not cpu"
    assert refuses(META) == "it serves cuda and xpu tensors only, not meta"


def test_the_interpreters_backend_serves_the_cpu_alone(interpreter: pytest.MonkeyPatch) -> None:
    interpreter.setattr(availability, "interpreted", lambda: True)
    refuses = make_backend(in_interpreter=True).refuses
    assert refuses(CPU) is None
    assert refuses(CUDA) == "it serves cpu tensors only, not cuda"
    assert refuses(META) == "it serves cpu tensors only, not meta"


def test_compiled_and_interpreted_kernels_are_not_confused(interpreter: pytest.MonkeyPatch) -> None:
    interpreter.setattr(availability, "interpreted", lambda: True)
    assert "TRITON_INTERPRET is set" in str(make_backend().refuses(CUDA))
    interpreter.setattr(availability, "interpreted", lambda: False)
    assert "TRITON_INTERPRET is not set" in str(make_backend(in_interpreter=True).refuses(CPU))


@pytest.mark.parametrize("in_interpreter", [True, False])
def test_without_triton_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch, in_interpreter: bool) -> None:
    monkeypatch.setattr(availability, "installed", lambda: False)
    backend = make_backend(in_interpreter=in_interpreter)
    for device in (CPU, CUDA, META):
        assert backend.refuses(device) == "triton is not installed; pip install triton"
    facts = backend.describe()
    assert (facts["available"], facts["reason"]) == (False, "triton is not installed; pip install triton")


def test_without_a_gpu_it_is_not_available(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(availability, "installed", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert make_backend().describe()["reason"] == "torch sees no cuda or xpu device"
    assert "available" not in make_backend(in_interpreter=True).describe()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert "available" not in make_backend().describe()


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("1", "True"),
        ("true", "True"),  # Triton takes these too
        ("0", "False"),
        ("", "False"),
    ],
)
def test_the_environment_variable_is_read_as_triton_reads_it(value: str, expected: str) -> None:
    program = "from galore_kernels.backends.triton import availability; print(availability.interpreted())"
    assert _run(program, TRITON_INTERPRET=value) == expected


def test_importing_the_backend_imports_no_triton() -> None:
    program = (
        "import sys, torch; before = set(sys.modules); import galore_kernels.backends.triton.stages; "
        "from galore_kernels import backend_info; backend_info(); "
        "print(*(name for name in set(sys.modules) - before if name.split('.')[0] == 'triton'))"
    )
    assert _run(program) == ""


def _run(program: str, **environment: str) -> str:
    # Where the tests find the package, whether it is installed or on a path.
    command = [sys.executable, "-c", f"import sys; sys.path[:] = {sys.path!r}; {program}"]
    return subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout.strip()


def test_the_package_exports_what_makes_a_backend() -> None:
    assert triton_backend.__all__ == ["make_backend"]
    assert make_backend().name == "triton"
