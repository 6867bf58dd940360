"""How long collectives take: a model of nodes of eight GPUs, and what is assumed of the links between them.

Nothing here was measured by this project. A collective is hierarchical: within each node over NVLink, across nodes in
as many groups as a node has GPUs, each with its part, which share what the node sends. In chunks, as NCCL's, so that
both kinds of links are busy at once, and the slower one counts. Then, with g GPUs in each of n nodes, B bytes, p passes
(2 of an all-reduce, else 1), bandwidths in bytes per second and one direction:

    launch + p (max((g - 1) / g B / nvlink, across) + (g - 1) latency_nvlink + steps latency)
    across = (n - 1) / n B / node, steps = n - 1 of a ring, or B / node, ceil(log2 n) of a tree: the faster one

A tree here is NCCL's double binary one, in which each node sends, and receives, everything once in each pass.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from galore_kernels.plan.errors import PlanError
from galore_kernels.plan.wire import PASSES, Collective

__all__ = ["GPUS_PER_NODE", "NETWORKS", "Network", "check_gpus", "seconds", "tokens_that_hide"]

GPUS_PER_NODE = 8

# NVLink 4 carries 450 GB/s in each direction, of which NCCL's rings reach 370 (its author, NVIDIA/nccl-tests issue 212;
# with reductions in the switches an all-reduce is faster still). Latencies of a step, and of a call, are those that
# NCCL's own model of its rings has (NVIDIA/nccl, src/graph/tuning.cc, protocol "Simple").
_NVLINK = 370e9
_NVLINK_LATENCY = 3.4e-6
_LAUNCH = 8.4e-6

#: Of what an Ethernet's line carries; an assumption.
_ETHERNET_SHARE = 0.9
#: One way through two TCP stacks (10 to 30 microseconds each are reported), and NCCL's thread; an assumption.
_ETHERNET_LATENCY = 40e-6

# 989 TFLOP/s dense in bfloat16 is an H100's specification, two fifths of it a usual part; an assumption.
_FLOPS = 0.4 * 989e12


@dataclass(frozen=True)
class Network:
    """Between nodes. ``label``: for tables. ``node``: bytes per second that a node sends, and receives. ``latency``: of
    a step, in seconds."""

    label: str
    node: float
    latency: float


def _ethernet(gigabits: int) -> Network:
    return Network(f"{gigabits} GbE", _ETHERNET_SHARE * gigabits * 1e9 / 8, _ETHERNET_LATENCY)


#: 400 Gb/s for each GPU, of which 46 to 48 GB/s are to be expected (NVIDIA/nccl-tests issue 290), latency as above; and
#: one Ethernet port for a node's eight.
NETWORKS: dict[str, Network] = {
    "infiniband": Network("InfiniBand NDR", GPUS_PER_NODE * 47e9, 9.6e-6),
    "100gbe": _ethernet(100),
    "25gbe": _ethernet(25),
    "10gbe": _ethernet(10),
}


def seconds(step: Iterable[Collective], processes: int, network: Network) -> float:
    """Of all collectives one after another, none of it hidden behind computation.

    Args:
        processes: GPUs; up to eight are in one node, where ``network`` doesn't matter.

    Raises:
        PlanError: as of ``check_gpus``.
    """
    check_gpus(processes)
    if processes == 1:
        return 0.0
    within, nodes = min(processes, GPUS_PER_NODE), max(1, processes // GPUS_PER_NODE)
    return sum(call.calls * _seconds(PASSES[call.kind], call.bytes, within, nodes, network) for call in step)


def check_gpus(count: int) -> None:
    """Raises PlanError unless there can be so many: in one node, or filling several."""
    if count < 1 or (count > GPUS_PER_NODE and count % GPUS_PER_NODE):
        raise PlanError(f"gpus={count}: expected 1 to {GPUS_PER_NODE}, or a multiple of it; fill the nodes")


def _seconds(passes: int, size: int, within: int, nodes: int, network: Network) -> float:
    inside = (within - 1) / within * size / _NVLINK
    waiting = (within - 1) * _NVLINK_LATENCY
    ring = max(inside, (nodes - 1) / nodes * size / network.node) + (nodes - 1) * network.latency
    tree = max(inside, size / network.node) + math.ceil(math.log2(nodes)) * network.latency
    return _LAUNCH + passes * (waiting + (ring if nodes == 1 else min(ring, tree)))


def tokens_that_hide(communication: float, parameters: int) -> float:
    """Tokens of a process' batch from which the backward pass, 4 operations for each parameter and token, takes longer
    than ``communication`` seconds, which DDP overlaps with it."""
    return communication * _FLOPS / (4 * parameters)
