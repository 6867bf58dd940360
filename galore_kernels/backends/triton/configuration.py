"""How kernels cut their work: a table for each architecture, chosen from by shape and dtype. Nothing is tried out.

Kernels that update in place can't be timed by running them several times (each run is a step), and a choice by timing
would make results differ between runs. So tiles are looked up. What the table says can be overridden:

    with configuration.override(project={"rows": 64, "warps": 4}, splits=2):
        optimizer.step()

or, for a whole process, by the same as JSON in the environment variable ``GALORE_KERNELS_TRITON``:

    GALORE_KERNELS_TRITON='{"project": {"rows": 64, "warps": 4}, "splits": 2}' python train.py

Keys are the stages' names, "splits" (into how many parts ``project`` cuts the short dimension) and "architecture".
``back_project_update`` has the name "back_project_update_int8" where the weight is int8.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Any

import torch

from galore_kernels.backends.batch import Batch
from galore_kernels.backends.triton.availability import interpreted
from galore_kernels.quantizers import GROUP_SIZE, block_count

ENVIRONMENT_VARIABLE = "GALORE_KERNELS_TRITON"

#: Architectures with a column of their own. Others take the one that fits them: see ``architecture``.
ARCHITECTURES = ("sm_80", "sm_89", "sm_90")

#: What is not NVIDIA's takes the smallest tiles, with two stages: AMD's programs have 64 KB of shared memory.
_OTHER = "other"


@dataclass(frozen=True)
class Tile:
    """A product's tile.

    Attributes:
        rows, columns: of the result in one program: long rows x basis columns, or rows x columns of the weight.
        depth: summed indices at a time. warps, stages: of Triton.
        precision: of products that are not of two 16-bit operands of one dtype. "bf16x6" takes each float32 for the
            sum of three bfloat16 and adds the six largest of the nine products on the tensor cores: an error of a few
            2^-24, as float32's own. It costs as much as "tf32x3", whose error is 2^-22, and is faster than "ieee",
            which leaves the tensor cores idle.
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    precision: str = "bf16x6"

    @property
    def reach(self) -> int:
        """Rows that a program's offsets lead over, whichever operand's they are."""
        return max(self.rows, self.columns, self.depth)


@dataclass(frozen=True)
class ElementTile:
    """An element-wise stage's tile: blocks of 256 elements in one program, and its warps."""

    blocks: int
    warps: int


@dataclass(frozen=True)
class PanelTile:
    """The same of a stage that goes by rows and columns of a matrix."""

    rows: int
    columns: int
    warps: int

    @property
    def reach(self) -> int:
        """As a product's."""
        return self.rows


# Largest columns (project) or depth (back_project_update) that a tile serves -> the tile. The next larger one is taken,
# or the last, several times over.
_Column = dict[int, Tile]

# (architecture, stage, bits of an operand) -> column. sm_89 has 99 KB of shared memory for a program, sm_80 163 KB and
# sm_90 227 KB. float32 operands are split in registers, which limits their tiles.
_PRODUCTS: dict[tuple[str, str, int], _Column] = {
    ("sm_80", "project", 16): {
        16: Tile(128, 16, 64, 4, 4),
        32: Tile(128, 32, 64, 4, 4),
        64: Tile(128, 64, 64, 4, 4),
        128: Tile(128, 128, 64, 8, 3),
    },
    ("sm_89", "project", 16): {
        16: Tile(128, 16, 64, 4, 3),
        32: Tile(128, 32, 64, 4, 3),
        64: Tile(128, 64, 64, 4, 3),
        128: Tile(128, 128, 32, 8, 4),
    },
    ("sm_90", "project", 16): {
        16: Tile(128, 16, 64, 4, 4),
        32: Tile(128, 32, 64, 4, 4),
        64: Tile(128, 64, 64, 4, 4),
        128: Tile(128, 128, 64, 8, 4),
        256: Tile(128, 256, 64, 8, 3),
    },
    ("sm_80", "project", 32): {
        16: Tile(64, 16, 32, 4, 3),
        32: Tile(64, 32, 32, 4, 3),
        64: Tile(64, 64, 32, 4, 3),
    },
    ("sm_89", "project", 32): {
        16: Tile(64, 16, 32, 4, 3),
        32: Tile(64, 32, 32, 4, 3),
        64: Tile(64, 64, 32, 4, 3),
    },
    ("sm_90", "project", 32): {
        16: Tile(64, 16, 32, 4, 3),
        32: Tile(64, 32, 32, 4, 3),
        64: Tile(64, 64, 32, 4, 3),
    },
    ("sm_80", "back_project_update", 16): {
        16: Tile(128, 128, 16, 8, 2),
        32: Tile(128, 128, 32, 8, 2),
        64: Tile(128, 128, 64, 8, 3),
    },
    ("sm_89", "back_project_update", 16): {
        16: Tile(128, 128, 16, 8, 2),
        32: Tile(128, 128, 32, 8, 3),
    },
    ("sm_90", "back_project_update", 16): {
        16: Tile(128, 128, 16, 8, 2),
        32: Tile(128, 128, 32, 8, 2),
        64: Tile(128, 128, 64, 8, 3),
    },
    ("sm_80", "back_project_update", 32): {16: Tile(64, 64, 16, 4, 3), 32: Tile(64, 64, 32, 4, 3)},
    ("sm_89", "back_project_update", 32): {16: Tile(64, 64, 16, 4, 3), 32: Tile(64, 64, 32, 4, 3)},
    ("sm_90", "back_project_update", 32): {16: Tile(64, 64, 16, 4, 3), 32: Tile(64, 64, 32, 4, 3)},
    # int8 weights: a tile is one group wide. What their codes take comes on top of the accumulator's registers.
    ("sm_80", "back_project_update_int8", 16): {
        16: Tile(64, GROUP_SIZE, 16, 8, 2),
        32: Tile(64, GROUP_SIZE, 32, 8, 3),
    },
    ("sm_89", "back_project_update_int8", 16): {
        16: Tile(64, GROUP_SIZE, 16, 8, 2),
        32: Tile(64, GROUP_SIZE, 32, 8, 3),
    },
    ("sm_90", "back_project_update_int8", 16): {
        16: Tile(64, GROUP_SIZE, 16, 8, 2),
        32: Tile(64, GROUP_SIZE, 32, 8, 2),
        64: Tile(64, GROUP_SIZE, 64, 8, 3),
    },
    ("sm_80", "back_project_update_int8", 32): {32: Tile(32, GROUP_SIZE, 32, 8, 2)},
    ("sm_89", "back_project_update_int8", 32): {32: Tile(32, GROUP_SIZE, 32, 8, 2)},
    ("sm_90", "back_project_update_int8", 32): {16: Tile(64, GROUP_SIZE, 16, 8, 3)},
}

# (architecture, stage, bits, largest columns or depth) -> what differs beside a basis' codes, whose conversion takes
# registers: without it these spill.
_BESIDE_CODES: dict[tuple[str, str, int, int], dict[str, Any]] = {
    ("sm_80", "project", 16, 64): {"warps": 8},
    ("sm_89", "project", 16, 64): {"warps": 8},
    ("sm_90", "project", 32, 16): {"rows": 128},
}

# The same where the basis is drawn: random bits, addresses of magnitudes and entries are alive together. Of what is not
# aligned (see there) the depth is 16.
_BESIDE_DRAWN: dict[tuple[str, str, int, int], dict[str, Any]] = {
    ("sm_80", "project", 16, 16): {"depth": 32},
    ("sm_80", "project", 16, 32): {"depth": 32},
    ("sm_80", "project", 16, 64): {"depth": 32, "warps": 8},
    ("sm_80", "project", 16, 128): {"depth": 16, "stages": 4},
    ("sm_89", "project", 16, 16): {"depth": 32},
    ("sm_89", "project", 16, 32): {"depth": 32},
    ("sm_89", "project", 16, 64): {"depth": 32, "warps": 8},
    ("sm_89", "project", 16, 128): {"depth": 16},
    ("sm_90", "project", 16, 256): {"depth": 32},
}

# The same where the gradient's squares are summed beside the product of a stored basis.
_BESIDE_SQUARES: dict[tuple[str, str, int, int], dict[str, Any]] = {("sm_90", "project", 16, 256): {"warps": 16}}

# Addresses or rows that are no multiples of 16 bytes are loaded element by element, each with its own mask. What counts
# then is to stay within the registers.
_UNALIGNED = {
    ("project", 16): Tile(32, 64, 32, 4, 2),
    ("project", 32): Tile(32, 32, 16, 4, 2),
    ("back_project_update", 16): Tile(32, 64, 32, 4, 2),
    ("back_project_update", 32): Tile(32, 32, 32, 4, 2),
    ("back_project_update_int8", 16): Tile(16, GROUP_SIZE, 16, 8, 2),
    ("back_project_update_int8", 32): Tile(16, GROUP_SIZE, 16, 8, 2),
}

# Once in many steps, on every architecture: small enough for two accumulators of three bfloat16 each.
_ROTATE_MOMENTS = Tile(64, 32, 16, 4, 1)

# Bound by memory on every architecture: what matters is enough bytes under way, and vectors for each thread.
_ELEMENTS = {
    "scale_and_check": ElementTile(8, 8),
    "check_gradient": ElementTile(8, 8),
    "lowrank_adam": ElementTile(4, 4),
    "adam_update": ElementTile(4, 4),
    "long_norms": ElementTile(4, 4),
    "gradient_factors": ElementTile(8, 8),
    "scaled_gradient_update": ElementTile(16, 8),
    "random_basis": ElementTile(8, 4),
    "quantize_blockwise": ElementTile(4, 4),
    "dequantize_blockwise": ElementTile(8, 8),
}

# The interpreter pays for each operation of each program, and little for elements.
_INTERPRETED_BLOCKS = 64
_INTERPRETED_PRODUCT = Tile(128, 128, 128, 1, 1)
_INTERPRETED_INT8 = replace(_INTERPRETED_PRODUCT, columns=GROUP_SIZE)

_Overrides = Mapping[str, Any]
_STAGES = ("project", "back_project_update", "back_project_update_int8", "rotate_moments", *_ELEMENTS)
_overrides: ContextVar[_Overrides | None] = ContextVar("galore_kernels_triton_overrides", default=None)


def _checked(overrides: _Overrides, where: str) -> _Overrides:
    """Raises ValueError unless every key and value can be used."""
    for key, value in overrides.items():
        if key == "splits":
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{where}: splits must be an integer >= 1, got {value!r}")
        elif key == "architecture":
            if value not in ARCHITECTURES:
                raise ValueError(f"{where}: architecture must be one of {', '.join(ARCHITECTURES)}, got {value!r}")
        elif key in _STAGES:
            _check_tile(key, value, where)
        else:
            known = ", ".join([*_STAGES, "splits", "architecture"])
            raise ValueError(f"{where}: unknown key {key!r}; choose among {known}")
    return overrides


def _check_tile(stage: str, changes: Any, where: str) -> None:
    known = {field.name for field in fields(ElementTile if stage in _ELEMENTS else Tile)}
    if stage == "back_project_update_int8":
        known.remove("columns")  # always one group
    if not isinstance(changes, Mapping) or not set(changes) <= known:
        raise ValueError(f"{where}: {stage} takes a mapping of {', '.join(sorted(known))}, got {changes!r}")
    for name, value in changes.items():
        if name == "precision":
            if value not in ("ieee", "tf32x3", "bf16x6"):
                raise ValueError(f"{where}: {stage}: precision must be ieee, tf32x3 or bf16x6, got {value!r}")
            continue
        least = 16 if name in ("rows", "columns", "depth") else 1  # the smallest product that Triton takes
        kind = "an integer" if name == "stages" else "a power of two"
        if not isinstance(value, int) or value < least or (name != "stages" and value & (value - 1)):
            raise ValueError(f"{where}: {stage}: {name} must be {kind} >= {least}, got {value!r}")


@lru_cache(maxsize=4)
def _of_environment(text: str) -> _Overrides:
    try:
        parsed = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{ENVIRONMENT_VARIABLE}={text!r} is not JSON: {error}") from error
    if not isinstance(parsed, dict):
        raise ValueError(f"{ENVIRONMENT_VARIABLE}={text!r}: expected a JSON object")
    return _checked(parsed, ENVIRONMENT_VARIABLE)


def _current() -> _Overrides:
    of_context = _overrides.get()
    return of_context if of_context is not None else _of_environment(os.environ.get(ENVIRONMENT_VARIABLE, "{}"))


@contextlib.contextmanager
def override(**overrides: Any) -> Iterator[None]:
    """Within the context, and in this thread: other tiles than the table's; see the module's docstring.

    Raises:
        ValueError: a key or a value can't be used; the message says which.
    """
    token = _overrides.set({**_current(), **_checked(overrides, "override")})
    try:
        yield
    finally:
        _overrides.reset(token)


def forced_splits() -> int | None:
    """The overridden number of parts of the short dimension, or None."""
    return _current().get("splits")


@lru_cache(maxsize=64)
def _architecture_of(device: torch.device) -> str:
    if device.type != "cuda" or torch.version.hip is not None:
        return _OTHER
    capability = torch.cuda.get_device_capability(device)
    # 8.6 and 12.0 have as little shared memory as 8.9; 10.x and 11.x as much as 9.0. 8.7 has as much as 8.0.
    if (9, 0) <= capability < (12, 0):
        return "sm_90"
    return "sm_80" if capability in ((8, 0), (8, 7)) else "sm_89"


def architecture(device: torch.device) -> str:
    """The column of the table that serves ``device``, or "other"."""
    forced = _current().get("architecture")
    return forced if forced is not None else _architecture_of(device)


def limits(architecture: str, stage: str, bits: int) -> tuple[int, ...]:
    """The ranks up to which ``stage``'s tiles for operands of so many bits serve, each in one piece."""
    return tuple(_PRODUCTS[architecture, stage, bits])


def _beside(batch: Batch, squares: bool) -> dict[tuple[str, str, int, int], dict[str, Any]]:
    if not batch.basis_dtype.is_floating_point:
        return _BESIDE_CODES
    if batch.magnitudes is not None:
        return _BESIDE_DRAWN
    return _BESIDE_SQUARES if squares else {}


def _product_tile(stage: str, batch: Batch, bits: int, squares: bool = False) -> Tile:
    chosen = architecture(batch.device)
    if chosen == _OTHER and interpreted():
        tile = _INTERPRETED_INT8 if stage == "back_project_update_int8" else _INTERPRETED_PRODUCT
    elif batch.aligned and not (batch.basis_dtype == torch.uint8 and batch.rank % 2):
        # Packed codes of an odd rank may be aligned; the direction that they are multiplied with is not.
        key = ("sm_89" if chosen == _OTHER else chosen, stage, bits)
        limit = next((limit for limit in _PRODUCTS[key] if limit >= batch.rank), max(_PRODUCTS[key]))
        tile = _PRODUCTS[key][limit]
        tile = replace(tile, **_beside(batch, squares).get((*key, limit), {}))
        if chosen == _OTHER:
            tile = replace(tile, stages=2)
    else:
        tile = _UNALIGNED[stage, bits]
        if batch.magnitudes is not None:
            tile = replace(tile, depth=16)
    return replace(tile, **_current().get(stage, {}))


def project_tile(batch: Batch, *, squares: bool = False) -> Tile:
    """The tile of ``project``. A basis' codes take the gradient's dtype, as does what is drawn.

    squares: whether it sums the gradient's too.
    """
    stored = batch.basis_dtype.is_floating_point and batch.magnitudes is None
    basis_dtype = batch.basis_dtype if stored else batch.grad_dtype
    bits = 16 if batch.grad_dtype == basis_dtype != torch.float32 else 32
    return _product_tile("project", batch, bits, squares)


def back_project_update_tile(batch: Batch) -> Tile:
    """The tile of ``back_project_update``."""
    bits = 16 if batch.factor_dtype != torch.float32 else 32
    stage = "back_project_update_int8" if batch.weight_dtype == torch.int8 else "back_project_update"
    return _product_tile(stage, batch, bits)


def rotate_moments_tile() -> Tile:
    """The tile of ``rotate_moments``."""
    tile = _INTERPRETED_PRODUCT if interpreted() else _ROTATE_MOMENTS
    return replace(tile, **_current().get("rotate_moments", {}))


def element_tile(stage: str, elements: int) -> ElementTile:
    """The tile of an element-wise stage."""
    tile = _ELEMENTS[stage]
    if interpreted():
        blocks = 1 << max(0, block_count(elements) - 1).bit_length()
        tile = replace(tile, blocks=min(blocks, _INTERPRETED_BLOCKS))
    return replace(tile, **_current().get(stage, {}))


def panel_tile(stage: str, rows: int, columns: int) -> PanelTile:
    """The tile of an element-wise stage on a (rows, columns) matrix: as wide as that, from 8 to 256 columns."""
    width = min(256, max(8, 1 << max(0, columns - 1).bit_length()))
    tile = element_tile(stage, rows * width)
    return PanelTile(tile.blocks * 256 // width, width, tile.warps)


def known_factor(size: int, aligned: bool) -> int:
    """The power of two up to 16 that a kernel may take for a factor of ``size``; 1 unless addresses are ``aligned``."""
    return math.gcd(size, 16) if aligned else 1
