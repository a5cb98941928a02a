"""ZeRO-3's partition of a module whose parameters nobody ever held whole."""

from __future__ import annotations

from typing import Any

import torch
from deepspeed.runtime.swap_tensor.partitioned_param_swapper import PartitionedParamStatus
from deepspeed.runtime.zero.partition_parameters import Init, free_param
from torch import nn

from megatron_slm.engine.grid import Grid


class Partition(Init):
    """Gives a rank zeros for its share of each parameter, where DeepSpeed broadcasts and cuts whole ones.

    Second shares inside the nodes (`zero_hpz_partition_size`) come with the first release of gathered parameters.

    Args:
        module: its parameters were made `without_values` (`parallel/shards.py`); weights are filled afterwards.
        config: DeepSpeed's.
    """

    def __init__(self, module: nn.Module, grid: Grid, config: dict[str, Any], dtype: torch.dtype) -> None:
        group = grid.get_data_parallel_group()
        super().__init__(module=module, data_parallel_group=group, config_dict_or_path=config, dtype=dtype, mpu=grid)

    def _zero_init_param(self, param: Any) -> None:
        self._convert_to_deepspeed_param(param)
        size = self._aligned_size(param)
        numel = size // self._partition_world_size(param)
        share: Any = torch.zeros(numel, dtype=param.dtype, device=self.local_device)
        share.ds_numel, share.status, share.final_location = numel, PartitionedParamStatus.AVAILABLE, None
        param.ds_tensor, param.ds_numel_aligned = share, size
        free_param(param)
