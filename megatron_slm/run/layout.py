"""Whether an architecture fits the layout and the weights."""

from __future__ import annotations

from dataclasses import replace

import torch

from megatron_slm.config.architecture import Architecture
from megatron_slm.config.run import RunConfig
from megatron_slm.errors import LayoutError
from megatron_slm.model.llama import layer_list
from megatron_slm.parallel.groups import TensorParallel
from megatron_slm.parallel.layers import ParallelLayers
from megatron_slm.parallel.topology import Topology


def check_layout(arch: Architecture, config: RunConfig, topology: Topology, *, what: str) -> None:
    """Make every layer of one tensor-parallel rank on the meta device, which refuses what cannot be cut.

    Raises:
        LayoutError: heads, groups, widths, vocabulary or sequence are not divisible by the tensor-parallel size.
    """
    if config.parallel.sequence_parallel and config.data.seq_length % topology.tensor:
        raise LayoutError(
            "--seq-length",
            config.data.seq_length,
            f"is divisible by --tensor-model-parallel-size ({topology.tensor}) with sequence parallelism",
            "change one of them",
        )
    tp = TensorParallel(size=topology.tensor)
    layers = ParallelLayers(tp, vocabulary_divisible_by=config.model.make_vocab_size_divisible_by)
    try:
        with torch.device("meta"):
            for maker in layer_list(replace(arch, num_layers=1, full_attention_layers=0), layers):
                maker.make()
    except LayoutError as error:
        raise LayoutError(f"{what}: {error.field}", error.value, error.rule, error.fix) from error
