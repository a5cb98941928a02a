"""Protocols of the layers the model is built from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
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
        """The same for a backward pass alone: the outputs are known, and the first one is of some rows where they are
        given."""
        ...


class LinearOut(HasParameters, Protocol):
    """From a share of the inputs back into the residual stream."""

    def __call__(self, x_sbf: Tensor) -> Tensor:
        """[s, b, in] to [s, b, out]."""
        ...

    def replay(self, x_Rf: Tensor) -> Tensor:
        """The same for a backward pass alone: what it returns, [R, out], is not to be read."""
        ...

    def differentiate(self, grad_Rd: Tensor, inputs: Callable[[Tensor], Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Gradients of the inputs, [R, in], and of the parameters; the inputs may be made from their gradient."""
        ...


class KeyValueHeads(Protocol):
    """The key and value heads that this rank's queries attend to."""

    count: int

    def whole(self, k_sbf: Tensor, v_sbf: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values as they were projected here to whole heads, [s, b, count * k] each."""
        ...


class SequenceShare(Protocol):
    """The positions of every sample that are held here: all, or some runs of them.

    Shapes: s positions of a sample, l of them held here.
    """

    is_cut: bool

    def whole_length(self, held: int) -> int:
        """Return the positions of a sample of which `held` are here."""
        ...

    def stretches(self, length: int) -> tuple[range, ...]:
        """Return the runs of a sample's positions that are held here, rising."""
        ...

    def held(self, value_s: Tensor) -> Tensor:
        """Return what is held here of a value of every position, [s, ...] to [l, ...]."""
        ...

    def over_whole(self, attend: Callable[[Tensor, Tensor], Tensor], k_lbgk: Tensor, v_lbgk: Tensor) -> Tensor:
        """Call a function of the keys and values of all positions, [s, b, g, k] each, that keeps views of them."""
        ...


class Layers(Protocol):
    """Makes the model's layers, dense or tensor-parallel.

    `prefix` and `name` are the logical (Hugging Face) names of the weights.
    """

    backends: Backends
    """Backends of attention and norms."""

    @property
    def sequence_share(self) -> SequenceShare:
        """The positions of every sample that are held here."""
        ...

    def share(self, count: int, *, field: str) -> int:
        """Return this rank's number of `count` heads."""
        ...

    def key_value_heads(self, count: int) -> KeyValueHeads:
        """Return this rank's of `count` key/value heads; several ranks may have the same one."""
        ...

    def linear_in(self, prefix: str, in_features: int, outputs: dict[str, int], *, bias: bool = False) -> LinearIn:
        """Make a linear layer from the residual stream to this rank's share of each output: [s, b, in] to a tuple of
        [s, b, out].
        """
        ...

    def linear_out(self, name: str, in_features: int, out_features: int, *, bias: bool = False) -> LinearOut:
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

    def shared(self, name: str, length: int) -> nn.Parameter:
        """Make a vector of which every rank has an equal part, in the order of the parts of a `linear_in`."""
        ...

    def mean_over_shares(self, x: Tensor) -> Tensor:
        """Mean over the ranks of values of their parts; each rank's further gradient is that of its own part."""
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
        """Prepare a replicated weight for use on the residual stream."""
        ...

    def on_head_share(self, weight: Tensor) -> Tensor:
        """Prepare a replicated weight for use on this rank's heads."""
        ...
