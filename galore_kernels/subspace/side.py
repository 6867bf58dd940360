"""Which side of a weight's gradient is projected."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Literal

Side = Literal["left", "right", "full"]

PROJ_TYPES: tuple[str, ...] = ("std", "reverse_std", "left", "right", "full")
"""The values of ``proj_type``; their names and meaning are galore_torch's."""


def unknown_choice(argument: str, value: object, choices: Sequence[str]) -> ValueError:
    """The error for an argument outside a closed list of names, with the nearest name if one is near."""
    shown = f'"{value}"' if isinstance(value, str) else repr(value)
    near = difflib.get_close_matches(str(value).lower(), choices, n=1)
    hint = f'; did you mean "{near[0]}"?' if near else ""
    return ValueError(f"{argument}={shown}: expected one of {', '.join(choices)}{hint}")


def projection_side(proj_type: str, rows: int, cols: int) -> Side:
    """Maps ``proj_type`` to the side of a (rows, cols) gradient that is projected.

    "left" projects rows: the basis is (rows, r) and R = G.T @ P is (cols, r). "right" projects columns: the
    basis is (cols, r) and R = G @ P is (rows, r). "full" projects both. ``std`` is right if rows >= cols,
    else left: it projects the smaller dimension, so the basis is the smaller one. ``reverse_std`` is the
    opposite.

    galore_torch decides ``reverse_std`` a second time, from the projected gradient's shape, and fails when
    rows < cols and rows <= r; here a side is decided once, from the weight's shape, and always works.

    Raises:
        ValueError: ``proj_type`` is none of ``PROJ_TYPES``.
    """
    if proj_type == "left":
        return "left"
    if proj_type == "right":
        return "right"
    if proj_type == "full":
        return "full"
    if proj_type == "std":
        return "right" if rows >= cols else "left"
    if proj_type == "reverse_std":
        return "left" if rows >= cols else "right"
    raise unknown_choice("proj_type", proj_type, PROJ_TYPES)
