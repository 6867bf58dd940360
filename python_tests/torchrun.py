"""torchrun, as a user calls it."""

from __future__ import annotations

import os
import subprocess
import sys


def torchrun(*arguments: str, world: int = 2) -> subprocess.CompletedProcess[str]:
    """The end of so many processes of a program (its path, or ``-m`` and its name) with its arguments."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, *arguments], capture_output=True, text=True, timeout=120, check=False, env=environment
    )
