"""What a GaLore step must move and compute on a GPU: the model behind the kernels' shapes. A prediction, not a result.

    python bench/gpu_model.py                        # the table, for every card and rank
    python bench/gpu_model.py --json bench/results/gpu_model.json

Everything is counted for each element of the weight (16-bit weights, gradients and bases, 8-bit moments), from the
tile sizes in ``csrc/cuda/tile.h``: a tile is 128 long rows, and 128 columns of the basis or 128 short columns.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

TILE = 128
RANKS = (64, 128, 256, 512, 1024)
APOLLO_RANKS = (1, 64, 128, 256, 512)

#: Long and short dimension, matrices: all of Llama-7B's.
SHAPES = ((4096, 4096, 128), (11008, 4096, 96))


@dataclass(frozen=True)
class Card:
    """Rates of a card, in bytes or operations a second.

    ``memory`` and ``tensor`` are measured on the H200 (a large copy; a large bf16 product by torch), the vendor's for
    the others. ``shared`` is 128 bytes a clock for each multiprocessor, and the instructions of as many threads.
    """

    name: str
    memory: float
    tensor: float
    shared: float


CARDS = (
    Card("RTX 4090", 1.0e12, 165e12, 128 * 128 * 2.5e9),
    Card("A100-80", 2.0e12, 312e12, 128 * 108 * 1.41e9),
    Card("H200", 4.3e12, 790e12, 128 * 132 * 1.755e9),
)


@dataclass(frozen=True)
class Traffic:
    """Bytes and operations for each weight element.

    Attributes:
        memory: through device memory. cache: through the second-level cache, which is all of it and what is read again.
        shared: read from and written to shared memory. operations: of the two products. instructions: of a thread.
    """

    memory: float
    cache: float
    shared: float
    operations: float
    instructions: float = 0.0


def moments_bytes(rank: int, short: int) -> float:
    """Both moments read and written: codes, and one absmax for 256 of them."""
    return 2 * 2 * (1 + 4 / 256) * rank / short


def one_pass(rank: int, long: int, short: int) -> Traffic:
    """One launch: gradient and weight once, the basis twice for each panel of 128 long rows."""
    memory = 2 + 2 + 2 + moments_bytes(rank, short) + 2 * rank / long
    again = 2 * 2 * rank / TILE
    # A warp's 16-deep step reads 6 x 512 bytes for 16 products of 16 x 8 x 16 where it has 64 x 32 results, and
    # 4 x 512 for 8 where it has 32 x 32. What is copied in is written once; weights are read, written and read.
    project, back_project = 2 * rank * 6 * 512 / (16 * 4096), 2 * rank * 4 * 512 / (8 * 4096)
    return Traffic(memory, memory + again, project + back_project + memory + again + 6, 4 * rank)


def four_launches(rank: int, long: int, short: int) -> Traffic:
    """project, lowrank_adam, back_project_update: R in fp32 and U in 16 bits go through device memory in between."""
    memory = 2 + 2 + 2 + moments_bytes(rank, short) + 2 * rank / long + (4 + 4 + 2 + 2) * rank / short
    rank_tiles = -(-rank // TILE)
    # The gradient once for each 128 columns of the basis; the basis for each tile of 128; U and the basis for each
    # tile of weights.
    again = 2 * (rank_tiles - 1) + 2 * rank / TILE + 2 * 2 * rank / TILE
    products = 2 * 2 * rank * 6 * 512 / (16 * 4096)
    staged = 2 * 4 * (1 + rank / short)  # the products, in fp32, on their way to whole rows
    return Traffic(memory, memory + again, products + memory + again + staged, 4 * rank)


def apollo(rank: int, long: int, short: int) -> tuple[Traffic, Traffic]:
    """apollo_update: project, and what follows, which can't begin before. No basis passes through any memory.

    The gradient is read twice, 8 bytes with the weight: how much of it is a step depends on a norm of the whole matrix
    (the limiter, and with "tensor" scaling the factor). With neither, a panel of long indices would be on its own and
    could keep its part of the gradient on chip, for 6 bytes: 128 rows of 4096 bf16 elements are 1 MB, which is a
    cluster's shared memory, not a multiprocessor's. That is not written.

    Drawing is counted from the compiled loop: 144 instructions for eight entries, of which the ten rounds of Philox are
    some 90, once for each tile of 128 long rows. A warp's 32 look-ups in a table in shared memory meet some bank 3.5
    times on average: 448 bytes' worth of time.
    """
    columns = -(-rank // 8) * 8
    rank_tiles = -(-rank // TILE)
    again = 2 * (rank_tiles - 1)  # of the gradient, for further columns of the basis
    entries = columns / TILE  # drawn for each element
    products = 2 * max(columns, 32) * 6 * 512 / (16 * 4096)  # a warp with any column works on 32
    gradient = 2 * rank_tiles + 2 + 2  # written; read for its squares, and these sums
    project = Traffic(
        memory=2 + 4 * rank / short,
        cache=2 + again + 4 * rank / short,
        shared=products + gradient + (2 + 448 / 32) * entries + 8 * rank / short,
        operations=2 * rank,
        instructions=18 * entries + 8 * rank_tiles,  # the rest: products, squares, copies
    )
    # Adam reads R and writes U, in fp32; row_norms reads both.
    rest = 2 + 2 + 2 + moments_bytes(rank, short) + 4 * 4 * rank / short
    return project, Traffic(memory=rest, cache=rest, shared=0, operations=0, instructions=10)


def apollo_row(card: Card, rank: int, long: int, short: int) -> dict[str, object]:
    """The model of the two phases of apollo_update, one after the other; the limit is the projection's."""
    phases = apollo(rank, long, short)
    times = [seconds(phase, card) for phase in phases]
    together = {key: sum(asdict(phase)[key] for phase in phases) for key in asdict(phases[0])}
    roofline = max((8 + 4 * rank / short) / card.memory, times[0]["tensor"])
    return {
        **_shape(card, rank, long, short),
        "path": "apollo",
        **together,
        "limit": max(times[0], key=lambda name: times[0][name]),
        "at_most_of_roofline": roofline / sum(max(each.values()) for each in times),
    }


def seconds(traffic: Traffic, card: Card) -> dict[str, float]:
    """Time for an element by each of the limits; the largest bounds it from below."""
    return {
        "memory": traffic.memory / card.memory,
        "tensor": traffic.operations / card.tensor,
        "shared": traffic.shared / card.shared,
        "instructions": traffic.instructions / card.shared,
    }


def _shape(card: Card, rank: int, long: int, short: int) -> dict[str, object]:
    return {"card": card.name, "rank": rank, "long": long, "short": short}


def rows() -> list[dict[str, object]]:
    """The model of every card, rank, path and shape."""
    found: list[dict[str, object]] = []
    for card in CARDS:
        for rank in RANKS:
            for long, short, _ in SHAPES:
                for path in (one_pass, four_launches) if rank <= TILE else (four_launches,):
                    traffic = path(rank, long, short)
                    times = seconds(traffic, card)
                    limit = max(times, key=lambda name: times[name])
                    roofline = max((6 + 4 * rank / short) / card.memory, times["tensor"])
                    found.append(
                        {
                            **_shape(card, rank, long, short),
                            "path": path.__name__,
                            **asdict(traffic),
                            "limit": limit,
                            "at_most_of_roofline": roofline / times[limit],
                        }
                    )
        found += [apollo_row(card, rank, *shape[:2]) for rank in APOLLO_RANKS for shape in SHAPES]
    return found


def main() -> int:
    """Prints the table, and writes the JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    model = rows()
    table = Table(title="bytes and operations for each weight element; a prediction, nothing here was measured")
    for column in (
        "card",
        "rank",
        "long x short",
        "path",
        "memory B",
        "cache B",
        "shared B",
        "flop",
        "limit",
        "roofline",
    ):
        table.add_column(column)
    for row in model:
        numbers = [f"{row[name]:.2f}" for name in ("memory", "cache", "shared")]
        share = f"<= {row['at_most_of_roofline']:.0%}"
        shape = f"{row['long']} x {row['short']}"
        flop, limit = str(row["operations"]), str(row["limit"])
        table.add_row(str(row["card"]), str(row["rank"]), shape, str(row["path"]), *numbers, flop, limit, share)
    Console(width=120).print(table)
    if options.json:
        options.json.write_text(json.dumps({"kind": "model, not measured", "rows": model}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
