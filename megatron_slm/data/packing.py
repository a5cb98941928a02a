"""Packs documents into samples of `s + 1` tokens, in the order of Megatron's GPTDataset.

The documents of all epochs, shuffled, form one stream of E * T tokens; sample k is the stream's tokens
[k * s, k * s + s], so neighbors share one token. Megatron walks the stream in a compiled loop; here a binary search in
the cumulative document lengths finds the token that starts a sample. It needs no table of samples and yields the same
tokens, also with documents without a token. A document in Megatron's sense here is a *sequence* of the corpus.
"""

from __future__ import annotations

import itertools
import re
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import psutil
from typing_extensions import override

from megatron_slm.arithmetic import ceil_div
from megatron_slm.data.corpus.indexed import IndexedCorpus
from megatron_slm.data.index_cache import Arrays
from megatron_slm.data.reading import Piece, Rewrite, Sample
from megatron_slm.data.samples import CorpusSamples, OrderedSamples
from megatron_slm.data.trained_tokens import TrainedTokens
from megatron_slm.errors import ConfigError

SEPARATE_LAST_EPOCH_BELOW = 0.80
"""A last epoch that is used for less than this share is shuffled separately, else together with the others."""
_LEAST_BYTES_PER_DOCUMENT = 12
"""Of an index, in memory while it is built: the document's number and its end in the stream."""
_BYTES_PER_SAMPLE = 4


def split_bounds(split: str, num_sequences: int) -> list[tuple[int, int]]:
    """Return the sequences [start, stop) of train, validation and test, as Megatron cuts `--split 969,30,1`.

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
    """Return True if a split has a share above 0 for train (0), validation (1) or test (2).

    Raises:
        ConfigError: see `split_bounds`.
    """
    return bool(_shares(split)[part] > 0)


def _shares(split: str) -> npt.NDArray[np.float64]:
    numbers = re.split(r"\s*,\s*", split.strip())
    are_valid = 1 <= len(numbers) <= 3 and all(re.fullmatch(r"\d+\.?\d*|\.\d+", number) for number in numbers)
    weights = np.zeros(3)
    if are_valid:
        weights[: len(numbers)] = [float(number) for number in numbers]
    if weights.sum() == 0:
        rule = "be one to three numbers >= 0, not all 0, separated by commas"
        raise ConfigError("--split", split, rule, "write for example 969,30,1")
    return weights


class PackedSamples(OrderedSamples):
    """Training samples of the sequences [start, stop), in Megatron's order for these settings.

    The number of epochs E is the least with E * T >= num_samples * s + 1, where T is the number of tokens.
    """

    @override
    def _lay_out(self, num_samples: int | None) -> None:
        if self.tokens_per_epoch < 1 or (num_samples is None and self.tokens_per_epoch <= self.sequence_length):
            raise self._too_few_tokens(self.tokens_per_epoch, self.sequence_length + 1)
        wanted = 1 if num_samples is None else num_samples * self.sequence_length + 1
        self.num_epochs = max(1, ceil_div(wanted, self.tokens_per_epoch))
        self._num_samples = (self.num_epochs * self.tokens_per_epoch - 1) // self.sequence_length
        self._num_shuffled_first = self._samples_shuffled_first(num_samples)

    def _check_index_size(self) -> None:
        """Refuse to build an index that is larger than memory, before the system kills the process without a word.

        Raises:
            ConfigError: it is.
        """
        entries = self.num_epochs * (self._stop - self._start)
        needed = _LEAST_BYTES_PER_DOCUMENT * entries + _BYTES_PER_SAMPLE * self._num_samples
        memory = psutil.virtual_memory().total
        if needed > memory:
            raise ConfigError(
                f"order of {self.name}",
                f"{self.num_epochs:,} epochs of {self._stop - self._start:,} documents",
                f"have an index that fits into memory: it has {needed / 2**30:,.1f} GiB, and there are"
                f" {memory / 2**30:,.1f} GiB",
                "train on fewer samples or a larger corpus, or use --packing best-fit, with an index for each epoch",
            )

    @cached_property
    def _indices(self) -> Arrays:
        """Document index, shuffle index and the stream's document ends, built on first use: most ranks of a pipeline
        never read a sample."""

        def build() -> Arrays:
            self._check_index_size()
            # One state for both shuffles, in this order: Megatron's order depends on it.
            state = np.random.RandomState(self._seed)
            documents = _numbers(self._start, self._stop)
            separate_last = self._num_shuffled_first < self._num_samples
            document_index = _document_index(documents, self.num_epochs, separate_last, state)
            shuffle_index = _shuffle_index(self._num_shuffled_first, self._num_samples, state)
            ends = np.cumsum(self.corpus.sequence_lengths[document_index], dtype=np.int64)
            return {"document_index": document_index, "shuffle_index": shuffle_index, "ends": ends}

        return self._cache.arrays("concatenate", self.order_fingerprint, self.corpus, build)

    @property
    def document_index(self) -> npt.NDArray[Any]:
        """The sequence at every position of the shuffled stream, int32 or int64 [E * (stop - start)]."""
        return self._indices["document_index"]

    @property
    def shuffle_index(self) -> npt.NDArray[Any]:
        """Sample k of the order is sample shuffle_index[k] of the stream, uint32 [len]."""
        return self._indices["shuffle_index"]

    @cached_property
    @override
    def order_fingerprint(self) -> str:
        return self._fingerprint(
            self._start, self._stop, self.sequence_length, self.num_epochs, self._num_shuffled_first, self._seed
        )

    @override
    def __len__(self) -> int:
        """All whole samples of the E epochs: at least `num_samples`."""
        return self._num_samples

    @override
    def _pieces(self, index: int) -> list[Piece]:
        arrays = self._indices
        position = int(arrays["shuffle_index"][index]) * self.sequence_length
        count = self.sequence_length + 1
        return _stream_pieces(self.corpus, arrays["document_index"], arrays["ends"], position, count)

    @override
    def trained_labels(self, trained: TrainedTokens) -> npt.NDArray[np.int64]:
        document_index, shuffle_index, ends = self.document_index, self.shuffle_index, self._indices["ends"]
        lengths = self.corpus.sequence_lengths
        in_documents = trained.in_pieces(document_index, np.zeros_like(ends), lengths[document_index])
        before = np.concatenate([np.zeros(1, np.int64), np.cumsum(in_documents)])

        def up_to(positions: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
            places = np.minimum(np.searchsorted(ends, positions, side="right"), len(ends) - 1)
            documents = document_index[places]
            taken = lengths[documents] - (ends[places] - positions)
            counts: npt.NDArray[np.int64] = before[places] + trained.in_pieces(documents, np.zeros_like(taken), taken)
            return counts

        first_label = shuffle_index.astype(np.int64) * self.sequence_length + 1
        return up_to(first_label + self.sequence_length) - up_to(first_label)

    def _samples_shuffled_first(self, num_samples: int | None) -> int:
        """Return the number of samples that are shuffled first: all, or those before a little-used last epoch.

        A separate last epoch always adds a sample, so the result distinguishes the two cases.
        """
        if self.num_epochs == 1 or num_samples is None:
            return self._num_samples
        per_epoch = (self.tokens_per_epoch - 1) // self.sequence_length
        before_last = ((self.num_epochs - 1) * self.tokens_per_epoch - 1) // self.sequence_length
        separate = num_samples - before_last < int(SEPARATE_LAST_EPOCH_BELOW * per_epoch)
        return before_last if separate else self._num_samples


class SequentialSamples(CorpusSamples):
    """Held-out samples of the sequences [start, stop): in order, every token but the first a label once.

    The last sample is padded with `PADDING_ID`, whose labels are not valid. (Megatron shuffles and repeats held-out
    documents too, so its validation loss depends on the number of batches.)

    Args:
        corpus, start, stop, sequence_length, loss_mask: see `CorpusSamples`.
        rewrite: makes of each sample, by its number, the one that is evaluated; None: it stays as it is.

    Raises:
        ConfigError: a number is out of range.
        CorpusError: the sequences hold fewer than two tokens, or the mask is of another corpus.
    """

    def __init__(
        self,
        corpus: IndexedCorpus,
        start: int,
        stop: int,
        *,
        sequence_length: int,
        loss_mask: IndexedCorpus | None = None,
        rewrite: Rewrite | None = None,
    ) -> None:
        super().__init__(corpus, start, stop, sequence_length=sequence_length, loss_mask=loss_mask)
        self._rewrite = rewrite
        self._documents = np.arange(start, stop, dtype=np.int64)
        self._ends = np.cumsum(self._lengths, dtype=np.int64)
        self.num_tokens = int(self._ends[-1]) if self._ends.size else 0
        if self.num_tokens < 2:
            raise self._too_few_tokens(self.num_tokens, 2)

    @override
    def __len__(self) -> int:
        """Samples, the padded last one included."""
        return ceil_div(self.num_tokens - 1, self.sequence_length)

    @override
    def __getitem__(self, index: int, /) -> Sample:
        sample = super().__getitem__(index)
        return sample if self._rewrite is None else self._rewrite(sample, index)

    @override
    def _pieces(self, index: int) -> list[Piece]:
        position = index * self.sequence_length
        count = min(self.sequence_length + 1, self.num_tokens - position)
        return _stream_pieces(self.corpus, self._documents, self._ends, position, count)


def _numbers(start: int, stop: int) -> npt.NDArray[Any]:
    """Return the numbers [start, stop), int32 as in Megatron, or int64 where int32 would wrap around."""
    dtype = np.int32 if stop - 1 <= np.iinfo(np.int32).max else np.int64
    return np.arange(start, stop, dtype=dtype)


def _document_index(
    documents: npt.NDArray[Any], num_epochs: int, separate_last: bool, state: np.random.RandomState
) -> npt.NDArray[Any]:
    """Shuffle the documents of all epochs together, or those of a separate last epoch after all others."""
    epochs_shuffled_together = (num_epochs - 1, 1) if separate_last else (num_epochs,)
    shuffled = []
    for epochs in epochs_shuffled_together:
        index = np.tile(documents, epochs)
        state.shuffle(index)
        shuffled.append(index)
    return np.concatenate(shuffled)


def _shuffle_index(first: int, total: int, state: np.random.RandomState) -> npt.NDArray[Any]:
    """Return a permutation of [0, total) that keeps [0, first) and [first, total) apart."""
    dtype = np.int64 if total >= np.iinfo(np.uint32).max - 1 else np.uint32
    index = np.arange(total, dtype=dtype)
    state.shuffle(index[:first])
    if first < total:
        state.shuffle(index[first:])
    return index


def _stream_pieces(
    corpus: IndexedCorpus, documents: npt.NDArray[Any], ends: npt.NDArray[np.int64], position: int, count: int
) -> list[Piece]:
    """Return tokens [position, position + count) of a stream of documents, as pieces of sequences.

    Args:
        corpus: source of the tokens.
        documents: the sequence at every place of the stream, [D].
        ends: the position after every place, int64 [D], non-decreasing.
        position: first token; position + count <= ends[-1].
        count: number of tokens.
    """
    pieces = []
    # The first place that ends after the position; places without a token never do.
    place = int(np.searchsorted(ends, position, side="right"))
    while count:
        document, end = int(documents[place]), int(ends[place])
        take = min(end - position, count)
        if take:
            pieces.append(Piece(document, int(corpus.sequence_lengths[document]) - (end - position), take))
        count, position, place = count - take, position + take, place + 1
    return pieces
