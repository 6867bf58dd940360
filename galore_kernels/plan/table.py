"""Plans side by side, for people: a table on the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from galore_kernels.plan.errors import PlanError
from galore_kernels.plan.estimate import Plan
from galore_kernels.plan.fit import Fit
from galore_kernels.plan.optimizers import OPTIMIZERS
from galore_kernels.plan.timeline import PARTS

__all__ = ["describe_fit", "modes", "new_table", "print_plans", "print_table", "title"]


def modes(plan: Plan) -> str:
    """What distinguishes a plan from others of the same model."""
    settings = plan.settings
    words = [f"{settings.weights} weights"]
    if OPTIMIZERS[plan.optimizer].projects:
        words.append(f"rank {settings.rank}")
    if settings.basis_format is not None:
        words.append(f"{settings.basis_format} basis")
    words += [word for word in (settings.gradients, settings.updates) if word not in ("dense", "whole")]
    return ", ".join(words)


def title(plan: Plan) -> str:
    """What all plans of a comparison have in common."""
    settings = plan.settings
    batch = "" if settings.sequence is None else f" ({settings.tokens // settings.sequence} x {settings.sequence})"
    checkpoints = "" if settings.checkpointing == "none" else ", activations checkpointed by layer"
    return (
        f"{settings.shape.name} Llama, {settings.shape.parameters / 1e6:,.0f} M parameters, {settings.tokens:,} "
        f"tokens{batch} on one device{checkpoints}"
    )


def gigabytes(count: int) -> str:
    """With three digits behind the point below 10 GB, else two."""
    return f"{count / 1e9:.3f}" if count < 10e9 else f"{count / 1e9:.2f}"


def new_table(title: str) -> Any:
    """rich's, of which nothing else is imported before a table is asked for.

    Raises:
        PlanError: it is not installed.
    """
    try:
        from rich.table import Table
    except ImportError as error:
        raise PlanError(f"the table needs the package rich ({error}): pip install rich, or pass --json") from error
    return Table(title=title, title_justify="left")


def print_table(table: Any, width: int) -> None:
    """As wide as the terminal, or where there is none as ``width``."""
    from rich.console import Console

    console = Console()
    (console if console.is_terminal else Console(width=width)).print(table)


def print_plans(plans: Sequence[Plan], budget: int | None = None) -> None:
    """A column for each plan; with a ``budget``, those above it in red.

    Raises:
        PlanError: rich is not installed.
    """
    table = new_table(f"{title(plans[0])}\nGB at the fullest moment of a step")
    table.add_column("")
    for plan in plans:
        table.add_column(f"{plan.label}\n{modes(plan)}", justify="right")
    for part in PARTS:
        if any(plan.parts[part] for plan in plans):
            table.add_row(part, *(gigabytes(plan.parts[part]) if plan.parts[part] else "" for plan in plans))
    table.add_section()
    over = [budget is not None and plan.peak > budget for plan in plans]
    peaks = [f"[red]{gigabytes(p.peak)}[/]" if o else gigabytes(p.peak) for p, o in zip(plans, over, strict=True)]
    table.add_row("peak", *peaks, style="bold")
    table.add_row("in GiB", *(f"{plan.peak / 2**30:.2f}" for plan in plans))
    table.add_row("when", *(plan.moment for plan in plans))
    print_table(table, width=40 + 26 * len(plans))


def describe_fit(fit: Fit, budget: int) -> str:
    """One line."""
    batch = ""
    if fit.unknown == "tokens" and fit.plan.settings.sequence is not None:
        batch = f" (batch {fit.value // fit.plan.settings.sequence} of {fit.plan.settings.sequence})"
    beyond = "the most there is"
    if fit.next_plan is not None:
        beyond = f"{fit.next_value:,} would take {gigabytes(fit.next_plan.peak)} GB"
    return (
        f"largest {fit.unknown} within {gigabytes(budget)} GB: {fit.value:,}{batch}, "
        f"which takes {gigabytes(fit.plan.peak)} GB; {beyond}"
    )
