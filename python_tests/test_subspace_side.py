"""Which side of a gradient is projected."""

from __future__ import annotations

import re

import pytest

from galore_kernels.subspace import PROJ_TYPES, Side, projection_side


@pytest.mark.parametrize(
    ("proj_type", "tall", "square", "wide"),
    [
        ("std", "right", "right", "left"),
        ("reverse_std", "left", "left", "right"),
        ("left", "left", "left", "left"),
        ("right", "right", "right", "right"),
        ("full", "full", "full", "full"),
    ],
)
def test_projection_side(proj_type: str, tall: Side, square: Side, wide: Side) -> None:
    assert projection_side(proj_type, 3, 2) == tall
    assert projection_side(proj_type, 2, 2) == square
    assert projection_side(proj_type, 2, 3) == wide


def test_projection_side_covers_proj_types() -> None:
    assert {projection_side(name, 1, 1) for name in PROJ_TYPES} == {"left", "right", "full"}


@pytest.mark.parametrize(
    ("proj_type", "hint"),
    [
        ("rigth", '; did you mean "right"?'),
        ("STD", '; did you mean "std"?'),
        ("reverse", '; did you mean "reverse_std"?'),
        ("qqq", ""),  # near nothing
        (None, ""),  # not a string: what a config file's null gives
    ],
)
def test_projection_side_unknown(proj_type: str, hint: str) -> None:
    shown = "None" if proj_type is None else f'"{proj_type}"'
    expected = f"proj_type={shown}: expected one of std, reverse_std, left, right, full{hint}"
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}$"):
        projection_side(proj_type, 2, 2)
