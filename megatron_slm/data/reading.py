"""Pieces of a corpus's sequences, read with a bounded number of retries.

Tokens come by positioned reads, not through a mapping: where a disk fails or a file was cut, a read is an error
that can be retried and named, and a mapping is a signal that kills the process. The operating system caches both.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from io import FileIO
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from megatron_slm.data.corpus.indexed import IndexedCorpus, bin_path, idx_path
from megatron_slm.errors import CorpusError

logger = logging.getLogger(__name__)

PADDING_ID = 0
"""Fills a sample's end: any id the embedding has; its labels are never valid."""

RETRY_SECONDS = (0.5, 2.0, 8.0)
"""How long is waited before each further attempt to read; after the last one the read has failed."""


class Piece(NamedTuple):
    """Neighbouring tokens of one sequence."""

    sequence: int
    offset: int
    """Its first token within the sequence."""
    length: int


class Sample(NamedTuple):
    """One sample: `s` inputs and their labels, overlapping."""

    tokens: npt.NDArray[np.int64]
    """int64 [s + 1]: inputs are [:-1], labels are [1:]."""
    valid: npt.NDArray[np.bool_]
    """bool [s]: True where the label counts."""
    starts: npt.NDArray[np.int64]
    """Where in `tokens` a document starts, or padding, ascending; 0, where the sample starts, is left out."""
    source: int = 0
    """Which of the run's corpora it is from."""


class SequenceReader:
    """Reads the tokens of one corpus, and which of them are trained on.

    Args:
        corpus: the tokens.
        loss_mask: as many 0 and 1 for each of its sequences; None where every token is trained on.

    Raises:
        CorpusError: the mask is not one of this corpus.
    """

    def __init__(self, corpus: IndexedCorpus, loss_mask: IndexedCorpus | None = None) -> None:
        self.corpus, self.loss_mask = corpus, loss_mask
        self._files = [_TokenFile(corpus)]
        if loss_mask is not None:
            _check_mask(corpus, loss_mask)
            self._files.append(_TokenFile(loss_mask))

    def sample(self, pieces: Sequence[Piece], sequence_length: int) -> Sample:
        """The pieces one after the other as a sample; what they do not fill is padding.

        Raises:
            CorpusError: they cannot be read, also not after retries.
        """
        tokens = np.full(sequence_length + 1, PADDING_ID, dtype=np.int64)
        trained = np.zeros(sequence_length + 1, dtype=np.bool_)
        starts, filled = [], 0
        for piece in pieces:
            if filled:
                starts.append(filled)
            place = slice(filled, filled + piece.length)
            tokens[place] = self._files[0].read(piece)
            trained[place] = True if self.loss_mask is None else self._files[1].read(piece) != 0
            if filled and piece.offset:  # its first token was a label in the piece before, behind its own context
                trained[filled] = False
            filled += piece.length
        if filled <= sequence_length:
            starts.append(filled)
        return Sample(tokens, trained[1:], np.array(starts, dtype=np.int64))


class _TokenFile:
    """A `.bin` that is opened on first use, and again after an error. Threads may share it."""

    def __init__(self, corpus: IndexedCorpus) -> None:
        self._corpus, self._path = corpus, bin_path(corpus.prefix)
        self._file: FileIO | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None}

    def read(self, piece: Piece) -> npt.NDArray[Any]:
        """The tokens of a piece, in the corpus's dtype."""
        dtype = self._corpus.dtype
        start = int(self._corpus.sequence_pointers[piece.sequence]) + piece.offset * dtype.itemsize
        count = piece.length * dtype.itemsize
        for wait_seconds in (*RETRY_SECONDS, None):
            try:
                return np.frombuffer(self._pread(start, count), dtype=dtype)
            except OSError as error:
                self._file = None  # closed when no thread reads from it any more
                if wait_seconds is None:
                    raise self._unreadable(piece, error) from error
                logger.warning("%s could not be read (%s); trying again", self._path, error.strerror or error)
                time.sleep(wait_seconds)
        raise AssertionError("the last attempt returns or raises")

    def _pread(self, start: int, count: int) -> bytes:
        file = self._file = self._file or FileIO(self._path)
        parts, missing = [], count
        while missing:
            part = os.pread(file.fileno(), missing, start + count - missing)
            if not part:
                raise OSError(f"it ends at byte {os.fstat(file.fileno()).st_size}, before byte {start + count}")
            parts.append(part)
            missing -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _unreadable(self, piece: Piece, error: OSError) -> CorpusError:
        return CorpusError(
            str(self._path),
            f"sequence {piece.sequence}, tokens from {piece.offset} on: {error.strerror or error}",
            f"can be read (tried {len(RETRY_SECONDS) + 1} times)",
            "look at the disk or the network share; then resume with --load: no sample was left out",
        )


def _check_mask(corpus: IndexedCorpus, mask: IndexedCorpus) -> None:
    if mask.num_sequences == corpus.num_sequences:
        differ = np.flatnonzero(mask.sequence_lengths != corpus.sequence_lengths)
        if differ.size == 0:
            return
        at = int(differ[0])
        field, found, wanted = f"length of sequence {at}", mask.sequence_lengths[at], corpus.sequence_lengths[at]
    else:
        field, found, wanted = "sequences", mask.num_sequences, corpus.num_sequences
    raise CorpusError(
        f"loss mask {idx_path(mask.prefix)}: {field}",
        int(found),
        f"is that of {idx_path(corpus.prefix)} ({int(wanted)})",
        "preprocess both together, or remove the loss mask",
    )
