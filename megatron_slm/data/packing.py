"""From documents to samples of `s + 1` tokens, in Megatron's GPTDataset order.

The documents of all epochs, shuffled, are one long stream of E * T tokens; sample k is the stream's tokens
[k * s, k * s + s], so neighbours share one token. Megatron walks the stream in a compiled loop; here the
token that starts a sample is found by a binary search in the cumulative document lengths, which needs no
table of samples and gives the same tokens, documents without a token included. What Megatron calls a document
here is a *sequence* of the corpus.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from megatron_slm.data.corpus.indexed import IndexedCorpus
from megatron_slm.data.index_cache import IndexCache
from megatron_slm.data.reading import Piece, Sample, SequenceReader
from megatron_slm.errors import ConfigError, CorpusError

SEPARATE_LAST_EPOCH_BELOW = 0.80
"""A last epoch that is used for less than this share is shuffled apart, else its documents all mix in."""


class Samples(Protocol):
    """Samples by position; what `MicroBatchSource` loads from."""

    @property
    def name(self) -> str:
        """Which corpus it is, for messages."""

    @property
    def sequence_length(self) -> int:
        """Inputs of a sample, `s`."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Sample: ...


def split_bounds(split: str, num_sequences: int) -> list[tuple[int, int]]:
    """The sequences [start, stop) of train, validation and test, as Megatron cuts `--split 969,30,1`.

    Args:
        split: up to three numbers >= 0; only their proportions count, missing ones are 0.
        num_sequences: sequences of the corpus.

    Returns:
        Three pairs; an empty set has start == stop.

    Raises:
        ConfigError: `split` is not such numbers.
    """
    weights = _shares(split)
    fractions: list[float] = (weights / weights.sum()).tolist()
    # Megatron adds the fractions up one by one and rounds half to even: the same here, to the last bit.
    edges = [0.0]
    for fraction in fractions:
        edges.append(edges[-1] + fraction)
    bounds = [round(edge * float(num_sequences)) for edge in edges]
    return list(itertools.pairwise(bounds))


def has_share(split: str, part: int) -> bool:
    """Whether a split gives train (0), validation (1) or test (2) anything at all.

    Raises:
        ConfigError: see `split_bounds`.
    """
    return bool(_shares(split)[part] > 0)


def _shares(split: str) -> npt.NDArray[np.float64]:
    rule = "must be one to three numbers >= 0, not all 0, with commas between"
    parts = re.split(r"\s*,\s*", split.strip())
    if not 1 <= len(parts) <= 3 or not all(re.fullmatch(r"\d+\.?\d*|\.\d+", part) for part in parts):
        raise ConfigError("split", split, rule, "for example 969,30,1")
    weights = np.array([float(part) for part in parts] + [0.0] * (3 - len(parts)), dtype=np.float64)
    if weights.sum() == 0:
        raise ConfigError("split", split, rule, "for example 969,30,1")
    return weights


class PackedSamples:
    """Training samples of the sequences [start, stop), in Megatron's order for these settings.

    Args:
        corpus: where the tokens are.
        start, stop: the sequences that may be used (see `split_bounds`).
        sequence_length: inputs of a sample, `s`.
        num_samples: how many will be asked for at least; decides the number of epochs E, the least with
            E * T >= num_samples * s + 1. None: one epoch.
        seed: seeds both shuffles.
        loss_mask: which tokens are trained on; None for all (see `SequenceReader`).
        cache: where the index is kept; None keeps it in memory.

    Attributes:
        num_epochs: E.

    Raises:
        ConfigError: a number is out of range.
        CorpusError: the sequences hold no token, or too few for one sample.
    """

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
        cache: IndexCache | None = None,
    ) -> None:
        check_range(corpus, start, stop, sequence_length)
        if num_samples is not None and num_samples < 1:
            raise ConfigError("num_samples", num_samples, "must be at least 1", "ask for one sample or more")
        if not 0 <= seed < 2**32:
            raise ConfigError("seed", seed, "must be within [0, 2**32)", "choose another seed")
        self.corpus = corpus
        self.sequence_length = sequence_length
        self.loss_mask, self._reader = loss_mask, SequenceReader(corpus, loss_mask)
        self._cache = cache or IndexCache(None)
        self.tokens_per_epoch = int(corpus.sequence_lengths[start:stop].sum(dtype=np.int64))
        if self.tokens_per_epoch < 1 or (num_samples is None and self.tokens_per_epoch <= sequence_length):
            raise too_few_tokens(corpus, start, stop, self.tokens_per_epoch, sequence_length + 1)
        wanted = 1 if num_samples is None else num_samples * sequence_length + 1
        self.num_epochs = max(1, -(-wanted // self.tokens_per_epoch))
        self._num_samples = (self.num_epochs * self.tokens_per_epoch - 1) // sequence_length
        self._first_part = self._samples_shuffled_first(num_samples)
        self._documents, self._seed = (start, stop), seed

    @cached_property
    def _indices(self) -> tuple[npt.NDArray[np.int32], npt.NDArray[Any], npt.NDArray[np.int64]]:
        """Document index, shuffle index and the stream's document ends: made on first use, since most ranks of a
        pipeline never read a sample."""

        def build() -> dict[str, npt.NDArray[Any]]:
            # One state for both shuffles, in this order: Megatron's order depends on it.
            state = np.random.RandomState(self._seed)
            documents = np.arange(*self._documents, dtype=np.int32)
            separate = self._first_part < self._num_samples
            document_index = _document_index(documents, self.num_epochs, separate, state)
            shuffle_index = _shuffle_index(self._first_part, self._num_samples, state)
            ends = np.cumsum(self.corpus.sequence_lengths[document_index], dtype=np.int64)
            return {"document_index": document_index, "shuffle_index": shuffle_index, "ends": ends}

        arrays = self._cache.arrays("concatenate", self.order_fingerprint, self.corpus, build)
        return arrays["document_index"], arrays["shuffle_index"], arrays["ends"]

    @property
    def document_index(self) -> npt.NDArray[np.int32]:
        """The sequence at every place of the shuffled stream, int32 [E * (stop - start)]."""
        return self._indices[0]

    @property
    def shuffle_index(self) -> npt.NDArray[Any]:
        """Sample k of the order is sample shuffle_index[k] of the stream, uint32 [len]."""
        return self._indices[1]

    @cached_property
    def order_fingerprint(self) -> str:
        """The same for two objects that give the same samples in the same order, else another (SHA-256).

        Everything that the order is made from goes into it; lengths stand for the corpus's content.
        """
        start, stop = self._documents
        made_from = (start, stop, self.sequence_length, self.num_epochs, self._first_part, self._seed)
        digest = hashlib.sha256(repr(made_from).encode())
        digest.update(np.ascontiguousarray(self.corpus.sequence_lengths[start:stop]).tobytes())
        return digest.hexdigest()

    @property
    def name(self) -> str:
        """The corpus's prefix."""
        return self.corpus.prefix

    def __len__(self) -> int:
        """All whole samples of the E epochs: at least the number that was asked for."""
        return self._num_samples

    def __getitem__(self, index: int, /) -> Sample:
        """Sample `index` of the order; every label is valid that no loss mask leaves out.

        Raises:
            IndexError: there is no such sample.
            CorpusError: it cannot be read.
        """
        return self._reader.sample(self.pieces(index), self.sequence_length)

    def pieces(self, index: int) -> list[Piece]:
        """What sample `index` is made of; its tokens are theirs, end to end.

        Raises:
            IndexError: there is no such sample.
        """
        if not 0 <= index < self._num_samples:
            raise IndexError(f"sample {index} of {self.name}, which has {self._num_samples}")
        position = int(self.shuffle_index[index]) * self.sequence_length
        document_index, _, ends = self._indices
        return _stream_pieces(self.corpus, document_index, ends, position, self.sequence_length + 1)

    def _samples_shuffled_first(self, num_samples: int | None) -> int:
        """Samples that are shuffled together first: all, or those before a last epoch that is little used.

        (A separate last epoch always adds a sample, so the result tells the two cases apart.)
        """
        if self.num_epochs == 1 or num_samples is None:
            return self._num_samples
        per_epoch = (self.tokens_per_epoch - 1) // self.sequence_length
        before_last = ((self.num_epochs - 1) * self.tokens_per_epoch - 1) // self.sequence_length
        separate = num_samples - before_last < int(SEPARATE_LAST_EPOCH_BELOW * per_epoch)
        return before_last if separate else self._num_samples


class SequentialSamples:
    """Held-out samples of the sequences [start, stop): in order, every token but the first a label once.

    The last sample is filled up with `PADDING_ID`, whose labels are not valid. (Megatron shuffles and repeats
    held-out documents too, so its validation loss depends on how many batches were asked for.)

    Args:
        corpus: where the tokens are.
        start, stop: the sequences (see `split_bounds`).
        sequence_length: inputs of a sample, `s`.
        loss_mask: which tokens count; None for all (see `SequenceReader`).

    Raises:
        ConfigError: a number is out of range.
        CorpusError: the sequences hold fewer than two tokens.
    """

    def __init__(
        self,
        corpus: IndexedCorpus,
        start: int,
        stop: int,
        *,
        sequence_length: int,
        loss_mask: IndexedCorpus | None = None,
    ) -> None:
        check_range(corpus, start, stop, sequence_length)
        self.corpus = corpus
        self._reader = SequenceReader(corpus, loss_mask)
        self.sequence_length = sequence_length
        self._documents = np.arange(start, stop, dtype=np.int64)
        self._ends = np.cumsum(corpus.sequence_lengths[start:stop], dtype=np.int64)
        self.num_tokens = int(self._ends[-1]) if self._ends.size else 0
        if self.num_tokens < 2:
            raise too_few_tokens(corpus, start, stop, self.num_tokens, 2)

    @property
    def name(self) -> str:
        """The corpus's prefix."""
        return self.corpus.prefix

    def __len__(self) -> int:
        """Samples, the padded last one included."""
        return -(-(self.num_tokens - 1) // self.sequence_length)

    def __getitem__(self, index: int, /) -> Sample:
        """Sample `index`: the tokens from `index * s` on.

        Raises:
            IndexError: there is no such sample.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {self.name}, which has {len(self)}")
        position = index * self.sequence_length
        count = min(self.sequence_length + 1, self.num_tokens - position)
        pieces = _stream_pieces(self.corpus, self._documents, self._ends, position, count)
        return self._reader.sample(pieces, self.sequence_length)


def _document_index(
    documents: npt.NDArray[np.int32], num_epochs: int, separate_last: bool, state: np.random.RandomState
) -> npt.NDArray[np.int32]:
    """Every epoch's documents, shuffled together; the last epoch's after all others when it is separate."""
    parts = (num_epochs - 1, 1) if separate_last else (num_epochs,)
    shuffled = []
    for epochs in parts:
        part = np.tile(documents, epochs)
        state.shuffle(part)
        shuffled.append(part)
    return np.concatenate(shuffled)


def _shuffle_index(first: int, total: int, state: np.random.RandomState) -> npt.NDArray[Any]:
    """A permutation of [0, total) that keeps [0, first) and [first, total) apart."""
    dtype = np.int64 if total >= np.iinfo(np.uint32).max - 1 else np.uint32
    index = np.arange(total, dtype=dtype)
    state.shuffle(index[:first])
    if first < total:
        state.shuffle(index[first:])
    return index


def _stream_pieces(
    corpus: IndexedCorpus, documents: npt.NDArray[Any], ends: npt.NDArray[np.int64], position: int, count: int
) -> list[Piece]:
    """Tokens [position, position + count) of the documents laid end to end, as pieces of sequences.

    Args:
        corpus: where the tokens are.
        documents: the sequence at every place [D].
        ends: the stream position behind every place, int64 [D], non-decreasing.
        position: first token; position + count <= ends[-1].
        count: number of tokens.
    """
    pieces = []
    # The first place that ends behind the position; places without a token never do.
    place = int(np.searchsorted(ends, position, side="right"))
    while count:
        document, end = int(documents[place]), int(ends[place])
        take = min(end - position, count)
        if take:
            pieces.append(Piece(document, int(corpus.sequence_lengths[document]) - (end - position), take))
        count, position, place = count - take, position + take, place + 1
    return pieces


def check_range(corpus: IndexedCorpus, start: int, stop: int, sequence_length: int) -> None:
    """Refuse a sample without a token, and sequences that the corpus does not have.

    Raises:
        ConfigError: a number is out of range.
    """
    if sequence_length < 1:
        raise ConfigError("sequence_length", sequence_length, "must be at least 1", "give --seq-length")
    if not 0 <= start <= stop <= corpus.num_sequences:
        raise ConfigError(
            "sequences",
            (start, stop),
            f"must lie within the {corpus.num_sequences} of {corpus.prefix}",
            "see --split",
        )


def too_few_tokens(corpus: IndexedCorpus, start: int, stop: int, found: int, needed: int) -> CorpusError:
    """The error of a set that is too small."""
    return CorpusError(
        f"tokens in sequences [{start}, {stop}) of {corpus.prefix}",
        found,
        f"must be at least {needed}",
        "give this set a larger share with --split, or use a larger corpus",
    )
