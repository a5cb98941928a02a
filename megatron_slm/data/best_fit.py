"""Whole documents packed into samples, best fit first (arXiv 2404.10830), the rest of a sample padding.

Every epoch packs the same lengths, so it has the same number of samples; which documents share one, and the order of
the samples, are drawn anew. Epochs follow each other for as long as samples are asked for, so the order does not depend
on how many that is.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_slm.data.corpus.indexed import IndexedCorpus
from megatron_slm.data.index_cache import Arrays, IndexCache
from megatron_slm.data.packing import check_range, too_few_tokens
from megatron_slm.data.reading import Piece, Sample, SequenceReader
from megatron_slm.errors import ConfigError

_EPOCHS_HELD = 2


class BestFitSamples:
    """Training samples of the sequences [start, stop), each made of whole documents.

    A document longer than a sample is cut into samples that overlap by one token, so that no label is lost; one
    with fewer than two tokens has no label and is left out.

    Args:
        corpus, start, stop, sequence_length, seed, loss_mask, cache: see `PackedSamples`.
        num_samples: how many will be asked for; None: one epoch.

    Raises:
        ConfigError: a number is out of range.
        CorpusError: no document has two tokens.
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
        if not 0 <= seed < 2**32:
            raise ConfigError("seed", seed, "must be within [0, 2**32)", "choose another seed")
        self.corpus, self.sequence_length = corpus, sequence_length
        self._documents, self._seed = (start, stop), seed
        self.loss_mask, self._reader = loss_mask, SequenceReader(corpus, loss_mask)
        self._cache = cache or IndexCache(None)
        lengths = corpus.sequence_lengths[start:stop]
        self.tokens_per_epoch = int(lengths.sum(dtype=np.int64))
        sized = self._cache.arrays("best-fit-size", self.order_fingerprint, corpus, self._size)
        self.samples_per_epoch = int(sized["samples"][0])
        if self.samples_per_epoch == 0:
            raise too_few_tokens(corpus, start, stop, int(lengths.max(initial=0)), 2)
        self.num_epochs = -(-(num_samples or 1) // self.samples_per_epoch)
        self._epochs: OrderedDict[int, Arrays] = OrderedDict()

    @cached_property
    def order_fingerprint(self) -> str:
        """The same for two objects that give the same samples in the same order, else another (SHA-256)."""
        start, stop = self._documents
        digest = hashlib.sha256(repr(("best-fit", start, stop, self.sequence_length, self._seed)).encode())
        digest.update(np.ascontiguousarray(self.corpus.sequence_lengths[start:stop]).tobytes())
        return digest.hexdigest()

    @property
    def name(self) -> str:
        """The corpus's prefix."""
        return self.corpus.prefix

    def __len__(self) -> int:
        """All samples of the epochs: at least the number that was asked for."""
        return self.num_epochs * self.samples_per_epoch

    def __getitem__(self, index: int, /) -> Sample:
        """Sample `index` of the order.

        Raises:
            IndexError: there is no such sample.
            CorpusError: it cannot be read.
        """
        return self._reader.sample(self.pieces(index), self.sequence_length)

    def pieces(self, index: int) -> list[Piece]:
        """What sample `index` is made of; padding follows them.

        Raises:
            IndexError: there is no such sample.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {self.name}, which has {len(self)}")
        epoch, place = divmod(index, self.samples_per_epoch)
        arrays = self._epoch(epoch)
        begin, end = arrays["bin_ends"][place : place + 2].tolist()
        return [Piece(*row) for row in arrays["pieces"][begin:end].tolist()]

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
        """How many samples an epoch fills; it depends on the documents' lengths alone."""
        lengths = self.corpus.sequence_lengths[slice(*self._documents)]
        sizes = -np.sort(-_pieces(lengths, self.sequence_length, 0)[:, 2])
        return {"samples": best_fit(sizes, self.sequence_length + 1).max(initial=-1, keepdims=True) + 1}

    def _build(self, epoch: int) -> Arrays:
        """Pieces, int64 [P, 3], sample after sample, and where each sample's end, int64 [samples + 1]."""
        generator = np.random.default_rng([self._seed, epoch])
        start, _ = self._documents
        pieces = _pieces(self.corpus.sequence_lengths[slice(*self._documents)], self.sequence_length, start)
        # equal lengths change places among themselves: shuffled, then sorted by length alone
        pieces = pieces[generator.permutation(len(pieces))]
        pieces = pieces[np.argsort(-pieces[:, 2], kind="stable")]
        bin_of = best_fit(pieces[:, 2], self.sequence_length + 1)
        bin_of = generator.permutation(self.samples_per_epoch)[bin_of]
        order = np.lexsort((generator.random(len(pieces)), bin_of))
        ends = np.concatenate([[0], np.cumsum(np.bincount(bin_of, minlength=self.samples_per_epoch))])
        return {"pieces": pieces[order], "bin_ends": ends}


def _pieces(lengths: npt.NDArray[np.int32], sequence_length: int, first: int) -> npt.NDArray[np.int64]:
    """All documents that have a label, cut where they are too long: (sequence, offset, length) int64 [P, 3]."""
    count = np.maximum(0, -(-(lengths.astype(np.int64) - 1) // sequence_length))
    sequence = np.repeat(np.arange(len(lengths), dtype=np.int64), count)
    before = np.repeat(np.cumsum(count) - count, count)
    offset = (np.arange(len(sequence), dtype=np.int64) - before) * sequence_length
    length = np.minimum(sequence_length + 1, lengths[sequence] - offset)
    return np.stack([sequence + first, offset, length], axis=1)


def best_fit(sizes: npt.NDArray[Any], capacity: int) -> npt.NDArray[np.int64]:
    """Put each of the sizes into the fullest bin that still has room for it, else into a new one.

    All of one size are placed at once: the fullest bin that takes one of them stays the fullest that takes the next,
    until it is full, so bins are filled by floor(room / size) each.

    Args:
        sizes: falling, each within [1, capacity], int [P].

    Returns:
        the bin of each, int64 [P].
    """
    bin_of = np.empty(len(sizes), dtype=np.int64)
    rooms: dict[int, list[npt.NDArray[np.int64]]] = {}  # room left: the bins that have it
    values, first, counts = np.unique(-sizes, return_index=True, return_counts=True)
    num_bins = 0
    for size, at, left in zip((-values).tolist(), first.tolist(), counts.tolist(), strict=True):
        for room in sorted(r for r in rooms if r >= size):
            if not left:
                break
            bins = np.concatenate(rooms.pop(room))
            each = room // size
            used, rest = bins[: -(-left // each)], bins[-(-left // each) :]
            at, left = _place(bin_of, used, each, size, room, at, left, rooms)
            if rest.size:
                rooms.setdefault(room, []).append(rest)
        if left:
            each = capacity // size
            new = np.arange(num_bins, num_bins - (-left // each), dtype=np.int64)
            num_bins += len(new)
            _place(bin_of, new, each, size, capacity, at, left, rooms)
    return bin_of


def _place(
    bin_of: npt.NDArray[np.int64],
    bins: npt.NDArray[np.int64],
    each: int,
    size: int,
    room: int,
    at: int,
    left: int,
    rooms: dict[int, list[npt.NDArray[np.int64]]],
) -> tuple[int, int]:
    """Fill `bins` with `each` pieces a bin, the last one perhaps with fewer; the next piece, and how many are left."""
    placed = np.repeat(bins, each)[:left]
    bin_of[at : at + len(placed)] = placed
    whole, part = divmod(len(placed), each)
    for filled, group in ((each, bins[:whole]), (part, bins[whole:])):
        remaining = room - filled * size
        if group.size and remaining:
            rooms.setdefault(remaining, []).append(group)
    return at + len(placed), left - len(placed)
