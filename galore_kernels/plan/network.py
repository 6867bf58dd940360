"""How long collectives take: a model of nodes of eight GPUs, and what is assumed of the links between them.

Nothing here was measured by this project. A collective is hierarchical: within each node over NVLink, across nodes in
as many groups as a node has GPUs, each with its part, which share what the node sends. Then, with g GPUs in each of n
nodes, B bytes, p passes (2 of an all-reduce, else 1), bandwidths in bytes per second and one direction:

    launch + p ((g - 1) / g B / nvlink + (g - 1) latency_nvlink) + min(ring, tree)
    ring = p ((n - 1) / n B / node + (n - 1) latency),    tree = p (B / node + ceil(log2 n) latency)

A tree here is NCCL's double binary one, in which each node sends, and receives, everything once in each pass.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from galore_kernels.plan.errors import PlanError
from galore_kernels.plan.wire import PASSES, Collective

__all__ = ["GPUS_PER_NODE", "NETWORKS", "Network", "seconds", "tokens_that_hide"]

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
        PlanError: more than eight that don't fill their nodes.
    """
    if processes < 1 or (processes > GPUS_PER_NODE and processes % GPUS_PER_NODE):
        raise PlanError(f"gpus={processes}: expected 1 to {GPUS_PER_NODE}, or a multiple of it; fill the nodes")
    within, nodes = min(processes, GPUS_PER_NODE), max(1, processes // GPUS_PER_NODE)
    if processes == 1:
        return 0.0
    return sum(call.calls * _seconds(PASSES[call.kind], call.bytes, within, nodes, network) for call in step)


def _seconds(passes: int, size: int, within: int, nodes: int, network: Network) -> float:
    inside = (within - 1) / within * size / _NVLINK + (within - 1) * _NVLINK_LATENCY
    ring = (nodes - 1) / nodes * size / network.node + (nodes - 1) * network.latency
    tree = size / network.node + math.ceil(math.log2(nodes)) * network.latency
    return _LAUNCH + passes * (inside + min(ring, tree))


def tokens_that_hide(communication: float, parameters: int) -> float:
    """Tokens of a process' batch from which the backward pass, 4 operations for each parameter and token, takes longer
    than ``communication`` seconds, which DDP overlaps with it."""
    return communication * _FLOPS / (4 * parameters)
