"""Initializes torch.distributed and creates the process groups of a topology."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed import ProcessGroup, distributed_c10d

from megatron_slm.device import communication_backend, select_device
from megatron_slm.errors import PeerError
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
        PeerError: another process listens on the port.
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
    try:
        if not dist.is_initialized():
            # DeepSpeed would bind the process group to the GPU, and torch split each further group off the whole world
            dist.init_process_group(communication_backend(), timeout=timeout)
        deepspeed.init_distributed(dist_backend=communication_backend(), timeout=timeout, verbose=False)
    except dist.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        fix = "end the run that holds it, or start with another --master_port"
        raise PeerError("--master_port", os.environ["MASTER_PORT"], "be a free port of rank 0's node", fix) from error


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
    sharing: tuple[TensorParallel, ...] = ()
    """The parts of the group whose ranks share one key/value head, one for each number of ranks that do."""


@dataclass(frozen=True, kw_only=True)
class ContextParallel:
    """The context-parallel group of a rank: the ranks that share every sequence."""

    size: int = 1
    rank: int = 0
    group: ProcessGroup | None = None


@dataclass(frozen=True, kw_only=True)
class DataParallel:
    """The data-parallel group of a rank: the ranks that train the same parameters on different tokens.

    Those of one micro-batch, cut by context parallelism, are adjacent.
    """

    size: int = 1
    rank: int = 0
    group: ProcessGroup | None = None


def create_tensor_parallel_group(
    topology: Topology, *, sequence_parallel: bool, num_query_groups: Iterable[int] = ()
) -> TensorParallel:
    """Create this rank's tensor-parallel group. Collective over its members (see `create_group`).

    Args:
        num_query_groups: key/value heads of the models; where there are fewer than ranks, those that share a head get a
            group too.
    """
    size, rank = topology.tensor, topology.coordinate(dist.get_rank()).tensor
    group = create_group(topology.tensor_groups()) if size > 1 else None
    sharing = []
    for count in sorted({size // heads for heads in num_query_groups if heads < size}):
        own = group if count == size else create_group(topology.sharing_groups(count))
        sharing.append(TensorParallel(size=count, rank=rank % count, group=own))
    return TensorParallel(
        size=size,
        rank=rank,
        sequence_parallel=sequence_parallel and size > 1,
        group=group,
        sharing=tuple(sharing),
    )


def create_data_parallel_group(topology: Topology) -> DataParallel:
    """Create this rank's data-parallel group. Collective over its members (see `create_group`)."""
    place = topology.coordinate(dist.get_rank())
    group = create_group(topology.data_groups()) if topology.copies > 1 else None
    return DataParallel(size=topology.copies, rank=place.data * topology.context + place.context, group=group)


def create_context_parallel_group(topology: Topology) -> ContextParallel:
    """Create this rank's context-parallel group. Collective over its members (see `create_group`)."""
    group = create_group(topology.context_groups()) if topology.context > 1 else None
    return ContextParallel(size=topology.context, rank=topology.coordinate(dist.get_rank()).context, group=group)


def create_group(family: Sequence[Sequence[int]], *, options: Any | None = None) -> ProcessGroup | None:
    """Create the one group, of a family of disjoint ones, that this rank belongs to; None if it belongs to none.

    Every rank asks for the same families in the same order. The groups of a family are created side by side, each by
    its members alone: a group that all ranks of the world had to create would cost as many collectives over the world
    as there are groups. On NCCL the communicator is made by the first message. torch names such a group by its ranks
    and the number of groups that its creator has, so a rank outside of a family creates one too, of itself.

    Where a caller bound the process group to a GPU, torch makes each group by a split of the world's communicator:
    then one split, in which every rank takes part, makes the whole family.

    Args:
        family: the ranks of each group, ascending.
        options: the backend's options.
    """
    if dist.distributed_c10d._get_default_group().bound_device_id is not None:
        return dist.split_group(split_ranks=[list(ranks) for ranks in family], pg_options=options)
    rank = dist.get_rank()
    own = next((list(ranks) for ranks in family if rank in ranks), None)
    group = dist.new_group(own or [rank], pg_options=options, use_local_synchronization=True)
    return None if own is None else group


def create_message_group(pairs: Sequence[Sequence[int]]) -> ProcessGroup | None:
    """Create the group of two ranks that send each other hidden states, of disjoint pairs (see `create_group`)."""
    options: Any | None = None
    if dist.get_backend() == "nccl":
        options = dist.ProcessGroupNCCL.Options()
        options.config.max_ctas = MESSAGE_BLOCKS
        timeout = distributed_c10d._get_default_timeout(dist.Backend("nccl"))
        options._timeout = timeout
    return create_group(pairs, options=options)
