"""Plans as stacked bars; how the planner's pictures are made."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from galore_kernels.plan.errors import PlanError
from galore_kernels.plan.estimate import Plan
from galore_kernels.plan.table import gigabytes, modes, title
from galore_kernels.plan.timeline import PARTS

__all__ = ["new_figure", "plot_plans", "save_figure"]


def new_figure(width: float, height: float) -> Any:
    """An empty figure of so many inches.

    Raises:
        PlanError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise PlanError(f"the picture needs the package matplotlib ({error}): pip install matplotlib") from error
    figure = Figure(figsize=(width, height), layout="constrained", dpi=120)
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Any, path: Path) -> None:
    """To a PNG, whole or not at all.

    Raises:
        PlanError: the file can't be written.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        figure.savefig(temporary, format="png")
        temporary.replace(path)
    except OSError as error:
        raise PlanError(f"--plot {path}: {error}; name a file in a folder that is there") from error


def plot_plans(plans: Sequence[Plan], path: Path, budget: int | None = None) -> None:
    """Draws a bar for each plan, cut into its parts, to a PNG; a ``budget`` is a line across them.

    Raises:
        PlanError: matplotlib is not installed, or the file can't be written.
    """
    figure = new_figure(11, 1.8 + 0.75 * len(plans))
    axes = figure.subplots()
    places = list(range(len(plans)))
    begins = [0.0] * len(plans)
    for index, part in enumerate(PARTS):
        sizes = [plan.parts[part] / 1e9 for plan in plans]
        if any(sizes):
            axes.barh(places, sizes, left=begins, color=f"C{index}", height=0.62, label=part)
        begins = [begin + size for begin, size in zip(begins, sizes, strict=True)]
    for place, plan in zip(places, plans, strict=True):
        axes.annotate(f"{gigabytes(plan.peak)} GB\n{plan.moment}", (plan.peak / 1e9, place), xytext=(5, 0),
                      textcoords="offset points", va="center", fontsize=8,
                      bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1})  # fmt: skip
    if budget is not None:
        axes.axvline(budget / 1e9, color="black", linestyle="--", linewidth=1, label=f"{gigabytes(budget)} GB")
    axes.set_yticks(places, [f"{plan.label}\n{modes(plan)}" for plan in plans], fontsize=9)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.3 * max(begins))
    axes.set_xlabel("GB at the fullest moment of a step")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", alpha=0.25)
    axes.set_axisbelow(True)
    figure.legend(loc="outside lower center", ncols=5, frameon=False, fontsize=9)
    figure.suptitle(title(plans[0]), fontsize=11)
    save_figure(figure, path)
