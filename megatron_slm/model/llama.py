"""The decoder as a list of layers: embedding, blocks, head. A pipeline stage is a slice of the list."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from megatron_slm.config.architecture import Architecture
from megatron_slm.model.block import Block
from megatron_slm.model.layers import Layers
from megatron_slm.model.norm import RMSNorm

EMBEDDING_NAME = "model.embed_tokens"
OUTPUT_NAME = "lm_head"


class Embedding(nn.Module):
    """Token ids to the residual stream."""

    def __init__(self, arch: Architecture, layers: Layers) -> None:
        super().__init__()
        self.embed_tokens = layers.embedding(EMBEDDING_NAME, arch.vocab_size, arch.hidden_size)
        self.multiplier = arch.embedding_multiplier

    def forward(self, tokens_bs: Tensor) -> Tensor:
        """int64 [b, s] to [s, b, d]."""
        x_sbd = self.embed_tokens(tokens_bs)
        # rounded to the model's dtype, as Hugging Face does
        return x_sbd if self.multiplier == 1.0 else x_sbd * torch.tensor(self.multiplier, dtype=x_sbd.dtype)


class Head(nn.Module):
    """The final norm and the output weight.

    The loss computes the logits itself, so that the logits of a micro-batch are never all in memory, and caps them. A
    divisor of the logits divides the hidden states that they are products of.
    """

    def __init__(self, arch: Architecture, layers: Layers) -> None:
        super().__init__()
        self.norm = RMSNorm(
            layers, "model.norm", arch.hidden_size, arch.norm_epsilon, zero_centered=arch.zero_centered_norms
        )
        self.logit_divisor, self.logit_softcap = arch.logit_divisor, arch.logit_softcap
        self.output = None if arch.tied else layers.output_weight(OUTPUT_NAME, arch.vocab_size, arch.hidden_size)

    def forward(self, x_sbd: Tensor) -> Tensor:
        """[s, b, d] to [s, b, d]."""
        x_sbd = self.norm(x_sbd)
        return x_sbd if self.logit_divisor == 1.0 else x_sbd / self.logit_divisor


class LayerMaker(NamedTuple):
    """Recipe of one layer."""

    kind: type[nn.Module]
    """`Embedding`, `Block` or `Head`."""
    args: tuple[Any, ...]

    def make(self) -> nn.Module:
        """Make the layer, with zero weights."""
        return self.kind(*self.args)


def layer_list(arch: Architecture, layers: Layers) -> list[LayerMaker]:
    """Return the recipes of all layers, in order: 1 embedding, `num_layers` blocks, 1 head."""
    blocks = [LayerMaker(Block, (arch, layers, index)) for index in range(arch.num_layers)]
    return [LayerMaker(Embedding, (arch, layers)), *blocks, LayerMaker(Head, (arch, layers))]
