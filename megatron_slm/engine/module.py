"""The trained model as DeepSpeed takes it: a list of layers, cut over stages."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from deepspeed.runtime.pipe import module as pipe_module
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megatron_slm.config.architecture import Architecture
from megatron_slm.engine.grid import Grid
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

    def __init__(self, arch: Architecture, layers: ParallelLayers, grid: Grid) -> None:
        specs: list[LayerSpec] = [LayerSpec(maker.kind, *maker.args) for maker in layer_list(arch, layers)]
        self._bounds = stage_bounds(arch.num_layers, grid.ours.pipeline)
        if arch.tied:
            weight = "embed_tokens.weight"
            specs[0] = TiedLayerSpec(_TIED, Embedding, arch, layers, tied_weight_attr=weight)
            specs.append(TiedLayerSpec(_TIED, Embedding, arch, layers, forward_fn=_pass_on, tied_weight_attr=weight))
            self._bounds[-1] += 1
        with contextlib.redirect_stdout(io.StringIO()), _given(grid):  # its constructor prints its partition
            super().__init__(specs, topology=grid.topology(), partition_method="given")

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
        recomputes = self.activation_checkpoint_interval > 0 and torch.is_grad_enabled()
        return run_layers(self.forward_funcs, x, documents, recomputes=recomputes, hook=hook, rows=rows)

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
    recomputes: bool,
    hook: GradientHook | None = None,
    rows: BackwardRows | None = None,
) -> Tensor:
    """Run layers one after the other on a micro-batch; only blocks take its documents.

    Args:
        recomputes: do not keep the blocks' activations for their backward passes (with `rows`, these decide).
        hook: is called with the gradient of the first layer's output.
        rows: choice of the rows that the blocks' backward passes run on; None for all.
    """
    beside = () if documents is None else (documents,)
    for number, layer in enumerate(layers):
        if not isinstance(layer, Block):
            x = layer(x)
        elif rows is not None:
            x = layer(x, documents, rows)
        elif recomputes:
            x = checkpoint(layer, x, *beside, use_reentrant=False)
        else:
            x = layer(x, *beside)
        if number == 0 and hook is not None and x.requires_grad:
            x.register_hook(hook)
    return x


def _pass_on(embedding: nn.Module, x_sbd: Tensor) -> Tensor:
    """Forward function of the tied layer on the last stage, which holds it for its weight only."""
    return x_sbd


def output_rows(head: Head, weight: VocabularyWeight) -> OutputWeight:
    """Return the rows of a head's vocabulary weight that are tokens."""
    return OutputWeight(weight.tokens(), weight.start, weight.rows, head.logit_softcap)
