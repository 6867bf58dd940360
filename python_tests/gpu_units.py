"""What gpu_measure.py writes, made up for the tests of what is done with it."""

from __future__ import annotations

from typing import Any

from gpu_plan import DRY_RUN


def correctness(**figures: Any) -> dict[str, Any]:
    """A unit in which every figure is as it should be, but for the given ones."""
    good = {
        "codes_equal": 0.9999,
        "codes_apart": 1,
        "weights_beyond_two_ulps_and_the_directions_rounding": 0,
        "weights_finite": True,
        "bit_identical": True,
    }
    cases = [{"backend": backend, **good, **figures} for backend in DRY_RUN.ours]
    return {"status": "ok", "cases": cases, "left_out": {}, "refused": {}}
