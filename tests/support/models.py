"""Our decoder, dense in one process, with weights from a transformers model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from megatron_slm.checkpoint.weights import Quantity, fill_module
from megatron_slm.config.architecture import Architecture
from megatron_slm.parallel.layers import ParallelLayers
from megatron_slm.parallel.shards import Part, cut_range
from megatron_slm.reference.frozen import FrozenStage

CONFIGS = {"Gemma3": "Gemma3TextConfig"}
"""Classes of configurations that have other names than their models."""


class StateDictSource:
    """A `WeightSource` over a state dict."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        self.state = state

    def read(self, quantity: Quantity, part: Part, begin: int, end: int) -> Tensor:
        assert tuple(self.state[part.name].shape) == part.shape
        return cut_range(self.state[part.name], part, begin, end)


def dense_stage(arch: Architecture, state: dict[str, Tensor]) -> FrozenStage:
    """The whole decoder as one frozen stage."""
    stage = FrozenStage(arch, ParallelLayers(vocabulary_divisible_by=16), stage=0, num_stages=1)
    fill_module(stage, StateDictSource(state))
    return stage


def logits_bsV(stage: FrozenStage, tokens_bs: Tensor) -> Tensor:
    """All logits, for comparison only."""
    return stage.output_weight().logits(stage(tokens_bs)).transpose(0, 1)


def random_hf_model(kind: str, seed: int, **options: Any) -> nn.Module:
    """A small random transformers model with weights of a size that makes mistakes visible."""
    import transformers

    torch.manual_seed(seed)
    config = getattr(transformers, CONFIGS.get(kind, f"{kind}Config"))(initializer_range=0.2, **options)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    for parameter in model.parameters():  # norms and biases start at 1 and 0, which hides mistakes
        if parameter.dim() == 1:
            with torch.no_grad():
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model
