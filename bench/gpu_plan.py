"""What ``gpu_check.py`` measures: on a GPU, or in miniature on a CPU as a rehearsal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

Shape = tuple[int, int]

#: Decoder layers of Llama-7B, and the matrices of one: four of attention, gate and up, down.
LAYERS = 32
LAYER: tuple[Shape, ...] = ((4096, 4096),) * 4 + ((11008, 4096),) * 2 + ((4096, 11008),)

#: Goals of a step over the whole matrix set: share of the roofline for each of ``Plan.ranks``.
ROOFLINE_GOALS = (0.85, 0.80, 0.60, 0.60)
#: Goals of a single matrix at the first rank.
LAYERWISE_GOAL = 0.60
EQUAL_CODES_GOAL = 0.999
#: Fused steps at the first rank that a refresh of the whole set may take at most, from sketches and from bases found
#: before; and how many times as fast as exact decompositions the first is to be.
COLD_STEPS_GOAL, WARM_STEPS_GOAL, SVD_GOAL = 5.0, 2.0, 100.0


@dataclass(frozen=True)
class Plan:
    """Everything in which a rehearsal differs from the real thing.

    Attributes:
        device: torch's name of the device. ours: backends of ours, the first is the one whose goals count.
        divisor: of the matrices' sizes. ranks: of the whole set; the first is the one compared with rivals.
        rounds: samples of each implementation. refresh_rounds: of a refresh, which takes as long as several steps.
        eigenvalues: (number, size) of symmetric matrices whose eigenvalues are timed, as within a refresh.
        matrices: in one sample of single-matrix calls, enough to be cold.
        copy_bytes: of a buffer whose copying gives the bandwidth. product_size: of the square product.
        compiler: backend of torch.compile.
        tests: runs of pytest, side by side: name -> expression that selects the tests.
        workers: processes for each of them, where pytest-xdist is installed.
    """

    device: str
    ours: tuple[str, ...]
    divisor: int
    ranks: tuple[int, ...]
    rounds: int
    refresh_rounds: int
    eigenvalues: tuple[tuple[int, int], ...]
    matrices: int
    copy_bytes: int
    product_size: int
    compiler: str
    tests: dict[str, str]
    workers: int

    @property
    def dry_run(self) -> bool:
        """Whether this is the rehearsal, of which no number means anything."""
        return self.device == "cpu"

    def scaled(self, shape: Shape) -> Shape:
        """A matrix of the plan's size."""
        return shape[0] // self.divisor, shape[1] // self.divisor

    def whole_set(self) -> tuple[Shape, ...]:
        """Every matrix of the model."""
        return tuple(self.scaled(shape) for shape in LAYER * LAYERS)

    def as_dict(self) -> dict[str, Any]:
        """Plain data for the JSON."""
        return asdict(self)


GPU = Plan(
    device="cuda",
    ours=("cuda", "triton"),
    divisor=1,
    ranks=(128, 256, 512, 1024),
    rounds=15,
    refresh_rounds=5,
    eigenvalues=((224, 136), (32, 272)),  # a warm refresh of all matrices at rank 128; a cold one of one batch
    matrices=32,
    copy_bytes=4 * 2**30,
    product_size=8192,
    compiler="inductor",
    tests={"cuda": "cuda and not triton", "triton": "triton"},
    workers=6,
)

DRY_RUN = Plan(
    device="cpu",
    ours=("cpu", "reference"),
    divisor=64,
    ranks=(4, 8, 16, 32),
    rounds=3,
    refresh_rounds=2,
    eigenvalues=((4, 12), (2, 32)),
    matrices=4,
    copy_bytes=2**20,
    product_size=128,
    compiler="eager",
    tests={"rehearsal": "proxy or refuses_the_other"},
    workers=1,
)


def roofline_seconds(shapes: Sequence[Shape], rank: int, copy: float, rate: float) -> float:
    """The time below which a GaLore step can't go: 6 + 4 r / S bytes and 4 r operations for each element.

    Args:
        shapes: of the 16-bit weights. copy: bytes/s, read and written together. rate: operations/s of a product.
    """
    moved, operations = 0.0, 0.0
    for (rows, cols), count in Counter(shapes).items():
        elements = rows * cols * count
        moved += (6 + 4 * rank / min(rows, cols)) * elements
        operations += 4 * rank * elements
    return max(moved / copy, operations / rate)
