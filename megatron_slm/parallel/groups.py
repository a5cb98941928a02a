"""Process groups made from a topology, and the start of the process group itself."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import ProcessGroup, distributed_c10d

from megatron_slm.device import communication_backend, select_device
from megatron_slm.parallel.launched import complete_environment
from megatron_slm.parallel.topology import Topology


def init_distributed(timeout: timedelta = timedelta(minutes=10)) -> None:
    """Join the world that the launcher described in the environment; a world of one where it did not.

    `timeout` bounds every wait for another rank, in groups that are made later too: by DeepSpeed, for one, which
    passes none of its own.

    DeepSpeed would first compile a shared-memory collective for the CPU: a minute of work that needs a
    compiler, and that waits for ever on the lock of a killed build. Its only user is one collective that
    is not used here, so the build is switched off.

    Raises:
        ConfigError: see `complete_environment`.
    """
    import deepspeed
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__ = {}
    for default in ("default_pg_timeout", "default_pg_nccl_timeout"):  # of gloo, and of NCCL
        setattr(distributed_c10d, default, timeout)
    complete_environment()
    select_device()
    deepspeed.init_distributed(dist_backend=communication_backend(), timeout=timeout, verbose=False)


@dataclass(frozen=True, kw_only=True)
class TensorParallel:
    """One rank's place among the ranks that share every layer.

    `group` is None where there is nothing to communicate with: a single rank, or a layout that is only
    being planned (meta device).
    """

    size: int = 1
    rank: int = 0
    sequence_parallel: bool = False
    group: ProcessGroup | None = None


@dataclass(frozen=True, kw_only=True)
class DataParallel:
    """One rank's place among the ranks that train the same parameters on different micro-batches."""

    size: int = 1
    rank: int = 0
    group: ProcessGroup | None = None


def tensor_parallel_group(topology: Topology, *, sequence_parallel: bool) -> TensorParallel:
    """This rank's tensor-parallel group. Collective: every rank of the world calls it together."""
    rank = dist.get_rank()
    mine = _group_of(rank, topology.tensor_groups()) if topology.tensor > 1 else None
    return TensorParallel(
        size=topology.tensor,
        rank=topology.coordinate(rank).tensor,
        sequence_parallel=sequence_parallel and topology.tensor > 1,
        group=mine,
    )


def data_parallel_group(topology: Topology) -> DataParallel:
    """This rank's data-parallel group. Collective: every rank of the world calls it together."""
    rank = dist.get_rank()
    mine = _group_of(rank, topology.data_groups()) if topology.data > 1 else None
    return DataParallel(size=topology.data, rank=topology.coordinate(rank).data, group=mine)


def _group_of(rank: int, all_ranks: list[list[int]]) -> ProcessGroup | None:
    mine: ProcessGroup | None = None
    for ranks in all_ranks:  # every rank takes part in making every group
        group = dist.new_group(ranks)
        if rank in ranks:
            mine = group
    return mine
