"""Protocols of the layers the model is built from."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, nn

from megatron_slm.config.backends import Backends


class VocabularyWeight(Protocol):
    """A [vocabulary, hidden] weight; this rank has its `length` rows from token `start` on."""

    start: int
    length: int

    def tokens(self) -> Tensor:
        """Return this rank's rows, [length, d]."""
        ...


class Layers(Protocol):
    """Makes the model's layers, dense or tensor-parallel.

    `prefix` and `name` are the logical (Hugging Face) names of the weights.
    """

    backends: Backends
    """Backends of attention and norms."""

    def share(self, count: int, *, field: str) -> int:
        """Return this rank's number of `count` heads or groups."""
        ...

    def linear_in(self, prefix: str, in_features: int, outputs: dict[str, int], *, bias: bool = False) -> nn.Module:
        """Make a linear layer from the residual stream to this rank's share of each output: [s, b, in] to a tuple of
        [s, b, out].
        """
        ...

    def linear_out(self, name: str, in_features: int, out_features: int, *, bias: bool = False) -> nn.Module:
        """Make a linear layer from this rank's share of `in_features` back to the residual stream."""
        ...

    def embedding(self, name: str, vocab_size: int, hidden_size: int) -> nn.Module:
        """Make an embedding of token ids [b, s] to the residual stream [s, b, d]; also a `VocabularyWeight`."""
        ...

    def output_weight(self, name: str, vocab_size: int, hidden_size: int) -> nn.Module:
        """Make a `VocabularyWeight` for the logits."""
        ...

    def replicated(self, name: str, shape: tuple[int, ...]) -> nn.Parameter:
        """Make a parameter replicated on every rank."""
        ...

    def on_sequence_shard(self, weight: Tensor) -> Tensor:
        """Prepare a replicated weight for use on the residual stream."""
        ...

    def on_head_share(self, weight: Tensor) -> Tensor:
        """Prepare a replicated weight for use on this rank's heads."""
        ...
