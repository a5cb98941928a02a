"""The reference: a second decoder, frozen, cut over the pipeline stages like the model."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_slm.checkpoint.weights import Quantity, WeightSource, fill_module
from megatron_slm.config.architecture import Architecture
from megatron_slm.device import local_device
from megatron_slm.loss.objective import Objective, OutputWeight
from megatron_slm.model.block import Block, compile_blocks
from megatron_slm.model.llama import EMBEDDING_NAME, OUTPUT_NAME, Embedding, Head, layer_list
from megatron_slm.model.partition import stage_bounds
from megatron_slm.parallel.groups import DataParallel
from megatron_slm.parallel.layers import ParallelLayers
from megatron_slm.parallel.meeting import raise_on_all_ranks
from megatron_slm.parallel.shards import Part, parameters_in
from megatron_slm.parallel.topology import Topology
from megatron_slm.reference.shared import SharedLayers
from megatron_slm.types import Documents, MicroBatch, TokenStatistics


class FirstTokens:
    """The weights of a model without the last rows of its vocabulary's: padding that another model has less of.

    Args:
        num_rows: rows that the source has.
    """

    def __init__(self, source: WeightSource, num_rows: int) -> None:
        self._source, self._num_rows = source, num_rows

    def read(self, quantity: Quantity, part: Part, begin: int, end: int) -> Tensor:
        """Read elements [begin, end) of a flattened part (see `WeightSource.read`)."""
        if part.name in (f"{EMBEDDING_NAME}.weight", f"{OUTPUT_NAME}.weight"):
            part = replace(part, shape=(self._num_rows, *part.shape[1:]))
        return self._source.read(quantity, part, begin, end)


class FrozenStage(nn.Module):
    """The reference's layers on one stage, without gradients or stored activations.

    It is kept beside the trained module, never inside it, so that DeepSpeed neither broadcasts, partitions,
    optimizes nor saves it. Its depth and width are its own; a stage may hold none of its blocks.

    Attributes:
        shared: its layers where data-parallel ranks share their weights; None where each rank has them.
    """

    shared: SharedLayers | None = None

    def __init__(self, arch: Architecture, layers: ParallelLayers, *, stage: int, num_stages: int) -> None:
        super().__init__()
        self.arch, self.is_last = arch, stage == num_stages - 1
        bounds = stage_bounds(arch.num_layers, num_stages)
        makers = layer_list(arch, layers)[bounds[stage] : bounds[stage + 1]]
        self.layers = nn.ModuleList(maker.make() for maker in makers)
        # the last stage of a tied reference holds a copy of the embedding when the first stage is another one
        self.tied_output = Embedding(arch, layers) if self.is_last and arch.tied and num_stages > 1 else None
        self.requires_grad_(False)
        self.eval()

    @property
    def message_width(self) -> int:
        """Width of the hidden states that travel between its stages."""
        return self.arch.hidden_size

    def output_weight(self) -> OutputWeight:
        """Return the output weight's rows held here; on the last stage only."""
        head = self.layers[-1]
        assert isinstance(head, Head), "only the last stage has the head"
        weight = head.output
        if weight is None:
            embedding = self.tied_output or self.layers[0]
            assert isinstance(embedding, Embedding), "a tied head reads the embedding"
            weight = embedding.embed_tokens
        return OutputWeight(weight.tokens(), weight.start, weight.rows, head.logit_softcap)  # type: ignore[operator, arg-type]

    @torch.no_grad()
    def forward(self, x: Tensor, documents: Documents | None = None) -> Tensor:
        """Token ids [b, s] on the first stage, else hidden states [s, b, d], to hidden states [s, b, d].

        Args:
            documents: of the micro-batch, where attention keeps them apart; None for whole samples.
        """
        for layer in self.layers if self.shared is None else self.shared.in_turn():
            x = layer(x, documents) if documents is not None and isinstance(layer, Block) else layer(x)
        return x

    def statistics(
        self, x_sbd: Tensor, objective: Objective, batch: MicroBatch, *, trains: bool = True
    ) -> TokenStatistics:
        """Compute the reference's statistics of every token; on the last stage only.

        Args:
            trains: of a micro-batch of a training step, whose distribution is distilled if the objective does.
        """
        found = objective.statistics(
            x_sbd,
            self.output_weight(),
            batch,
            with_entropy=objective.selector.needs("reference-entropy"),
            with_distribution=trains and objective.distillation is not None,
        )
        if self.shared is not None:
            self.shared.release()  # a distribution keeps the output weight for as long as it needs it
        return found


def build_reference(
    arch: Architecture,
    source: WeightSource,
    topology: Topology,
    layers: ParallelLayers,
    dtype: torch.dtype,
    *,
    shared_by: DataParallel | None = None,
) -> FrozenStage:
    """Build this rank's stage of a frozen reference and load its weights. Collective over the world.

    Args:
        shared_by: data-parallel ranks that each hold a share of its only stage's weights, and run it together.
    """
    stage = topology.coordinate(dist.get_rank()).pipeline
    with parameters_in(dtype, without_values=shared_by is not None), local_device():  # in its final dtype and place
        reference = FrozenStage(arch, layers, stage=stage, num_stages=topology.pipeline)
    if shared_by is not None:
        *_, head = reference.layers
        kept = reference.layers[0] if arch.tied else head
        reference.shared = SharedLayers(list(reference.layers), shared_by, kept=kept, device=local_device())
    with raise_on_all_ranks():
        if reference.shared is None:
            fill_module(reference, source)
        else:
            reference.shared.fill(source)
    if layers.backends.compile_blocks:
        compile_blocks(reference)
    return reference
