"""Lays the ranks out and validates architectures against the layout."""

from __future__ import annotations

from dataclasses import replace

import torch

from megatron_slm.config.architecture import Architecture
from megatron_slm.config.run import RunConfig
from megatron_slm.errors import LayoutError
from megatron_slm.model.llama import layer_list
from megatron_slm.parallel.batches import check_lengths
from megatron_slm.parallel.groups import TensorParallel
from megatron_slm.parallel.layers import ParallelLayers
from megatron_slm.parallel.topology import Topology


def run_topology(config: RunConfig, world_size: int) -> Topology:
    """Lay a world out over pipeline, data and tensor parallelism.

    Raises:
        LayoutError: its size is not a multiple of the model-parallel sizes.
    """
    parallel = config.parallel
    return Topology.from_world(
        world_size,
        tensor=parallel.tensor_model_parallel_size,
        pipeline=parallel.pipeline_model_parallel_size,
        context=parallel.context_parallel_size,
    )


def check_layout(arch: Architecture, config: RunConfig, topology: Topology, *, what: str) -> None:
    """Check that every layer can be cut, by making one tensor-parallel rank's on the meta device.

    Raises:
        LayoutError: heads, groups, widths, vocabulary or sequence are not divisible by the tensor-parallel size.
    """
    check_lengths(config, topology)
    tp = TensorParallel(size=topology.tensor)
    layers = ParallelLayers(tp, vocabulary_divisible_by=config.model.make_vocab_size_divisible_by)
    try:
        with torch.device("meta"):
            for maker in layer_list(replace(arch, num_layers=1, full_attention_layers=0), layers):
                maker.make()
    except LayoutError as error:
        raise LayoutError(f"{what}: {error.field}", error.value, error.rule, error.fix) from error
