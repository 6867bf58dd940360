"""``python -m galore_kernels.plan``: the command line of the planner."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from galore_kernels.plan.errors import PlanError
from galore_kernels.plan.estimate import Plan, plan
from galore_kernels.plan.fit import SOLVABLE, Fit, parse_bytes, solve
from galore_kernels.plan.optimizers import OPTIMIZERS
from galore_kernels.plan.plot import plot_plans
from galore_kernels.plan.scaling import GPUS, Scaling, scaling
from galore_kernels.plan.scaling_view import plot_scaling, print_scaling
from galore_kernels.plan.settings import CHOICES, Settings
from galore_kernels.plan.shapes import MODELS
from galore_kernels.plan.table import describe_fit, print_plans
from galore_kernels.quantizers import BASIS_FORMATS

__all__ = ["main"]

#: What ``--compare`` puts beside the plan that was asked for, each with the modes in which it is used to save memory.
COMPARED: tuple[tuple[str, dict[str, str]], ...] = (
    ("adamw", {}),
    ("adamw8bit", {}),
    ("galore_torch8bit", {"updates": "layerwise"}),
    ("apollo_mini", {"updates": "layerwise"}),
    ("q_galore", {"weights": "int8", "updates": "layerwise"}),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status: 0, or 2 for something to put right, said on stderr."""
    try:
        _run(vars(_parser().parse_args(arguments)))
    except PlanError as error:
        print(f"galore_kernels.plan: {error}", file=sys.stderr)
        return 2
    return 0


def _run(given: dict[str, Any]) -> None:
    model, optimizers, unknown = given.pop("model"), given.pop("optimizer"), given.pop("solve")
    fit_text, reserve = given.pop("fit"), parse_bytes(given.pop("reserve"))
    compares, picture, as_json = given.pop("compare"), given.pop("plot"), given.pop("json")
    scales, gpus, bucket_mb = given.pop("scaling"), given.pop("gpus"), given.pop("bucket_cap_mb")
    if scales:
        if compares or unknown is not None or fit_text is not None:
            raise PlanError(
                "--scaling: expected none of --compare, --fit and --solve, which are of memory; leave them out"
            )
        _show_scaling(scaling(model, bucket_mb, **given), gpus or GPUS, picture, as_json)
        return
    if gpus is not None or bucket_mb is not None:
        raise PlanError("--gpus, --bucket-cap-mb: expected --scaling with them; add it")
    budget = None if fit_text is None else parse_bytes(fit_text) - reserve
    if unknown is not None and budget is None:
        raise PlanError(f"--solve {unknown}: expected --fit as well; say how much memory there is, as in --fit 24GB")
    if "batch" in given:
        if "sequence" not in given or "tokens" in given:
            raise PlanError("--batch: expected --sequence with it, and no --tokens, which are batch x sequence")
        given["tokens"] = given.pop("batch") * given["sequence"]
    plans: list[Plan] = []
    fits: list[Fit] = []
    for optimizer in optimizers:
        if unknown is None or budget is None:
            plans.append(plan(model, optimizer, **given))
        else:
            fits.append(solve(model, optimizer, unknown, budget, **given))
            plans.append(fits[-1].plan)
    if compares:
        common = {"rank": plans[0].settings.rank, "tokens": plans[0].settings.tokens}
        rest = {key: given[key] for key in ("sequence", "checkpointing", "device") if key in given}
        plans += [plan(model, name, **common, **rest, **own) for name, own in COMPARED if name not in optimizers]
    if as_json:
        found = [{"value": fit.value, "unknown": fit.unknown} for fit in fits]
        data = {"format": 1, "budget_bytes": budget, "plans": [p.to_dict() for p in plans], "fits": found}
        print(json.dumps(data, indent=1))
    else:
        print_plans(plans, budget)
        for fit in fits:
            print(f"{fit.plan.label}: {describe_fit(fit, budget or 0)}")
    if picture is not None:
        plot_plans(plans, picture, budget)


def _show_scaling(own: Scaling, gpus: Sequence[int], picture: Path | None, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"format": 1, **own.to_dict(gpus)}, indent=1))
    else:
        print_scaling(own, gpus)
    if picture is not None:
        plot_scaling([own], picture, gpus)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m galore_kernels.plan",
        description="Predicts the peak memory of one training step of a Llama on one device, by part; or, with "
        "--scaling, what several processes send in it.",
        epilog="Counted are tensors; what CUDA and its libraries take for themselves, and what an allocator can't use "
        "again, is --reserve.",
        argument_default=argparse.SUPPRESS,
    )
    what = parser.add_argument_group("what is trained, and how")
    what.add_argument("--model", default="7b", help=f"{', '.join(MODELS)}, or the path of a config.json (default: 7b)")
    what.add_argument("--optimizer", nargs="+", default=["galore8bit"], metavar="NAME",
                      help=f"one or more of {', '.join(OPTIMIZERS)} (default: galore8bit)")  # fmt: skip
    what.add_argument("--rank", type=int, help="of the projections (default: 128)")
    for key in ("weights", "gradients", "updates", "checkpointing"):
        what.add_argument(
            f"--{key}", choices=CHOICES[key], help=f"default: {Settings.__dataclass_fields__[key].default}"
        )
    what.add_argument("--tokens", type=int, help="in a micro-batch (default: 2048)")
    what.add_argument("--batch", type=int, help="sequences in a micro-batch, instead of --tokens")
    what.add_argument("--sequence", type=int, help="tokens in a sequence")
    what.add_argument("--basis-format", choices=BASIS_FORMATS, help="default: the weights' dtype")
    what.add_argument("--refresh-schedule", choices=CHOICES["refresh_schedule"], help="default: periodic")
    what.add_argument("--update-proj-gap", type=int, help="steps between refreshes (default: 200)")
    what.add_argument("--step", choices=CHOICES["step"], help="default: the one that takes more")
    what.add_argument("--device", choices=CHOICES["device"], help="whose workspaces are counted (default: cuda)")
    fits = parser.add_argument_group("what fits")
    fits.add_argument("--fit", default=None, metavar="SIZE", help="memory of the device: 24GB, 16GiB, ...")
    fits.add_argument("--solve", choices=SOLVABLE, default=None, help="the largest rank, or the most tokens, that fit")
    fits.add_argument("--reserve", default="1GB", metavar="SIZE",
                      help="part of it that tensors can't have (default: 1GB)")  # fmt: skip
    sends = parser.add_argument_group("what several processes send")
    sends.add_argument("--scaling", action="store_true", default=False,
                       help="bytes and time of communication instead of memory: DDP against projections of --rank, or "
                       "with --gradients factored prepared layers; a model (docs/scaling.md)")  # fmt: skip
    sends.add_argument("--gpus", type=int, nargs="+", default=None, metavar="N", help="default: 8, 16, ..., 4096")
    sends.add_argument("--bucket-cap-mb", type=float, default=None, help="DDP's (default: 25)")
    shown = parser.add_argument_group("what is shown")
    shown.add_argument("--compare", action="store_true", default=False, help="other optimizers beside it")
    shown.add_argument("--plot", type=Path, default=None, metavar="FILE", help="draw the plans to a PNG")
    shown.add_argument("--json", action="store_true", default=False, help="print JSON instead of a table")
    return parser
