"""Imports flow one way, and importing the package loads nothing that only its extras need."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import galore_kernels

PACKAGE = Path(galore_kernels.__file__).parent

#: Part of the package -> the parts it may import: integrations -> optim -> nn -> subspace -> ops <- backends.
ALLOWED: dict[str, set[str]] = {
    "quantizers": set(),
    "checkpoint": set(),
    "ops": {"quantizers"},
    "backends": {"ops", "quantizers", "_native"},
    "subspace": {"ops", "quantizers"},
    "optim": {"nn", "subspace", "ops", "quantizers"},
    "nn": {"subspace", "ops", "quantizers"},
    "distributed": {"optim", "checkpoint"},
    "integrations": {"optim", "nn", "subspace", "ops", "quantizers", "checkpoint"},
    "compat": {"optim", "ops", "quantizers", "subspace"},
    # What users import: everything but the hosts' integrations, others' names and the program.
    "": {"backends", "checkpoint", "nn", "ops", "optim", "quantizers", "subspace", "_native"},
    # The program uses the package as its users do.
    "pretrain": {"", "checkpoint", "distributed", "quantizers", "subspace"},
    # It asks the optimizers and backends for their sizes, and takes the program's names for model shapes.
    "plan": {"", "backends", "ops", "optim", "pretrain", "quantizers", "subspace"},
}

MODULES = sorted(path for path in PACKAGE.rglob("*.py"))


def part_of(module: str) -> str:
    """``galore_kernels.ops.adam`` belongs to the part "ops", ``galore_kernels`` itself to ""."""
    return [*module.split("."), ""][1]


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(path: Path) -> Iterator[tuple[str, bool]]:
    """(module, whether it is imported when the file is) of every import in the file."""
    tree = ast.parse(path.read_text())
    lazy = {node for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for node in ast.walk(f)}
    package = module_name(path).split(".")
    package = package if path.name == "__init__.py" else package[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node not in lazy) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            if module == "galore_kernels":  # `from galore_kernels import ops` imports a part
                names = [f"{module}.{alias.name}" for alias in node.names]
                yield from ((name if is_module(name) else module, node not in lazy) for name in names)
            else:
                yield module, node not in lazy


def is_module(name: str) -> bool:
    path = PACKAGE.parent.joinpath(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").exists() or name.endswith("._native")


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_imports_flow_one_way(path: Path) -> None:
    part = part_of(module_name(path))
    assert part in ALLOWED, f"{part} has no place in the order of imports: give it one in this test"
    for module, _ in imported(path):
        if module.split(".")[0] == "galore_kernels":
            target = part_of(module)
            assert target == part or target in ALLOWED[part], f"{module_name(path)} imports {module}"


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_the_library_needs_torch_alone(path: Path) -> None:
    part = part_of(module_name(path))
    for module, at_import in imported(path):
        name = module.split(".")[0]
        if name in ("torch", "galore_kernels") or name in sys.stdlib_module_names:
            continue
        if name == "triton" and module_name(path).startswith("galore_kernels.backends.triton."):
            continue  # whose stages are imported when they are first used
        # The program and the integrations may use extras; hosts are imported when they are used.
        exports = module_name(path) == "galore_kernels.nn.export"
        lazily = (part in ("integrations", "plan") or exports) and not at_import
        assert part == "pretrain" or lazily, f"{module_name(path)} imports {name}"


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_only_backends_and_the_root_touch_the_native_module(path: Path) -> None:
    module = module_name(path)
    if any(target.startswith("galore_kernels._native") for target, _ in imported(path)):
        assert module == "galore_kernels" or part_of(module) == "backends"


def test_the_order_has_no_cycle() -> None:
    rank = dict.fromkeys([*ALLOWED, "_native"], 0)
    for _ in rank:
        for part, below in ALLOWED.items():
            rank[part] = max([rank[part], *(rank[target] + 1 for target in below)])
    assert max(rank.values()) < len(rank)


def test_importing_loads_no_extra() -> None:
    # What of these torch itself imports is torch's affair: numpy, for example.
    program = (
        "import sys, torch; before = set(sys.modules); import galore_kernels; "
        "print(*sorted({name.split('.')[0] for name in set(sys.modules) - before}))"
    )
    # Where the tests find the package, whether it is installed or on a path.
    command = [sys.executable, "-c", f"import sys; sys.path[:] = {sys.path!r}; {program}"]
    loaded = set(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())
    assert "galore_kernels" in loaded
    assert not {name for name in loaded - sys.stdlib_module_names if name not in ("torch", "galore_kernels")}
