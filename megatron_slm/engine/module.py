"""The trained model as DeepSpeed takes it: a list of layers, cut over stages."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from deepspeed.runtime.pipe import module as pipe_module
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megatron_slm.config.architecture import Architecture
from megatron_slm.config.recomputation import KEEP_ALL, Granularity, Recomputation
from megatron_slm.engine.grid import Grid
from megatron_slm.engine.offload import saved_activations
from megatron_slm.loss.objective import OutputWeight
from megatron_slm.model.block import Block
from megatron_slm.model.llama import Embedding, Head, layer_list
from megatron_slm.model.partition import stage_bounds
from megatron_slm.model.row_sampling import BackwardRows
from megatron_slm.parallel.groups import create_group
from megatron_slm.parallel.layers import ParallelLayers, VocabularyWeight
from megatron_slm.types import Documents

_TIED = "embedding"

GradientHook = Callable[[Tensor], None]
"""Is called with a gradient in the backward pass."""


class StageModule(PipelineModule):
    """This rank's stage of the decoder, cut by `model/partition.py`.

    A tied output weight is a copy of the embedding on the last stage, whose gradient DeepSpeed adds to the
    first stage's. Parameters start at zero; `checkpoint/fragments.py` fills them.
    """

    def __init__(
        self,
        arch: Architecture,
        layers: ParallelLayers,
        grid: Grid,
        recomputation: Recomputation = KEEP_ALL,
        *,
        offloads: bool = False,
    ) -> None:
        specs: list[LayerSpec] = [LayerSpec(maker.kind, *maker.args) for maker in layer_list(arch, layers)]
        self._bounds = stage_bounds(arch.num_layers, grid.ours.pipeline)
        if arch.tied:
            weight = "embed_tokens.weight"
            specs[0] = TiedLayerSpec(_TIED, Embedding, arch, layers, tied_weight_attr=weight)
            specs.append(TiedLayerSpec(_TIED, Embedding, arch, layers, forward_fn=_pass_on, tied_weight_attr=weight))
            self._bounds[-1] += 1
        with contextlib.redirect_stdout(io.StringIO()), _given(grid):  # its constructor prints its partition
            super().__init__(specs, topology=grid.topology(), partition_method="given")
        self._recomputation, self._offloads = recomputation, offloads

    def _partition_layers(self, method: str = "given") -> None:
        self.parts = self._bounds
        self._set_bounds(start=self.parts[self.stage_id], stop=self.parts[self.stage_id + 1])

    def _index_tied_modules(self) -> dict[str, dict[str, Any]]:
        """Create the group of this rank's tied weight; DeepSpeed's way creates those of all pipelines, one by one."""
        topology = self._grid.ours
        if topology.pipeline == 1 or not any(isinstance(spec, TiedLayerSpec) for spec in self._layer_specs):
            return {}
        family = [[pipeline[0], pipeline[-1]] for pipeline in topology.pipeline_groups()]
        group = create_group(family)
        ranks = next((ranks for ranks in family if self.global_rank in ranks), None)
        if ranks is None:
            return {}
        module = self.tied_modules[_TIED]
        if self.global_rank != ranks[0]:
            for parameter in module.parameters():
                parameter.ds_pipe_replicated = True  # its norm is counted once
        return {_TIED: {"ranks": ranks, "group": group, "weight_attr": self.tied_weight_attrs[_TIED], "module": module}}

    def forward(
        self,
        x: Tensor,
        documents: Documents | None = None,
        hook: GradientHook | None = None,
        rows: BackwardRows | None = None,
    ) -> Tensor:
        """Token ids [b, s] on the first stage, else hidden states [s, b, d], to hidden states [s, b, d].

        It takes the place of DeepSpeed's own, which passes one value from layer to layer and nothing beside it.
        """
        rule = self._recomputation if torch.is_grad_enabled() else KEEP_ALL
        with saved_activations(self, offloads=self._offloads):
            return run_layers(self.forward_funcs, x, documents, recomputation=rule, hook=hook, rows=rows)

    def output_weight(self) -> OutputWeight:
        """Return the output weight's token rows held here; on the last stage only."""
        head = next(layer for layer in self.forward_funcs if isinstance(layer, Head))
        return output_rows(head, head.output or self.tied_modules[_TIED].embed_tokens)  # type: ignore[arg-type]


@contextlib.contextmanager
def _given(grid: Grid) -> Iterator[None]:
    """Have DeepSpeed's module take this grid inside the context, where it would create one of its own."""
    real = pipe_module.PipelineParallelGrid
    pipe_module.PipelineParallelGrid = lambda **_: grid
    try:
        yield
    finally:
        pipe_module.PipelineParallelGrid = real


def run_layers(
    layers: Iterable[Callable[..., Tensor]],
    x: Tensor,
    documents: Documents | None,
    *,
    recomputation: Recomputation = KEEP_ALL,
    hook: GradientHook | None = None,
    rows: BackwardRows | None = None,
) -> Tensor:
    """Run layers one after the other on a micro-batch; only blocks take its documents.

    Args:
        recomputation: what the blocks keep for their backward passes.
        hook: is called with the gradient of the first layer's output.
        rows: choice of the rows that the blocks' backward passes run on; None for all.
    """
    layers = list(layers)
    run = _Layers(layers, documents, rows, hook)
    first = next((number for number, layer in enumerate(layers) if isinstance(layer, Block)), len(layers))
    end = first + sum(isinstance(layer, Block) for layer in layers)
    for number in range(first):
        x = run.one(number, x)
    for size in recomputation.units(end - first):
        unit = range(first, first + size)
        first += size
        if rows is None:
            x = checkpoint(run.several, x, unit, use_reentrant=False)
        else:  # the blocks are functions that do it themselves
            x = run.several(x, unit, "full")
    for number in range(first, len(layers)):
        x = run.one(number, x, "selective" if recomputation.granularity == "selective" else None)
    return x


@dataclass(frozen=True)
class _Layers:
    """Layers of a micro-batch's forward pass."""

    layers: Sequence[Callable[..., Tensor]]
    documents: Documents | None
    rows: BackwardRows | None
    hook: GradientHook | None

    def one(self, number: int, x: Tensor, recompute: Granularity | None = None) -> Tensor:
        """Run the layer of this number."""
        layer = self.layers[number]
        x = layer(x, self.documents, self.rows, recompute) if isinstance(layer, Block) else layer(x)
        if number == 0 and self.hook is not None and x.requires_grad:
            x.register_hook(self.hook)
        return x

    def several(self, x: Tensor, numbers: Iterable[int], recompute: Granularity | None = None) -> Tensor:
        """Run these layers one after the other."""
        for number in numbers:
            x = self.one(number, x, recompute)
        return x


def _pass_on(embedding: nn.Module, x_sbd: Tensor) -> Tensor:
    """Forward function of the tied layer on the last stage, which holds it for its weight only."""
    return x_sbd


def output_rows(head: Head, weight: VocabularyWeight) -> OutputWeight:
    """Return the rows of a head's vocabulary weight that are tokens."""
    return OutputWeight(weight.tokens(), weight.start, weight.rows, head.logit_softcap)
