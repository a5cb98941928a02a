"""The parameters that one rank holds of each stage, counted on the real layers, which are made on the meta device."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch

from megatron_slm.config.architecture import Architecture
from megatron_slm.model.block import Block
from megatron_slm.model.llama import Embedding, Head, LayerMaker, layer_list
from megatron_slm.model.partition import stage_bounds
from megatron_slm.parallel.groups import TensorParallel
from megatron_slm.parallel.layers import ParallelLayers


@dataclass(frozen=True)
class StageParameters:
    """One rank's parameters of one stage."""

    num_blocks: int
    has_embedding: bool
    has_head: bool
    sizes: tuple[int, ...]
    """Elements of each parameter."""

    @property
    def total(self) -> int:
        """Elements in all."""
        return sum(self.sizes)


def stage_parameters(
    arch: Architecture, *, tensor: int, num_stages: int, vocabulary_divisible_by: int
) -> list[StageParameters]:
    """What a rank of each stage holds; a tied output weight is a copy of the embedding where it is not the first stage.

    Raises:
        LayoutError: a layer cannot be cut over `tensor` ranks.
    """
    layers = ParallelLayers(TensorParallel(size=tensor), vocabulary_divisible_by=vocabulary_divisible_by)
    makers = layer_list(arch, layers)
    sizes = {kind: _sizes(next(m for m in makers if m.kind is kind)) for kind in (Embedding, Block, Head)}
    stages = []
    for stage, (begin, end) in enumerate(pairwise(stage_bounds(arch.num_layers, num_stages))):
        is_first, is_last = stage == 0, stage == num_stages - 1
        num_blocks = end - begin - is_first - is_last
        held = sizes[Embedding] * (is_first or (is_last and arch.tied)) + sizes[Block] * num_blocks
        held += sizes[Head] * is_last
        stages.append(StageParameters(num_blocks, is_first, is_last, held))
    return stages


def _sizes(maker: LayerMaker) -> tuple[int, ...]:
    with torch.device("meta"):
        return tuple(p.numel() for p in maker.make().parameters())
