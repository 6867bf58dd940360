"""A ``Scaling`` for people: tables on the terminal, and a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from galore_kernels.plan.network import GPUS_PER_NODE, NETWORKS, seconds, tokens_that_hide
from galore_kernels.plan.plot import new_figure, save_figure
from galore_kernels.plan.scaling import Scaling
from galore_kernels.plan.table import new_table, print_table
from galore_kernels.plan.wire import SCHEMES, wire

__all__ = [
    "beyond_a_node",
    "gigabytes",
    "hidden_cells",
    "milliseconds",
    "plot_scaling",
    "print_scaling",
    "scaling_tables",
    "sharded_cells",
]


@dataclass(frozen=True)
class View:
    """A table of text; the first column names its rows."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def scaling_tables(own: Scaling, gpus: Sequence[int]) -> list[View]:
    """What is sent, and how long that takes: of DDP, and of what ``settings.gradients`` says; and of FSDP2."""
    settings = own.settings
    what = (
        f"{settings.shape.name} Llama, {_dtype(own)} gradients, rank {settings.rank}, bases found every "
        f"{settings.update_proj_gap} steps"
    )
    scheme = "factored" if settings.gradients == "factored" else "lowrank"
    networks = tuple(network.label for network in NETWORKS.values())
    return [
        View(
            f"{what}: GB that each process hands to all-reduces in a step",
            ("", "ordinary", "with refresh", "mean", "all-reduces", "embedding, head, norms"),
            tuple(_sent(own, name) for name in SCHEMES),
        ),
        View(
            f"{what}: milliseconds of communication in a step, DDP / {SCHEMES[scheme].label} mean (with refresh)",
            ("GPUs", "GB sent by each", *networks),
            (
                *(_times(own, scheme, count) for count in gpus),
                (f"hidden from tokens, {max(gpus):,} GPUs", "", *hidden_cells(own, scheme, max(gpus))),
            ),
        ),
        View(
            f"{what}: milliseconds of FSDP2's communication in a step, and what projections on the left side add",
            ("GPUs", "GB sent by each", *networks),
            tuple((f"{count:,}", *sharded_cells(own, count)) for count in gpus),
        ),
    ]


def _sent(own: Scaling, scheme: str) -> tuple[str, ...]:
    amounts = own.payload(scheme)
    sizes = (gigabytes(size) for size in (amounts.ordinary, amounts.refresh, amounts.mean))
    return SCHEMES[scheme].label, *sizes, str(own.calls(scheme)), f"{own.unprojected / amounts.ordinary:.0%}"


def _times(own: Scaling, scheme: str, count: int) -> tuple[str, ...]:
    cells = []
    for name in NETWORKS:
        full, ours = own.seconds("full", count, name), own.seconds(scheme, count, name)
        cells.append(f"{milliseconds(full.mean)} / {milliseconds(ours.mean)} ({milliseconds(ours.refresh)})")
    sizes = " / ".join(gigabytes(own.wire(name, count).mean) for name in ("full", scheme))
    return f"{count:,}", sizes, *beyond_a_node(count, cells)


def sharded_cells(own: Scaling, count: int) -> tuple[str, ...]:
    """FSDP2's GB and milliseconds on each network, and what the left side adds to them."""
    steps = [own.sharded(count, lowrank=lowrank) for lowrank in (False, True)]
    sizes = [wire(step, count) for step in steps]
    cells = []
    for network in NETWORKS.values():
        full, ours = (seconds(step, count, network) for step in steps)
        cells.append(f"{milliseconds(full)} + {milliseconds(ours - full)}")
    return f"{gigabytes(sizes[0])} + {gigabytes(sizes[1] - sizes[0])}", *beyond_a_node(count, cells)


def beyond_a_node(count: int, cells: list[str]) -> list[str]:
    """Within one, networks don't matter."""
    return cells if count > GPUS_PER_NODE else [f"NVLink: {cells[0]}", *[""] * (len(cells) - 1)]


def hidden_cells(own: Scaling, scheme: str, count: int) -> tuple[str, ...]:
    """Tokens of a GPU's batch from which the backward pass takes longer than communication, for each network."""

    def tokens(scheme: str, network: str) -> str:
        time = own.seconds(scheme, count, network).mean
        return f"{tokens_that_hide(time, own.settings.shape.parameters):,.0f}"

    return tuple(f"{tokens('full', name)} / {tokens(scheme, name)}" for name in NETWORKS)


def print_scaling(own: Scaling, gpus: Sequence[int]) -> None:
    """The tables on the terminal.

    Raises:
        PlanError: rich is not installed.
    """
    for view in scaling_tables(own, gpus):
        table = new_table(view.title)
        for index, name in enumerate(view.header):
            table.add_column(name, justify="right" if index else "left")
        for row in view.rows:
            table.add_row(*row)
        print_table(table, width=160)


def plot_scaling(owns: Sequence[Scaling], path: Path, gpus: Sequence[int]) -> None:
    """Time of communication against the number of GPUs, a panel for each network: DDP, and each of ``owns``' ranks.

    Raises:
        PlanError: matplotlib is not installed, or the file can't be written.
    """
    figure = new_figure(12, 3.8)
    panels = figure.subplots(1, len(NETWORKS), sharey=True)
    for axes, (name, network) in zip(panels, NETWORKS.items(), strict=True):
        full = [owns[0].seconds("full", count, name).mean for count in gpus]
        axes.plot(gpus, full, color="black", marker="o", markersize=3, label="DDP, whole gradients")
        for index, own in enumerate(owns):
            means = [own.seconds("lowrank", count, name).mean for count in gpus]
            axes.plot(gpus, means, color=f"C{index}", marker="o", markersize=3,
                      label=f"reduce_lowrank, rank {own.settings.rank}, mean")  # fmt: skip
        axes.axvline(GPUS_PER_NODE, color="gray", linewidth=0.8, linestyle=":")
        axes.set_xscale("log", base=2)
        axes.set_xticks(gpus[::3], [f"{count:,}" for count in gpus[::3]])
        axes.set_yscale("log")
        axes.set_title(network.label, fontsize=10)
        axes.set_xlabel("GPUs (8: NVLink alone)", fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    panels[0].set_ylabel("seconds of communication in a step")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    shape = owns[0].settings.shape
    figure.suptitle(
        f"{shape.name} Llama, {shape.parameters / 1e6:,.0f} M parameters, {_dtype(owns[0])} gradients: "
        "a model, nothing measured on a cluster",
        fontsize=11,
    )
    save_figure(figure, path)


def _dtype(own: Scaling) -> str:
    return str(own.settings.dtype).removeprefix("torch.")


def gigabytes(size: float) -> str:
    """Of bytes."""
    return f"{size / 1e9:,.2f}"


def milliseconds(time: float) -> str:
    """Of seconds: a tenth of one below a hundred."""
    return f"{time * 1e3:,.1f}" if time < 0.1 else f"{time * 1e3:,.0f}"
