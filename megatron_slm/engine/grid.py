"""DeepSpeed's view of the ranks and their process groups, made of ours."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from deepspeed.runtime.pipe.topology import PipelineParallelGrid, PipeModelDataParallelTopology

from megatron_slm.parallel.groups import DataParallel, TensorParallel, create_group
from megatron_slm.parallel.topology import Topology


def deepspeed_topology(topology: Topology) -> Any:
    """Return the axes for DeepSpeed, which numbers ranks in the same order; context-parallel ranks are data ranks."""
    return PipeModelDataParallelTopology(num_pp=topology.pipeline, num_mp=topology.tensor, num_dp=topology.copies)


class Grid(PipelineParallelGrid):
    """A `PipelineParallelGrid` of this rank's own groups, where DeepSpeed's creates those of all ranks.

    The tensor-parallel and data-parallel groups are shared with the layers and the losses. Collective over the world.
    """

    def __init__(self, topology: Topology, tp: TensorParallel, dp: DataParallel) -> None:
        # the base class's constructor is left out: creating groups is all that it does beside setting these names
        self.ours = topology
        self.global_rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self._topo = deepspeed_topology(topology)
        self.data_parallel_size = topology.copies
        self.pipe_parallel_size = topology.pipeline
        self.model_parallel_size = self.slice_parallel_size = topology.tensor
        self.stage_id, self.data_parallel_id = self.get_stage_id(), self.get_data_parallel_id()
        self.is_first_stage, self.is_last_stage = self.stage_id == 0, self.stage_id == topology.pipeline - 1
        self.dp_groups, self.pipe_groups = topology.data_groups(), topology.pipeline_groups()
        self.model_groups = topology.tensor_groups()
        self.p2p_groups: list[list[int]] = []
        self.dp_group, self.pp_group = self._own(self.dp_groups), self._own(self.pipe_groups)
        self.slice_group = self.mp_group = self._own(self.model_groups)
        copy = self._own(topology.model_groups())
        self.ds_model_rank, self.ds_model_world_size = copy.index(self.global_rank), len(copy)
        self.slice_proc_group = tp.group or create_group(self.model_groups)
        self.dp_proc_group = dp.group or create_group(self.dp_groups)
        self.pp_proc_group = create_group(self.pipe_groups)
        self.ds_model_proc_group = create_group(topology.model_groups())

    def _own(self, family: list[list[int]]) -> list[int]:
        return next(ranks for ranks in family if self.global_rank in ranks)
