"""Trainer runs that are killed and resumed, for ``test_trainer_resume.py``: ``trainer_process.py FOLDER CASE ...``

Every run is a fork of this process, in which nothing has been trained: so that each begins as a process of its own
does, and all share what importing takes. Writes FOLDER/CASE-RUN.pt for the runs "whole" and "resumed".
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from hf_models import RANK, TARGETS, arguments, llama, trained
from torch import nn
from transformers import TrainerCallback

from galore_kernels import prepare
from galore_kernels.integrations.huggingface import trainer_optimizer

#: TrainingArguments, options of trainer_optimizer, options of prepare.
Case = tuple[dict[str, Any], dict[str, Any], dict[str, Any] | None]

SCHEDULE = {"lr_scheduler_type": "cosine", "warmup_steps": 2, "weight_decay": 0.1}
CASES: dict[str, Case] = {
    "8bit": (SCHEDULE, {}, None),
    "accumulation": ({**SCHEDULE, "gradient_accumulation_steps": 2, "max_grad_norm": 0.5}, {}, None),
    "float32": (
        SCHEDULE,
        {"optimizer": "GaLoreFusedAdamW", "refresh_schedule": "adaptive", "async_refresh": True},
        None,
    ),
    "APOLLO": (SCHEDULE, {"optimizer": "APOLLOFusedAdam8bit", "refresh_schedule": "staggered"}, None),
    "Adafactor": (SCHEDULE, {"optimizer": "GaLoreFusedAdafactor"}, None),
    "auto ranks": (SCHEDULE, {"rank": "auto", "rank_budget": 120_000}, None),
    "layerwise": ({**SCHEDULE, "max_grad_norm": 0.5}, {"layerwise": True}, None),
    "prepared": (SCHEDULE, {}, {}),
    "int8 weights": (SCHEDULE, {}, {"weights": "int8"}),
}
KILLED_AT = 5
SAVED_AT = 3


class Kill(TrainerCallback):
    """Kills the process in mid-training."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == KILLED_AT:
            os.kill(os.getpid(), signal.SIGKILL)


def run(folder: Path, name: str, which: str) -> None:
    changes, options, preparation = CASES[name]
    model: nn.Module = llama()
    if preparation is not None:
        prepare(model, TARGETS, RANK, **preparation)
    output = folder / f"{name}-{which.replace('resumed', 'killed')}"
    args = arguments(output, max_steps=8, logging_steps=1, **changes)
    args.save_strategy, args.save_steps = "steps", SAVED_AT
    chosen = trainer_optimizer(args, target_modules=TARGETS, **{"rank": RANK, "update_proj_gap": 2, **options})
    if which == "resumed":
        trainer = trained(model, args, chosen, resume=str(output / f"checkpoint-{SAVED_AT}"))
    else:
        trainer = trained(model, args, chosen, callbacks=[Kill] if which == "killed" else [])
    assert trainer.optimizer is not None
    results = {"weights": model.state_dict(), "state": trainer.optimizer.state_dict()["state"]}
    torch.save({**results, "log": trainer.state.log_history}, folder / f"{name}-{which}.pt")


def forked(work: Callable[[], None]) -> int:
    """The exit status of a fork that does ``work``, or minus the signal that ended it."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException:
            sys.excepthook(*sys.exc_info())
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    for name in sys.argv[2:]:
        for which, expected in (("whole", 0), ("killed", -signal.SIGKILL), ("resumed", 0)):
            status = forked(lambda name=name, which=which: run(folder, name, which))  # type: ignore[misc]
            if status != expected:
                raise SystemExit(f"{name}, {which}: exit status {status}, expected {expected}")


if __name__ == "__main__":
    main()
