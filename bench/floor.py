"""What an update must move and compute, what the machine can do, and the time below which nothing can go.

The floor of an implementation is ``max(bytes / bandwidth, operations / rate)``: its bytes and operations
are counted from shapes by :func:`galore_work` and its siblings, bandwidth and rate are measured in the same
process by :func:`measure_limits`. Whatever an implementation moves beyond the count (temporaries, another
read of the gradient, a basis read once per panel) is its own loss and shows as a smaller fraction.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from harness import Clock

BLOCK = 256
#: Bytes of one element of one moment, without its share of the absmax; "param" means the weight's own dtype.
STATE_FORMATS = ("8bit", "fp32", "param", "none")

Shape = tuple[int, int]


@dataclass(frozen=True)
class Work:
    """Bytes that must cross the memory bus (each tensor once per direction) and floating-point operations.

    ``operations`` counts the matrix products only (2 per multiply-add). Adam's elementwise arithmetic,
    some 15 operations per element of the moments, is left out: the products' rate says nothing of it.
    """

    bytes_read: int
    bytes_written: int
    operations: int

    def __add__(self, other: Work) -> Work:
        return Work(
            self.bytes_read + other.bytes_read,
            self.bytes_written + other.bytes_written,
            self.operations + other.operations,
        )

    @property
    def bytes_moved(self) -> int:
        """Read and written together."""
        return self.bytes_read + self.bytes_written


ZERO = Work(0, 0, 0)


def orient(shape: Shape) -> tuple[int, int, str]:
    """(long, short, side) of a matrix under proj_type "std": right if rows >= columns, else left."""
    rows, cols = shape
    return (rows, cols, "right") if rows >= cols else (cols, rows, "left")


def moments_bytes(numel: int, state: str, itemsize: int) -> int:
    """Bytes of both moments of ``numel`` elements in one of ``STATE_FORMATS``, absmax included."""
    if state == "8bit":
        return 2 * (numel + 4 * math.ceil(numel / BLOCK))
    element = {"fp32": 4, "param": itemsize, "none": 0}
    if state not in element:
        raise ValueError(f"state={state!r}: expected one of {', '.join(STATE_FORMATS)}")
    return 2 * numel * element[state]


def adam_work(shape: Shape, itemsize: int, state: str) -> Work:
    """Full-rank Adam: read weight and gradient, read and write both moments, write the weight."""
    numel = shape[0] * shape[1]
    moments = moments_bytes(numel, state, itemsize)
    return Work(2 * numel * itemsize + moments, numel * itemsize + moments, 0)


def galore_work(shape: Shape, rank: int, itemsize: int, state: str) -> Work:
    """The fused step: read G, W, P and the moments; write W and the moments; ``G @ P`` and ``U @ P.T``."""
    long, short, _ = orient(shape)
    moments = moments_bytes(long * rank, state, itemsize)
    read = (2 * long * short + short * rank) * itemsize + moments
    return Work(read, long * short * itemsize + moments, 4 * long * short * rank)


def adafactor_work(shape: Shape, rank: int | None, itemsize: int) -> Work:
    """GaLore's step with Adafactor, or Adafactor's own: the moments are the means of L rows and r columns in float32.

    At full rank those of m rows and n columns, and no product.
    """
    plain = adam_work(shape, itemsize, "none") if rank is None else galore_work(shape, rank, itemsize, "none")
    means = 4 * (sum(shape) if rank is None else orient(shape)[0] + rank)
    return plain + Work(means, means, 0)


def lowrank_work(shape: Shape, rank: int, itemsize: int, state: str) -> Work:
    """The step that starts at R: read R, W, P and the moments; write W and the moments; ``U @ P.T`` alone."""
    long, short, _ = orient(shape)
    moments = moments_bytes(long * rank, state, itemsize)
    read = (long * rank + long * short + short * rank) * itemsize + moments
    return Work(read, long * short * itemsize + moments, 2 * long * short * rank)


def apollo_work(shape: Shape, rank: int, itemsize: int, state: str) -> Work:
    """APOLLO's step: read G twice, W and the moments; write W and the moments; ``G @ P`` alone.

    Four times a 16-bit weight, 8 bytes per element: the norm-growth limiter needs the whole matrix' scaled gradient
    before the first weight may change, and by then a large gradient has left the cache. One that stays in it can come
    out below this floor. The basis is drawn from a seed, which moves no byte; who keeps one reads it besides.
    """
    long, short, _ = orient(shape)
    moments = moments_bytes(long * rank, state, itemsize)
    full = long * short * itemsize
    return Work(3 * full + moments, full + moments, 2 * long * short * rank)


def products_work(shape: Shape, rank: int, itemsize: int, count: int) -> Work:
    """``count`` = 2: ``G @ P``, then ``R @ P.T``; 1: the second alone. Each writes its result."""
    long, short, _ = orient(shape)
    full, thin = long * short * itemsize, long * rank * itemsize
    back = Work(thin + short * rank * itemsize, full, 2 * long * short * rank)
    return back if count == 1 else back + Work(full, thin, 2 * long * short * rank)


@dataclass(frozen=True)
class Limits:
    """Measured limits of this machine, in this process, with these threads.

    Attributes:
        bandwidth: bytes/s, the best of the four below: a floor must hold for any mix of reads and writes.
        copy, read, add, scale: bytes/s of ``b.copy_(a)`` (1 read, 1 write), ``a.sum()`` (reads only),
            ``b.add_(a)`` (2 reads, 1 write: the update's own mix) and ``b.mul_(1)`` (writes where it read).
        rate: operations/s of ``torch.matmul`` per dtype name, the best of several shapes.
    """

    bandwidth: float
    copy: float
    read: float
    add: float
    scale: float
    rate: dict[str, float]

    def as_dict(self) -> dict[str, object]:
        """Plain data for the JSON."""
        return asdict(self)


def floor_seconds(work: Work, limits: Limits, dtype: str) -> float:
    """``max(bytes / bandwidth, operations / rate)``."""
    return max(work.bytes_moved / limits.bandwidth, work.operations / limits.rate[dtype])


def measure_limits(clock: Clock, dtypes: list[torch.dtype], *, buffer_bytes: int, gemm_size: int) -> Limits:
    """Measures bandwidth over buffers that no cache holds, and torch's rate of matrix products.

    Args:
        clock: the device's clock; buffers are made on its device.
        dtypes: dtypes whose product rate is wanted.
        buffer_bytes: size of one buffer; the caller takes several times the last-level cache.
        gemm_size: n of the square products; skinny ones (n x n by n x n/8) are tried too.
    """
    device = clock.device
    source = torch.ones(buffer_bytes // 4, dtype=torch.float32, device=device)
    target = torch.zeros_like(source)
    size = source.numel() * 4
    copy = 2 * size / _best(clock, lambda: target.copy_(source))
    read = size / _best(clock, lambda: source.sum())
    add = 3 * size / _best(clock, lambda: target.add_(source, alpha=1e-9))
    scale = 2 * size / _best(clock, lambda: target.mul_(1.0))
    rate = {}
    for dtype in dtypes:
        rates = []
        for n in (gemm_size, max(gemm_size // 8, 1)):
            # Random: a GPU draws less power on ones, and clocks higher than it ever does on numbers.
            a = torch.randn(gemm_size, gemm_size, device=device, dtype=dtype)
            b = torch.randn(gemm_size, n, device=device, dtype=dtype)
            out = torch.empty(gemm_size, n, device=device, dtype=dtype)
            rates.append(2 * gemm_size * gemm_size * n / _best(clock, _product(a, b, out)))
        rate[dtype_name(dtype)] = max(rates)
    return Limits(max(copy, read, add, scale), copy, read, add, scale, rate)


def dtype_name(dtype: torch.dtype) -> str:
    """ "fp32", "bf16" or "fp16"."""
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]


def _product(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor):  # type: ignore[no-untyped-def]
    return lambda: torch.matmul(a, b, out=out)


def _best(clock: Clock, call, repeats: int = 11) -> float:  # type: ignore[no-untyped-def]
    # The minimum: a limit is what the machine can do, not what it usually does beside its other work.
    call()
    return min(clock.seconds(call) for _ in range(repeats))
