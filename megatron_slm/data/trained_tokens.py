"""Counts the trained tokens in ranges of a loss mask."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_slm.data.corpus.indexed import IndexedCorpus, bin_path

_WORD_BITS = 64
_READ_TOKENS = 1 << 24
"""Tokens of a mask that are read at a time; a multiple of `_WORD_BITS`."""


class TrainedTokens:
    """Trained tokens of a corpus, as a bit each and their running count: a quarter of a byte a token.

    Args:
        mask: corpus of 0 and 1, whose sequences are those of the corpus.
    """

    def __init__(self, mask: IndexedCorpus) -> None:
        self._starts = mask.sequence_pointers // mask.dtype.itemsize
        self._words = np.concatenate([np.zeros(0, np.uint64), *_words(mask)])
        counts = np.bitwise_count(self._words)
        self._before = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts, dtype=np.int64)])

    def in_pieces(
        self, sequences: npt.NDArray[Any], offsets: npt.NDArray[Any], lengths: npt.NDArray[Any]
    ) -> npt.NDArray[np.int64]:
        """Count the trained tokens in pieces of sequences, int64 [pieces]; lengths below 1 count nothing."""
        begins = self._starts[sequences] + offsets
        return self._up_to(begins + np.maximum(0, lengths)) - self._up_to(begins)

    def _up_to(self, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Count the trained tokens before positions in the file."""
        word, bit = np.divmod(positions, _WORD_BITS)
        below = (np.uint64(1) << bit.astype(np.uint64)) - np.uint64(1)
        padded = np.append(self._words, np.uint64(0))  # for the position at the file's end
        counted: npt.NDArray[np.int64] = self._before[word] + np.bitwise_count(padded[word] & below)
        return counted


def _words(mask: IndexedCorpus) -> Iterator[npt.NDArray[np.uint64]]:
    """Yield a mask's tokens as bits, the first token lowest, in words of 64."""
    with bin_path(mask.prefix).open("rb") as file:
        while (tokens := np.fromfile(file, mask.dtype, _READ_TOKENS)).size:
            bits = np.packbits(tokens != 0, bitorder="little")
            whole = np.zeros(-(-bits.size // 8) * 8, np.uint8)
            whole[: bits.size] = bits
            yield whole.view("<u8").astype(np.uint64)
