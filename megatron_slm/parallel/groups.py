"""Initializes torch.distributed and creates the process groups of a topology."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed import ProcessGroup, distributed_c10d

from megatron_slm.device import communication_backend, select_device
from megatron_slm.parallel.launched import complete_environment
from megatron_slm.parallel.topology import Topology


def init_distributed(timeout: timedelta = timedelta(minutes=10)) -> None:
    """Join the world described by the launcher's environment variables; without them, a world of one process.

    Args:
        timeout: longest wait for another rank, also in groups created later (DeepSpeed's pass no timeout). NCCL gets
            `OWN_LIMIT_FIRST` more: its thread ends the process without a word of who is missing.

    DeepSpeed would first compile a shared-memory collective for the CPU: it takes a minute, needs a compiler, and
    waits forever on the lock of a killed build. Nothing here calls that collective, so the build is disabled.

    Raises:
        ConfigError: the environment is incomplete (`complete_environment`).
    """
    import deepspeed
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__ = {}
    if communication_backend() == "nccl":
        timeout += OWN_LIMIT_FIRST
        os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")  # torch records what the watchdog reads in a hang
    for default in ("default_pg_timeout", "default_pg_nccl_timeout"):  # gloo, NCCL
        setattr(distributed_c10d, default, timeout)
    complete_environment()
    select_device()
    deepspeed.init_distributed(dist_backend=communication_backend(), timeout=timeout, verbose=False)


OWN_LIMIT_FIRST = timedelta(minutes=2)
"""Time that the watchdog has, after the longest wait, to find the rank that is missing."""
MESSAGE_BLOCKS = 4
"""Thread blocks of a message between stages, which it holds from its start until its peer has come.

NCCL would take up to 32 of a GPU's 132 processors on NVLink; six messages at once leave the rest to compute."""


@dataclass(frozen=True, kw_only=True)
class TensorParallel:
    """The tensor-parallel group of a rank: the ranks that share every layer.

    `group` is None for a single rank and for layouts that are only planned (meta device).
    """

    size: int = 1
    rank: int = 0
    sequence_parallel: bool = False
    group: ProcessGroup | None = None


@dataclass(frozen=True, kw_only=True)
class DataParallel:
    """The data-parallel group of a rank: the ranks that train the same parameters on different micro-batches."""

    size: int = 1
    rank: int = 0
    group: ProcessGroup | None = None


def create_tensor_parallel_group(topology: Topology, *, sequence_parallel: bool) -> TensorParallel:
    """Create the tensor-parallel groups and return this rank's. Collective over the world."""
    rank = dist.get_rank()
    group = _create_groups(topology.tensor_groups(), rank) if topology.tensor > 1 else None
    return TensorParallel(
        size=topology.tensor,
        rank=topology.coordinate(rank).tensor,
        sequence_parallel=sequence_parallel and topology.tensor > 1,
        group=group,
    )


def create_data_parallel_group(topology: Topology) -> DataParallel:
    """Create the data-parallel groups and return this rank's. Collective over the world."""
    rank = dist.get_rank()
    group = _create_groups(topology.data_groups(), rank) if topology.data > 1 else None
    return DataParallel(size=topology.data, rank=topology.coordinate(rank).data, group=group)


def _create_groups(all_ranks: list[list[int]], rank: int) -> ProcessGroup | None:
    """Create every group, in order, on every rank of the world; return the one that contains `rank`."""
    own_group: ProcessGroup | None = None
    for ranks in all_ranks:
        group = dist.new_group(ranks)
        if rank in ranks:
            own_group = group
    return own_group


def message_group(low: int, high: int) -> ProcessGroup:
    """Make the group of two ranks that send each other hidden states. Collective over the world."""
    options: Any | None = None
    if dist.get_backend() == "nccl":
        options = dist.ProcessGroupNCCL.Options()
        options.config.max_ctas = MESSAGE_BLOCKS
        timeout = distributed_c10d._get_default_timeout(dist.Backend("nccl"))
        options._timeout = timeout
    return dist.new_group([low, high], pg_options=options)
