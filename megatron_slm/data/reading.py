"""Reads pieces of a corpus's sequences into samples, with a bounded number of retries.

Tokens are read with `pread`, not through a memory map: if a disk fails or a file is truncated, a read raises an error
that can be retried and reported, while a map kills the process with a signal. The operating system caches both.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from megatron_slm.data.corpus.columns import numbers_of
from megatron_slm.data.corpus.indexed import IndexedCorpus, bin_path, idx_path
from megatron_slm.data.corpus.open_files import OpenFile
from megatron_slm.errors import CorpusError

logger = logging.getLogger(__name__)

PADDING_ID = 0
"""Token id of padding: any id of the embedding; its labels are never valid."""

RETRY_SECONDS = (0.5, 2.0, 8.0)
"""Waiting time before each retry of a read; after the last one the read fails."""


class Piece(NamedTuple):
    """Consecutive tokens of one sequence."""

    sequence: int
    offset: int
    """Position of the first token in the sequence."""
    length: int


class Sample(NamedTuple):
    """One sample: `s` inputs and their labels, overlapping."""

    tokens: npt.NDArray[np.int64]
    """int64 [s + 1]: inputs are [:-1], labels are [1:]."""
    valid: npt.NDArray[np.bool_]
    """bool [s]: True where the label counts."""
    starts: npt.NDArray[np.int64]
    """Positions in `tokens` at which a document or padding starts, int64, ascending, without 0."""
    source: int = 0
    """Number of the source among the run's corpora."""
    columns: Mapping[str, npt.NDArray[np.float32]] = {}
    """Numbers of the labels from the corpus's columns, by name, fp32 [s] each; 0 for padding."""


Rewrite = Callable[[Sample, int], Sample]
"""Makes another sample of one, by its number in its set."""


class SequenceReader:
    """Reads the tokens of one corpus, and which of them are trained on.

    Args:
        corpus: source of the tokens.
        loss_mask: corpus of 0 and 1 with the same sequence lengths; None if every token is trained on.
        columns: columns of the corpus to read, by name.

    Raises:
        CorpusError: the mask is of another corpus.
    """

    def __init__(
        self,
        corpus: IndexedCorpus,
        loss_mask: IndexedCorpus | None = None,
        columns: Mapping[str, IndexedCorpus] = MappingProxyType({}),
    ) -> None:
        self._tokens = _TokenFile(corpus)
        self._columns = {name: _TokenFile(column) for name, column in columns.items()}
        self._mask: _TokenFile | None = None
        if loss_mask is not None:
            _check_mask(corpus, loss_mask)
            self._mask = _TokenFile(loss_mask)

    def sample(self, pieces: Sequence[Piece], sequence_length: int) -> Sample:
        """Read pieces end to end into a sample, and pad the rest.

        Raises:
            CorpusError: a piece cannot be read after all retries.
        """
        tokens = np.full(sequence_length + 1, PADDING_ID, dtype=np.int64)
        trained = np.zeros(sequence_length + 1, dtype=np.bool_)
        columns = {name: np.zeros(sequence_length + 1, dtype=np.float32) for name in self._columns}
        starts, filled = [], 0
        for piece in pieces:
            if filled:
                starts.append(filled)
            place = slice(filled, filled + piece.length)
            tokens[place] = self._tokens.read(piece)
            trained[place] = self._mask is None or self._mask.read(piece) != 0
            for name, column in self._columns.items():
                columns[name][place] = numbers_of(column.read(piece))
            if filled and piece.offset:  # its first token was already a label, in the piece before
                trained[filled] = False
            filled += piece.length
        if filled <= sequence_length:
            starts.append(filled)
        labels = {name: numbers[1:] for name, numbers in columns.items()}
        return Sample(tokens, trained[1:], np.array(starts, dtype=np.int64), columns=labels)


class _Handle:
    """A file that is closed when nobody holds it anymore."""

    def __init__(self, path: Path) -> None:
        self.number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


class _TokenFile:
    """A `.bin` that is opened on first use, and again after an error; threads may share it."""

    def __init__(self, corpus: IndexedCorpus) -> None:
        self._corpus, self._path = corpus, bin_path(corpus.prefix)
        self._file = OpenFile(self._path, partial(_Handle, self._path))

    def read(self, piece: Piece) -> npt.NDArray[Any]:
        """Read the tokens of a piece, in the corpus's dtype."""
        dtype = self._corpus.dtype
        start = int(self._corpus.sequence_pointers[piece.sequence]) + piece.offset * dtype.itemsize
        count = piece.length * dtype.itemsize
        for wait_seconds in (*RETRY_SECONDS, None):
            try:
                return np.frombuffer(self._pread(start, count), dtype=dtype)
            except OSError as error:
                self._file.forget()  # closed once no thread reads from it
                if wait_seconds is None:
                    raise self._unreadable(piece, error) from error
                logger.warning("cannot read %s (%s): retrying", self._path, error.strerror or error)
                time.sleep(wait_seconds)
        raise AssertionError("the last attempt returns or raises")

    def _pread(self, start: int, count: int) -> bytes:
        file = self._file.use()
        parts, missing = [], count
        while missing:
            part = os.pread(file.number, missing, start + count - missing)
            if not part:
                raise OSError(f"the file ends at byte {os.fstat(file.number).st_size}, before byte {start + count}")
            parts.append(part)
            missing -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _unreadable(self, piece: Piece, error: OSError) -> CorpusError:
        return CorpusError(
            "corpus file",
            str(self._path),
            f"be readable in sequence {piece.sequence} from token {piece.offset} "
            f"(tried {len(RETRY_SECONDS) + 1} times: {error.strerror or error})",
            "check the disk or the network share, then resume with --load; no sample was skipped",
        )


def _check_mask(corpus: IndexedCorpus, mask: IndexedCorpus) -> None:
    if mask.num_sequences == corpus.num_sequences:
        differ = np.flatnonzero(mask.sequence_lengths != corpus.sequence_lengths)
        if differ.size == 0:
            return
        at = int(differ[0])
        field, found, wanted = f"length of sequence {at}", mask.sequence_lengths[at], corpus.sequence_lengths[at]
    else:
        field, found, wanted = "number of sequences", mask.num_sequences, corpus.num_sequences
    raise CorpusError(
        f"{idx_path(mask.prefix)}: {field}",
        int(found),
        f"be that of {idx_path(corpus.prefix)} ({int(wanted)})",
        "preprocess both together, or remove the loss mask",
    )
