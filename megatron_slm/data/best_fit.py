"""Packs whole documents into samples, best fit first (arXiv 2404.10830); padding fills the rest of a sample.

Every epoch packs the same lengths, so it has the same number of samples; which documents share a sample, and the order
of the samples, are drawn anew. Epochs follow each other until there are enough samples, so the order does not depend on
the number of samples.
"""

from __future__ import annotations

from collections import OrderedDict
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
from typing_extensions import override

from megatron_slm.arithmetic import ceil_div
from megatron_slm.data.index_cache import Arrays
from megatron_slm.data.reading import Piece
from megatron_slm.data.samples import OrderedSamples
from megatron_slm.data.trained_tokens import TrainedTokens

_EPOCHS_HELD = 2


class BestFitSamples(OrderedSamples):
    """Training samples of the sequences [start, stop), each made of whole documents.

    A document longer than a sample is cut into pieces that overlap by one token, so that no label is lost; one with
    fewer than two tokens has no label and is skipped.
    """

    @override
    def _lay_out(self, num_samples: int | None) -> None:
        sized = self._cache.arrays("best-fit-size", self.order_fingerprint, self.corpus, self._size)
        self.samples_per_epoch = int(sized["samples"][0])
        if self.samples_per_epoch == 0:
            raise self._too_few_tokens(int(self._lengths.max(initial=0)), 2)
        self.num_epochs = ceil_div(num_samples or 1, self.samples_per_epoch)
        self._epochs: OrderedDict[int, Arrays] = OrderedDict()

    @cached_property
    @override
    def order_fingerprint(self) -> str:
        return self._fingerprint("best-fit", self._start, self._stop, self.sequence_length, self._seed)

    @override
    def __len__(self) -> int:
        """All samples of the epochs: at least `num_samples`."""
        return self.num_epochs * self.samples_per_epoch

    @override
    def _pieces(self, index: int) -> list[Piece]:
        epoch, place = divmod(index, self.samples_per_epoch)
        arrays = self._epoch(epoch)
        begin, end = arrays["bin_ends"][place : place + 2].tolist()
        return [Piece(*row) for row in arrays["pieces"][begin:end].tolist()]

    @override
    def trained_labels(self, trained: TrainedTokens) -> npt.NDArray[np.int64]:
        counts = []
        for epoch in range(self.num_epochs):
            arrays = self._epoch(epoch)
            sequences, offsets, lengths = arrays["pieces"].T
            ends = arrays["bin_ends"]
            # As in `SequenceReader.sample`: a sample's first token is no label, nor the one that pieces overlap by.
            skipped = (offsets > 0).astype(np.int64)
            skipped[ends[:-1]] = 1
            in_pieces = trained.in_pieces(sequences, offsets + skipped, lengths - skipped)
            counts.append(np.diff(np.concatenate([np.zeros(1, np.int64), np.cumsum(in_pieces)])[ends]))
        return np.concatenate(counts)

    def _epoch(self, epoch: int) -> Arrays:
        held = self._epochs.get(epoch)
        if held is None:
            made_from = f"{self.order_fingerprint} {epoch}"
            held = self._cache.arrays("best-fit", made_from, self.corpus, lambda: self._build(epoch))
            self._epochs[epoch] = held
            if len(self._epochs) > _EPOCHS_HELD:
                self._epochs.popitem(last=False)
        return held

    def _size(self) -> Arrays:
        """Count the samples of an epoch, which depend on the documents' lengths alone."""
        sizes = -np.sort(-_cut_documents(self._lengths, self.sequence_length, 0)[:, 2])
        return {"samples": best_fit(sizes, self.sequence_length + 1).max(initial=-1, keepdims=True) + 1}

    def _build(self, epoch: int) -> Arrays:
        """Return pieces, int64 [P, 3], sample after sample, and the first piece of each sample, int64 [samples + 1]."""
        generator = np.random.default_rng([self._seed, epoch])
        pieces = _cut_documents(self._lengths, self.sequence_length, self._start)
        # a stable sort by length after the shuffle permutes pieces of equal length
        pieces = pieces[generator.permutation(len(pieces))]
        pieces = pieces[np.argsort(-pieces[:, 2], kind="stable")]
        bin_of = best_fit(pieces[:, 2], self.sequence_length + 1)
        bin_of = generator.permutation(self.samples_per_epoch)[bin_of]
        order = np.lexsort((generator.random(len(pieces)), bin_of))
        ends = np.concatenate([[0], np.cumsum(np.bincount(bin_of, minlength=self.samples_per_epoch))])
        return {"pieces": pieces[order], "bin_ends": ends}


def _cut_documents(lengths: npt.NDArray[np.int32], sequence_length: int, first: int) -> npt.NDArray[np.int64]:
    """Return the pieces of all documents that have a label: (sequence, offset, length), int64 [P, 3]."""
    # ceil((length - 1) / sequence_length) pieces, 0 for a document without a label
    count = np.maximum(0, (lengths.astype(np.int64) + sequence_length - 2) // sequence_length)
    sequence = np.repeat(np.arange(len(lengths), dtype=np.int64), count)
    before = np.repeat(np.cumsum(count) - count, count)
    offset = (np.arange(len(sequence), dtype=np.int64) - before) * sequence_length
    length = np.minimum(sequence_length + 1, lengths[sequence] - offset)
    return np.stack([sequence + first, offset, length], axis=1)


def best_fit(sizes: npt.NDArray[Any], capacity: int) -> npt.NDArray[np.int64]:
    """Put each size into the fullest bin that has room for it, else into a new one.

    Equal sizes are placed together: the fullest bin that takes one of them stays the fullest that takes the next, until
    it has no room, so each bin takes floor(room / size) of them.

    Args:
        sizes: falling, each in [1, capacity], int [P].

    Returns:
        the bin of each size, int64 [P].
    """
    placed: list[npt.NDArray[np.int64]] = []
    bins_by_room: dict[int, list[npt.NDArray[np.int64]]] = {}
    num_bins = 0
    values, counts = np.unique(-sizes, return_counts=True)
    for size, left in zip((-values).tolist(), counts.tolist(), strict=True):
        for room in sorted(room for room in bins_by_room if room >= size):
            if not left:
                break
            bins = np.concatenate(bins_by_room.pop(room))
            num_used = ceil_div(left, room // size)
            _record_room(bins_by_room, room, bins[num_used:])
            placed.append(_fill(bins_by_room, bins[:num_used], size, room, left))
            left -= len(placed[-1])
        if left:
            num_new = ceil_div(left, capacity // size)
            new = np.arange(num_bins, num_bins + num_new, dtype=np.int64)
            num_bins += num_new
            placed.append(_fill(bins_by_room, new, size, capacity, left))
    return np.concatenate(placed) if placed else np.empty(0, np.int64)


def _fill(
    bins_by_room: dict[int, list[npt.NDArray[np.int64]]],
    bins: npt.NDArray[np.int64],
    size: int,
    room: int,
    left: int,
) -> npt.NDArray[np.int64]:
    """Fill bins of equal room with at most `left` pieces of one size; return the bin of each piece placed."""
    each = room // size
    placed = np.repeat(bins, each)[:left]
    num_full, num_in_last = divmod(len(placed), each)
    _record_room(bins_by_room, room - each * size, bins[:num_full])
    _record_room(bins_by_room, room - num_in_last * size, bins[num_full:])
    return placed


def _record_room(bins_by_room: dict[int, list[npt.NDArray[np.int64]]], room: int, bins: npt.NDArray[np.int64]) -> None:
    """Record the room left in bins; full bins are dropped."""
    if bins.size and room:
        bins_by_room.setdefault(room, []).append(bins)
