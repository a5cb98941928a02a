"""Samples of one corpus: the interface that a loader reads, and the parts that all kinds of samples share."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from megatron_slm.data.corpus.indexed import IndexedCorpus
from megatron_slm.data.index_cache import IndexCache
from megatron_slm.data.reading import Piece, Sample, SequenceReader
from megatron_slm.data.trained_tokens import TrainedTokens
from megatron_slm.errors import ConfigError, CorpusError


class Samples(Protocol):
    """Samples by position, as `MicroBatchSource` reads them."""

    @property
    def name(self) -> str:
        """Name for messages."""

    @property
    def sequence_length(self) -> int:
        """Inputs of a sample, `s`."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Sample: ...


class CorpusSamples(ABC):
    """Samples of the sequences [start, stop) of a corpus.

    Args:
        corpus: source of the tokens.
        start, stop: the sequences to use (see `split_bounds`).
        sequence_length: inputs of a sample, `s`.
        loss_mask: mask of the tokens that are trained on; None for all (see `SequenceReader`).
        columns: columns of the corpus to read with the tokens, by name.

    Raises:
        ConfigError: a number is out of range.
        CorpusError: the mask is of another corpus.
    """

    def __init__(
        self,
        corpus: IndexedCorpus,
        start: int,
        stop: int,
        *,
        sequence_length: int,
        loss_mask: IndexedCorpus | None,
        columns: Mapping[str, IndexedCorpus] = MappingProxyType({}),
    ) -> None:
        if sequence_length < 1:
            raise ConfigError("--seq-length", sequence_length, "be at least 1", "choose a larger one")
        if not 0 <= start <= stop <= corpus.num_sequences:
            rule = f"lie within the {corpus.num_sequences} sequences of {corpus.prefix}"
            raise ConfigError("range of sequences", (start, stop), rule, "check --split")
        self.corpus = corpus
        self.sequence_length = sequence_length
        self.loss_mask = loss_mask
        self._start, self._stop = start, stop
        self.columns = dict(columns)
        self._reader = SequenceReader(corpus, loss_mask, columns)

    @property
    def _lengths(self) -> npt.NDArray[np.int32]:
        """Tokens of the sequences, int32 [stop - start]."""
        return self.corpus.sequence_lengths[self._start : self._stop]

    @property
    def name(self) -> str:
        """Prefix of the corpus."""
        return self.corpus.prefix

    @abstractmethod
    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Sample:
        """Read sample `index`; every label is valid that no loss mask excludes.

        Raises:
            IndexError: the sample does not exist.
            CorpusError: it cannot be read.
        """
        return self._reader.sample(self.pieces(index), self.sequence_length)

    def pieces(self, index: int) -> list[Piece]:
        """Return the pieces of sample `index`, end to end; padding fills the rest of the sample.

        Raises:
            IndexError: the sample does not exist.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {self.name}, which has {len(self)}")
        return self._pieces(index)

    @abstractmethod
    def _pieces(self, index: int) -> list[Piece]: ...

    def _too_few_tokens(self, found: int, needed: int) -> CorpusError:
        return CorpusError(
            f"number of tokens in sequences [{self._start}, {self._stop}) of {self.name}",
            found,
            f"be at least {needed}",
            "give this set a larger share with --split, or use a larger corpus",
        )


class OrderedSamples(CorpusSamples):
    """Training samples in a seeded order over whole epochs.

    Args:
        corpus, start, stop, sequence_length, loss_mask, columns: see `CorpusSamples`.
        num_samples: least number of samples to lay out; None: one epoch.
        seed: seed of the order.
        cache: cache of the index; None keeps the index in memory.

    Attributes:
        num_epochs: number of epochs.
        num_left_out: samples of these epochs that were left out (see `SamplesWithLoss`).
        tokens_per_epoch: tokens of the sequences.

    Raises:
        ConfigError: a number is out of range.
        CorpusError: the sequences hold too few tokens, or the mask is of another corpus.
    """

    num_epochs: int
    num_left_out: int = 0

    def __init__(
        self,
        corpus: IndexedCorpus,
        start: int,
        stop: int,
        *,
        sequence_length: int,
        num_samples: int | None,
        seed: int,
        loss_mask: IndexedCorpus | None = None,
        columns: Mapping[str, IndexedCorpus] = MappingProxyType({}),
        cache: IndexCache | None = None,
    ) -> None:
        super().__init__(corpus, start, stop, sequence_length=sequence_length, loss_mask=loss_mask, columns=columns)
        if num_samples is not None and num_samples < 1:
            raise ConfigError("number of samples", num_samples, "be at least 1", "ask for one sample or more")
        if not 0 <= seed < 2**32:
            raise ConfigError("--seed", seed, "be in [0, 2**32)", "choose another seed")
        self.tokens_per_epoch = int(self._lengths.sum(dtype=np.int64))
        self._seed = seed
        self._cache = cache or IndexCache(None)
        self._lay_out(num_samples)

    @abstractmethod
    def _lay_out(self, num_samples: int | None) -> None:
        """Set `num_epochs` and whatever else the number of samples decides."""

    @property
    @abstractmethod
    def order_fingerprint(self) -> str:
        """SHA-256 of the samples and their order: equal if and only if both are equal."""

    @abstractmethod
    def trained_labels(self, trained: TrainedTokens) -> npt.NDArray[np.int64]:
        """Count the labels of each sample that the loss mask keeps, int64 [len]."""

    def _fingerprint(self, *settings: Any) -> str:
        """Hash the settings of an order and the lengths of the sequences, which represent their content."""
        digest = hashlib.sha256(repr(settings).encode())
        digest.update(np.ascontiguousarray(self._lengths).tobytes())
        return digest.hexdigest()
