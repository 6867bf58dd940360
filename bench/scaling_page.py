"""Tables and picture of ``docs/scaling.md``: what data-parallel training sends, by model, rank and number of GPUs.

``python bench/scaling_page.py`` writes them anew between the page's markers, and ``docs/scaling.png``. Nothing is run:
they are the planner's (``python -m galore_kernels.plan --scaling``).
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from galore_kernels.plan import Scaling, scaling
from galore_kernels.plan.network import NETWORKS
from galore_kernels.plan.scaling import GPUS
from galore_kernels.plan.scaling_view import (
    beyond_a_node,
    gigabytes,
    hidden_cells,
    milliseconds,
    plot_scaling,
    sharded_cells,
)

PAGE = Path(__file__).resolve().parent.parent / "docs" / "scaling.md"
BEGIN, END = "<!-- by bench/scaling_page.py -->\n", "<!-- end -->\n"

#: The GaLore paper's rank of 7B, a quarter of the hidden width, and that share of the others; and two small ones.
RANKS = {"7b": (128, 256, 1024), "13b": (128, 256, 1280), "70b": (128, 256, 2048)}
COUNTS = (8, 64, 512, 4096)
LABELS = [network.label for network in NETWORKS.values()]


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """GitHub's Markdown."""
    lines = [header, ("---",) + ("---:",) * (len(header) - 1), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def all_models() -> list[list[Scaling]]:
    """For each model one for each rank."""
    return [[scaling(model, rank=rank) for rank in ranks] for model, ranks in RANKS.items()]


def payloads(models: list[list[Scaling]]) -> str:
    """What each process hands over."""
    rows = []
    for owns in models:
        for own in owns:
            full, ours = own.payload("full").mean, own.payload("lowrank")
            rows.append((
                own.settings.shape.name,
                str(own.settings.rank),
                *map(gigabytes, (full, ours.ordinary, ours.refresh, ours.mean)),
                f"{full / ours.mean:.1f}",
                f"{own.unprojected / ours.ordinary:.0%}",
                gigabytes(own.payload("factored").refresh),
                " / ".join(str(own.calls(scheme)) for scheme in ("full", "lowrank", "factored")),
            ))  # fmt: skip
    header = ("", "rank", "DDP", "ordinary", "with refresh", "mean", "DDP / mean", "not projected",
              "refresh of prepared layers", "all-reduces")  # fmt: skip
    return table(header, rows)


def times(owns: list[Scaling]) -> str:
    """Of one model, milliseconds: DDP and each rank."""
    rows = []
    for count in COUNTS:
        sent = [owns[0].wire("full", count), *(own.wire("lowrank", count) for own in owns)]
        cells = []
        for name in NETWORKS:
            each = [owns[0].seconds("full", count, name), *(own.seconds("lowrank", count, name) for own in owns)]
            cells.append(" / ".join(milliseconds(amounts.mean) for amounts in each))
        sizes = " / ".join(gigabytes(amounts.mean) for amounts in sent)
        rows.append((f"{count:,}", sizes, *beyond_a_node(count, cells)))
    return table(("GPUs", "GB sent by each", *LABELS), rows)


def hidden(models: list[list[Scaling]], count: int) -> str:
    """Tokens of a GPU's batch from which the backward pass takes longer."""
    rows = [
        (f"{own.settings.shape.name}, DDP / rank {own.settings.rank}", *hidden_cells(own, "lowrank", count))
        for *_, own in models
    ]
    return table(("", *LABELS), rows)


def buckets(owns: list[Scaling], count: int) -> str:
    """Milliseconds over InfiniBand with DDP's own buckets, and with larger ones."""
    rows = []
    for own in owns:
        cells = []
        for size in (None, 100, 500):
            other = Scaling(own.settings, size)
            time = milliseconds(other.seconds("lowrank", count, "infiniband").mean)
            cells.append(f"{time} ({other.calls('lowrank')})")
        rows.append((f"{own.settings.shape.name}, rank {own.settings.rank}", *cells))
    return table(("", "25 MiB", "100 MiB", "500 MiB"), rows)


def sharded(models: list[list[Scaling]]) -> str:
    """FSDP2, and what the left side adds."""
    rows = [
        (f"{own.settings.shape.name}, rank {own.settings.rank}, {count:,} GPUs", *sharded_cells(own, count))
        for *_, own in models
        for count in COUNTS
    ]
    return table(("", "GB sent by each", *LABELS), rows)


def sections() -> list[str]:
    """The tables, in the page's order."""
    models = all_models()
    return [
        payloads(models),
        *(times(owns) for owns in models),
        buckets(models[0], 4096),
        hidden(models, 64),
        sharded(models),
    ]


def filled(page: str) -> str:
    """The page with its tables anew.

    Raises:
        ValueError: it has not as many places for them as there are.
    """
    found = sections()
    head, *rest = page.split(BEGIN)
    if len(rest) != len(found):
        raise ValueError(f"{PAGE.name}: expected {len(found)} places for tables, got {len(rest)}; add {BEGIN!r}")
    return head + "".join(
        BEGIN + section + END + part.split(END, 1)[1] for section, part in zip(found, rest, strict=True)
    )


def main() -> int:
    """Writes page and picture."""
    PAGE.write_text(filled(PAGE.read_text()))
    plot_scaling([scaling("7b", rank=rank) for rank in (128, 1024)], PAGE.with_suffix(".png"), GPUS)
    return 0


if __name__ == "__main__":
    sys.exit(main())
