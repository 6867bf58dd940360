"""The error of this package."""

from __future__ import annotations

__all__ = ["PlanError"]


class PlanError(ValueError):
    """Something the user can put right: an option out of range, options that exclude one another, a bad file."""
