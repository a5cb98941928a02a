"""The trained model as DeepSpeed takes it: a list of layers cut over stages, or whole on every rank."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from typing import Any

import torch
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megatron_slm.config.architecture import Architecture
from megatron_slm.loss.objective import OutputWeight
from megatron_slm.model.block import Block
from megatron_slm.model.llama import Embedding, Head, layer_list
from megatron_slm.model.partition import stage_bounds
from megatron_slm.model.row_sampling import BackwardRows
from megatron_slm.parallel.layers import ParallelLayers, VocabularyWeight
from megatron_slm.parallel.topology import Topology
from megatron_slm.types import Documents

_TIED = "embedding"

Watch = Callable[[Tensor], None]
"""Sees a gradient on its way down."""


def deepspeed_topology(topology: Topology) -> Any:
    """The same axes for DeepSpeed, which numbers ranks in the same order."""
    return PipeModelDataParallelTopology(num_pp=topology.pipeline, num_mp=topology.tensor, num_dp=topology.data)


class StageModule(PipelineModule):
    """This rank's stage of the decoder, cut by `model/partition.py`.

    A tied output weight is a copy of the embedding on the last stage, whose gradient DeepSpeed adds to the
    first stage's. Parameters start at zero; `checkpoint/fragments.py` fills them.
    """

    def __init__(self, arch: Architecture, layers: ParallelLayers, topology: Topology) -> None:
        specs: list[LayerSpec] = [LayerSpec(maker.kind, *maker.args) for maker in layer_list(arch, layers)]
        self._bounds = stage_bounds(arch.num_layers, topology.pipeline)
        if arch.tied:
            weight = "embed_tokens.weight"
            specs[0] = TiedLayerSpec(_TIED, Embedding, arch, layers, tied_weight_attr=weight)
            specs.append(TiedLayerSpec(_TIED, Embedding, arch, layers, forward_fn=_pass_on, tied_weight_attr=weight))
            self._bounds[-1] += 1
        with contextlib.redirect_stdout(io.StringIO()):  # its constructor prints its partition
            super().__init__(specs, topology=deepspeed_topology(topology), partition_method="given")

    def _partition_layers(self, method: str = "given") -> None:
        self.parts = self._bounds
        self._set_bounds(start=self.parts[self.stage_id], stop=self.parts[self.stage_id + 1])

    def forward(
        self,
        x: Tensor,
        documents: Documents | None = None,
        watch: Watch | None = None,
        rows: BackwardRows | None = None,
    ) -> Tensor:
        """Token ids [b, s] on the first stage, else hidden states [s, b, d], to hidden states [s, b, d].

        DeepSpeed's own hands one value from layer to layer, with nothing beside it.

        Args:
            watch: sees the gradient of the first layer's output, in the backward pass.
            rows: choice of the rows that the blocks' backward passes run on; None for all.
        """
        recomputes = self.activation_checkpoint_interval > 0 and torch.is_grad_enabled()
        for layer in self.forward_funcs:
            x, watch = watched(run_layer(layer, x, documents, rows, recomputes=recomputes), watch)
        return x

    def output_weight(self) -> OutputWeight:
        """The output weight's token rows held here; on the last stage only."""
        head = next(layer for layer in self.forward_funcs if isinstance(layer, Head))
        return output_rows(head.output or self.tied_modules[_TIED].embed_tokens)  # type: ignore[arg-type]


def run_layer(
    layer: Callable[..., Tensor],
    x: Tensor,
    documents: Documents | None,
    rows: BackwardRows | None = None,
    *,
    recomputes: bool = False,
) -> Tensor:
    """One layer of the list on a micro-batch; only blocks ask where its documents lie.

    Args:
        rows: choice of the rows that a block's backward pass runs on; None for all.
        recomputes: do not keep a block's activations for its backward pass (with rows, these decide).
    """
    if not isinstance(layer, Block):
        return layer(x)
    if rows is not None:
        return layer(x, documents, rows)
    beside = () if documents is None else (documents,)
    return checkpoint(layer, x, *beside, use_reentrant=False) if recomputes else layer(x, *beside)


def watched(x: Tensor, watch: Watch | None) -> tuple[Tensor, None]:
    """The same tensor, whose gradient `watch` will see; the second value stands for the watch, which is used up."""
    if watch is not None and x.requires_grad:
        x.register_hook(watch)
    return x, None


def _pass_on(embedding: nn.Module, x_sbd: Tensor) -> Tensor:
    """The tied layer's second appearance: it only brings the weight to the last stage."""
    return x_sbd


def output_rows(weight: VocabularyWeight) -> OutputWeight:
    """The rows of a vocabulary weight that are tokens."""
    return OutputWeight(weight.tokens(), weight.start, weight.rows)
