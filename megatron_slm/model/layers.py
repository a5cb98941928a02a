"""What the model asks of the layers it is built from."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, nn

from megatron_slm.config.backends import Backends


class VocabularyWeight(Protocol):
    """A [vocabulary, hidden] weight, of which this process holds `length` rows from token `start` on."""

    start: int
    length: int

    def tokens(self) -> Tensor:
        """The rows held here, [length, d]."""
        ...


class Layers(Protocol):
    """Makes layers; a dense set and a tensor-parallel set look alike from here.

    `prefix` and `name` are the logical (Hugging Face) names of the weights.
    """

    backends: Backends
    """What attention and norms compute with."""

    def share(self, count: int, *, field: str) -> int:
        """How many of `count` heads or groups are computed here."""
        ...

    def linear_in(self, prefix: str, in_features: int, outputs: dict[str, int], *, bias: bool = False) -> nn.Module:
        """From the residual stream into one share of each of `outputs`: [s, b, in] to a tuple of [s, b, out]."""
        ...

    def linear_out(self, name: str, in_features: int, out_features: int, *, bias: bool = False) -> nn.Module:
        """From a share of `in_features` back into the residual stream."""
        ...

    def embedding(self, name: str, vocab_size: int, hidden_size: int) -> nn.Module:
        """Token ids [b, s] to the residual stream [s, b, d]; also a `VocabularyWeight`."""
        ...

    def output_weight(self, name: str, vocab_size: int, hidden_size: int) -> nn.Module:
        """A `VocabularyWeight` for the logits."""
        ...

    def replicated(self, name: str, shape: tuple[int, ...]) -> nn.Parameter:
        """A parameter that is held whole."""
        ...

    def on_sequence_shard(self, weight: Tensor) -> Tensor:
        """`weight`, as used on the residual stream."""
        ...

    def on_head_share(self, weight: Tensor) -> Tensor:
        """`weight`, as used on the heads that are computed here."""
        ...
