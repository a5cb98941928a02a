"""Counts the parameters of one rank of each stage, on the real layers built on the meta device."""

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


@dataclass(frozen=True, kw_only=True)
class StageParameters:
    """Parameters of one rank of a stage."""

    num_blocks: int
    has_embedding: bool
    has_head: bool
    sizes: tuple[int, ...]
    """Number of elements of each parameter."""
    layers: tuple[int, ...]
    """Number of elements of each layer."""

    @property
    def total(self) -> int:
        """Total number of elements."""
        return sum(self.sizes)


def stage_parameters(
    arch: Architecture, *, tensor: int, num_stages: int, vocabulary_divisible_by: int
) -> list[StageParameters]:
    """Return the parameters of one rank of each stage.

    The last of several stages of a model with tied weights holds a copy of the embedding.

    Raises:
        LayoutError: a layer cannot be sharded over `tensor` ranks.
    """
    layers = ParallelLayers(TensorParallel(size=tensor), vocabulary_divisible_by=vocabulary_divisible_by)
    makers = layer_list(arch, layers)
    sizes = {kind: _sizes(next(m for m in makers if m.kind is kind)) for kind in (Embedding, Block, Head)}
    stages = []
    for stage, (begin, end) in enumerate(pairwise(stage_bounds(arch.num_layers, num_stages))):
        is_first, is_last = stage == 0, stage == num_stages - 1
        num_blocks = end - begin - is_first - is_last
        has_embedding_weight = is_first or (is_last and arch.tied)
        held = [
            *([sizes[Embedding]] if has_embedding_weight else ()),
            *[sizes[Block]] * num_blocks,
            *([sizes[Head]] if is_last else ()),
        ]
        stages.append(
            StageParameters(
                num_blocks=num_blocks,
                has_embedding=is_first,
                has_head=is_last,
                sizes=tuple(size for layer in held for size in layer),
                layers=tuple(sum(layer) for layer in held),
            )
        )
    return stages


def _sizes(maker: LayerMaker) -> tuple[int, ...]:
    with torch.device("meta"):
        return tuple(p.numel() for p in maker.make().parameters())
