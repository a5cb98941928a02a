"""Predicts the time of collectives: bytes over a ring's bandwidth, and latencies of its hops. Pure.

NCCL's own cost model (its `tuning.cc`) gives the form and the constants: a launch, and a latency for each step of the
ring, by whether it stays inside a node. docs/planning.md lists what is assumed.
"""

from __future__ import annotations

from typing import Any

from megatron_slm.arithmetic import ceil_div
from megatron_slm.planning.gpus import Cluster
from megatron_slm.planning.memory import zero_options
from megatron_slm.planning.parameters import StageParameters

LAUNCH_SECONDS = 14e-6
"""Start of a collective."""
HOP_SECONDS_INSIDE, HOP_SECONDS_BETWEEN = 1.9e-6, 4.0e-6
"""A step of a ring inside a node, and between nodes."""
OVERLAP_COST = 0.1
"""Share of the shorter of two that run side by side, communication and computation, by which they hold each other up:
collectives take processors and memory bandwidth of the GPU."""


def latency_seconds(num_ranks: int, stride: int, cluster: Cluster) -> float:
    """Return the time of an all-gather or reduce-scatter of no bytes over ranks that are `stride` apart."""
    if num_ranks == 1:
        return 0.0
    ranks_per_node = max(1, min(num_ranks, cluster.gpus_per_node // stride))
    between = ceil_div(num_ranks, ranks_per_node) - 1
    inside = num_ranks - 1 - between
    return LAUNCH_SECONDS + inside * HOP_SECONDS_INSIDE + between * HOP_SECONDS_BETWEEN


def ring_seconds(num_bytes: float, num_ranks: int, stride: int, cluster: Cluster, *, num_calls: int = 1) -> float:
    """Return the time of an all-gather or reduce-scatter.

    Args:
        num_bytes: in total, of all ranks and calls.
        stride: distance of the ranks.
        num_calls: collectives that the bytes are spread over.
    """
    if num_ranks == 1:
        return 0.0
    transfer = (num_ranks - 1) / num_ranks * num_bytes / cluster.ring_bytes_per_second(num_ranks, stride)
    return num_calls * latency_seconds(num_ranks, stride, cluster) + transfer


def all_reduce_seconds(num_bytes: float, num_ranks: int, stride: int, cluster: Cluster, *, num_calls: int = 1) -> float:
    """Return the time of an all-reduce: a reduce-scatter and an all-gather."""
    return 2 * ring_seconds(num_bytes, num_ranks, stride, cluster, num_calls=num_calls)


def num_buckets(parameters: StageParameters, deepspeed: dict[str, Any]) -> int:
    """Return the number of collectives that reduce a stage's gradients once."""
    return ceil_div(parameters.total, int(zero_options(deepspeed)["reduce_bucket_size"]))


def num_gathered(parameters: StageParameters, deepspeed: dict[str, Any]) -> int:
    """Return the number of parameters that ZeRO-3 partitions, each of which is gathered before it is used."""
    threshold = zero_options(deepspeed)["stage3_param_persistence_threshold"]
    return sum(size > threshold for size in parameters.sizes)


def exposed_seconds(communication: float, computation: float) -> float:
    """Return by how much communication beside a computation makes it longer."""
    return max(0.0, communication - computation) + OVERLAP_COST * min(communication, computation)
