"""What the model asks of the layers it is built from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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


class HasParameters(Protocol):
    """A layer."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """Its weights."""
        ...


class LinearIn(HasParameters, Protocol):
    """From the residual stream into one share of each of several outputs."""

    def __call__(self, x_sbd: Tensor) -> tuple[Tensor, ...]:
        """[s, b, in] to one [s, b, out] per output."""
        ...

    def replay(self, x: Tensor, outputs: Sequence[Tensor], rows_M: Tensor | None = None) -> tuple[Tensor, ...]:
        """The same for a backward pass alone: the outputs are known, and the first one's gradient is zero outside of
        the rows, where there are some."""
        ...


class LinearOut(HasParameters, Protocol):
    """From a share of the inputs back into the residual stream."""

    def __call__(self, x_sbf: Tensor) -> Tensor:
        """[s, b, in] to [s, b, out]."""
        ...

    def replay(self, x_Rf: Tensor) -> Tensor:
        """The same for a backward pass alone: what it returns, [R, out], is not to be read."""
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

    def linear_in(self, prefix: str, in_features: int, outputs: dict[str, int], *, bias: bool = False) -> LinearIn:
        """From the residual stream into one share of each of `outputs`."""
        ...

    def linear_out(self, name: str, in_features: int, out_features: int, *, bias: bool = False) -> LinearOut:
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

    @property
    def sequence_part(self) -> int:
        """Number of the part of the residual stream's positions that is held here; 0 where all are."""
        ...

    def agreed(self, value_N: Tensor) -> Tensor:
        """A value of the residual stream's rows that must have the same bits wherever the same rows are held."""
        ...

    def whole_rows(self, row_M: Tensor, num_rows: int) -> Tensor:
        """Rows of the part held here, of `num_rows`, by their numbers in the whole stream, with all other parts'."""
        ...

    def on_sequence_shard(self, weight: Tensor) -> Tensor:
        """`weight`, as used on the residual stream."""
        ...

    def on_head_share(self, weight: Tensor) -> Tensor:
        """`weight`, as used on the heads that are computed here."""
        ...
