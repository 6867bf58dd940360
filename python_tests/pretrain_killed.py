"""galore-pretrain of which one process is killed: ``pretrain_killed.py MOMENT ARGUMENTS...``, under torchrun."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from typing import Any

import torch.distributed.checkpoint.state_dict as dcp
from kills import kill_at, kill_in_backward

from galore_kernels import checkpoint
from galore_kernels.pretrain import main

IN_STEP = 7


def _in_backward() -> None:
    train: Any = importlib.import_module("galore_kernels.pretrain.train")  # the package has a function of that name
    build = train.build_model

    def watched(config: Any, vocabulary: int) -> Any:
        model: Any = build(config, vocabulary)
        kill_in_backward(model.model.layers[0], call=IN_STEP * config.accumulate)
        return model

    train.build_model = watched


#: The moment -> the process that is killed, how, and the step that a later run goes on from. Of saves it is the second.
KILLS: dict[str, tuple[int, Callable[[], None], int]] = {
    "backward": (1, _in_backward, 5),
    "gather": (1, lambda: kill_at(dcp, "get_model_state_dict", call=2), 5),
    "written": (0, lambda: kill_at(checkpoint, "_check_loadable", call=2, after=True), 5),
    "replaced": (0, lambda: kill_at(checkpoint, "fsync_folder", call=2), 10),
}


def prepare(moment: str, rank: int) -> None:
    """Has this process be killed then, if it is the one."""
    killed, install, _ = KILLS[moment]
    if rank == killed:
        install()


if __name__ == "__main__":
    prepare(sys.argv[1], int(os.environ["RANK"]))
    sys.exit(main(sys.argv[2:]))
