"""What one training step sends: the collectives of DDP, of DDP that averages projections, of prepared layers, of FSDP2.

Notation: a projected matrix' gradient is (L, S), its projection (L, r), m n = L S; b columns in a block of a search.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch

from galore_kernels.plan.optimizers import Parameter
from galore_kernels.plan.settings import Settings
from galore_kernels.plan.shapes import LlamaShape, Matrix
from galore_kernels.subspace import block_columns, exchanged, is_thin

__all__ = [
    "PASSES",
    "SCHEMES",
    "Collective",
    "Scheme",
    "ddp_step",
    "in_backward",
    "merged",
    "payload",
    "sharded_step",
    "wire",
]

_FLOAT, _INTEGER = torch.float32.itemsize, torch.int64.itemsize

#: DDP's: the first bucket is small, so that its all-reduce begins early.
_FIRST_BUCKET, _BUCKET = 2**20, 25 * 2**20

#: How often each element passes over a process' link, but for the part that it has itself: 2 (N - 1) / N, (N - 1) / N.
PASSES = {"all_reduce": 2, "all_gather": 1, "reduce_scatter": 1}


@dataclass(frozen=True)
class Collective:
    """``calls`` of one kind of ``PASSES``. ``bytes``: of the tensor that each reduces, or gathers."""

    kind: str
    bytes: int
    calls: int = 1

    def wire(self, processes: int) -> float:
        """Bytes that each process sends, and receives, in a ring; no algorithm without reductions in switches does less
        (Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms for clusters of workstations", 2009)."""
        return self.calls * PASSES[self.kind] * (processes - 1) * self.bytes / processes


def merged(step: Iterable[Collective]) -> list[Collective]:
    """Calls of one kind and size together."""
    calls: Counter[tuple[str, int]] = Counter()
    for call in step:
        calls[call.kind, call.bytes] += call.calls
    return [Collective(*key, count) for key, count in calls.items()]


def payload(step: Iterable[Collective]) -> int:
    """Bytes that each process hands over."""
    return sum(call.calls * call.bytes for call in step)


def wire(step: Iterable[Collective], processes: int) -> float:
    """Bytes that each process sends."""
    return sum(call.wire(processes) for call in step)


# ------------------------------------------------------------------ what of one matrix is sent


@dataclass(frozen=True)
class Sent:
    """Of one parameter in one step. ``bucket``: elements in DDP's bucket, in the gradient's dtype. ``alone``: bytes of
    all-reduces of its own."""

    bucket: int
    alone: tuple[int, ...] = ()


def _whole(settings: Settings, matrix: Matrix) -> Sent:
    return Sent(matrix.numel)


def _projected(settings: Settings, matrix: Matrix) -> Sent:
    return Sent(settings.lowrank(matrix))


def _searched(settings: Settings, matrix: Matrix) -> Sent:
    """The search in the mean gradient, and R; or the gradient itself, if that is less."""
    (long, short), columns = settings.long_short(matrix), _columns(settings, matrix)
    if columns is None:
        return _whole(settings, matrix)
    numbers, lowrank = exchanged(long, short, columns), settings.lowrank(matrix)
    if not is_thin([numbers], lowrank, matrix.numel, settings.dtype.itemsize):
        return _whole(settings, matrix)
    return Sent(lowrank, tuple(_FLOAT * number for number in numbers))


def _factors_refreshed(settings: Settings, matrix: Matrix) -> Sent:
    """A prepared layer's, from X and dY: R as ever; which layer it is; the factors' magnitudes; and the search."""
    (long, short), columns = settings.long_short(matrix), _columns(settings, matrix)
    numbers = (matrix.numel,) if columns is None else exchanged(long, short, columns)[1:]
    return Sent(settings.lowrank(matrix), (3 * _INTEGER, 2 * _FLOAT, *(_FLOAT * number for number in numbers)))


def _columns(settings: Settings, matrix: Matrix) -> int | None:
    """b, or None where the decomposition is exact."""
    return block_columns(settings.long_short(matrix), settings.rank_of(matrix), "randomized")


@dataclass(frozen=True)
class Scheme:
    """What DDP averages of a projected matrix.

    Attributes:
        label: for tables.
        ordinary: in a step between two refreshes. refresh: in one that finds its basis.
        has_rank: the parameter that DDP knows is R's, not the matrix: buckets are of R.
    """

    label: str
    ordinary: Callable[[Settings, Matrix], Sent]
    refresh: Callable[[Settings, Matrix], Sent]
    has_rank: bool = False


SCHEMES: dict[str, Scheme] = {
    "full": Scheme("DDP", _whole, _whole),
    "lowrank": Scheme("reduce_lowrank", _projected, _searched),
    "factored": Scheme("prepared layers", _projected, _factors_refreshed, has_rank=True),
}
"""Plain DDP; ``galore_kernels.distributed.reduce_lowrank``; layers of ``prepare`` under plain DDP."""


# ------------------------------------------------------------------ DDP


def in_backward(shape: LlamaShape) -> list[Parameter]:
    """A Llama's parameters one by one as their gradients come, which is how DDP fills its buckets."""
    norm = Parameter(Matrix("norm", shape.hidden, 1), 1, False)
    q, k, v, o, gate, up, down = (Parameter(matrix, 1, True) for matrix in shape.linears())
    layer = [down, up, gate, norm, o, v, k, q, norm]
    embedding, *head = (Parameter(table, 1, False) for table in shape.tables())
    return [*head, norm, *(layer * shape.layers), embedding]


def ddp_step(
    settings: Settings, scheme: str, params: Sequence[Parameter], bucket_bytes: int | None = None
) -> list[Collective]:
    """The all-reduces of ``settings.step``; not the first step's, whose gradients DDP puts into one bucket.

    Args:
        scheme: of ``SCHEMES``. params: in the order of their gradients, ``count`` 1 each.
        bucket_bytes: DDP's ``bucket_cap_mb`` in bytes; None for its default.
    """
    rule, itemsize = SCHEMES[scheme], settings.dtype.itemsize
    projected = sorted((i for i, p in enumerate(params) if p.projected), key=lambda i: -params[i].matrix.numel)
    due = set(projected[: settings.due(len(projected))])
    limit = _FIRST_BUCKET if bucket_bytes is None else bucket_bytes
    calls: list[Collective] = []
    filled = held = 0
    for index, param in enumerate(params):
        how = _whole if not param.projected else rule.refresh if index in due else rule.ordinary
        sent = how(settings, param.matrix)
        held += sent.bucket * itemsize
        filled += itemsize * (sent.bucket if rule.has_rank else param.matrix.numel)
        calls += [Collective("all_reduce", size) for size in sent.alone]
        if filled >= limit:  # a bucket is closed by the parameter that fills it
            calls.append(Collective("all_reduce", held))
            filled, held, limit = 0, 0, bucket_bytes or _BUCKET
    return [*calls, Collective("all_reduce", held)] if filled else calls


def mean_over_gap(settings: Settings, of_step: Callable[[Settings], float]) -> float:
    """What ``of_step`` says of a step, averaged over the ``update_proj_gap`` steps of which one refreshes each basis.

    Exact where it is linear in what is sent, whatever the schedule; "adaptive" refreshes more or less often.
    """
    periodic = replace(settings, refresh_schedule="periodic")
    ordinary, refresh = (of_step(replace(periodic, step=step)) for step in ("ordinary", "refresh"))
    return ordinary + (refresh - ordinary) / settings.update_proj_gap


# ------------------------------------------------------------------ FSDP2


def sharded_step(settings: Settings, shape: LlamaShape, processes: int, *, lowrank: bool) -> list[Collective]:
    """``fully_shard`` of each layer and of the model, in ``settings.step``.

    A layer's weights are gathered before its forward and its backward pass, those of the rest once (PyTorch leaves the
    root's there), and every gradient is scattered. Rows are dealt out, filled up to the same number for each process.

    Args:
        lowrank: with an optimizer that projects. On the right side a process' rows of G are its rows of R, on the left
            R, (L, r) float32, is a sum over processes: one all-reduce of all that are not refreshed. In a refresh the
            processes search together, and sum R of each matrix by itself.
    """

    def padded(matrices: Iterable[Matrix]) -> int:
        rows = ((-(-matrix.rows // processes) * processes, matrix.cols) for matrix in matrices)
        return sum(m * n for m, n in rows) * settings.dtype.itemsize

    norm = Matrix("norm", shape.hidden, 1)
    layer, root = padded([*shape.linears(), norm, norm]), padded([*shape.tables(), norm])
    each = [Collective("all_gather", layer), Collective("all_gather", layer), Collective("reduce_scatter", layer)]
    calls = [*each * shape.layers, Collective("all_gather", root), Collective("reduce_scatter", root)]
    if not lowrank:
        return calls
    matrices = sorted(shape.linears() * shape.layers, key=lambda matrix: -matrix.numel)
    due = settings.due(len(matrices))
    calls += [
        Collective("all_reduce", size) for matrix in matrices[:due] for size in _sharded_refresh(settings, matrix)
    ]
    left = [settings.lowrank(matrix) for matrix in matrices[due:] if settings.side(matrix) == "left"]
    return [*calls, Collective("all_reduce", sum(left) * _FLOAT)] if left else calls


def _sharded_refresh(settings: Settings, matrix: Matrix) -> list[int]:
    """The search, with the square of the norm in float64; on the left R."""
    (long, short), columns = settings.long_short(matrix), _columns(settings, matrix)
    numbers = (1, matrix.numel) if columns is None else exchanged(long, short, columns)
    lowrank = [settings.lowrank(matrix)] if settings.side(matrix) == "left" else []
    return [torch.float64.itemsize, *(_FLOAT * number for number in (*numbers, *lowrank))]
