"""Writes a corpus in Megatron's format (see `indexed.py`); a half-written one never reads as whole."""

from __future__ import annotations

import contextlib
import io
import os
from array import array
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from megatron_slm.data.corpus.indexed import (
    CODE_BY_DTYPE,
    HEADER,
    INTEGER_CODES,
    MAGIC,
    VERSION,
    bin_path,
    idx_path,
    sidecar_path,
)
from megatron_slm.errors import CorpusError, VocabularyError, os_errors_as
from megatron_slm.files import sync_folder

Document = npt.NDArray[Any] | Sequence[int] | Sequence[npt.NDArray[Any]] | Sequence[Sequence[int]]
"""One sequence of token ids, or several."""


class IndexedCorpusWriter:
    """Writes a corpus document by document; nothing is at `prefix` before `close`.

    Both files are written under temporary names in the same folder. `close` (or the end of the `with` block) first
    removes an older index, then renames `.bin` and last `.idx` into place, so that a writer killed at any moment
    leaves the older corpus, a corpus without an index, or the new one. An exception in the `with` block removes the
    temporary files.

    Args:
        prefix: path without `.bin` and `.idx`; its folder is created.
        dtype: token dtype (see `dtype_for_vocabulary`).
        may_be_empty: whether to write a corpus without a token (a shard may have none).

    Attributes:
        num_tokens: tokens of the documents added so far.
        num_empty: documents without a token.
        longest_document: its length in tokens.
        max_token_id: the largest token id; None before the first token.

    Raises:
        CorpusError: the files cannot be created, or (at close) no token was added.
    """

    def __init__(self, prefix: str | Path, dtype: npt.DTypeLike, *, may_be_empty: bool = False) -> None:
        self.prefix = str(prefix)
        self._may_be_empty = may_be_empty
        self.dtype = np.dtype(dtype)
        if CODE_BY_DTYPE.get(self.dtype) not in INTEGER_CODES:
            raise CorpusError("corpus dtype", str(self.dtype), "be an integer dtype of the format", "use uint16")
        self.num_tokens = 0
        self.num_empty = 0
        self.longest_document = 0
        self.max_token_id: int | None = None
        self._lengths = array("i")
        self._boundaries = array("q", [0])
        self._limits = np.iinfo(self.dtype)
        self._temporary_bin = temporary_path(bin_path(prefix))
        self._temporary_idx = temporary_path(idx_path(prefix))
        with os_errors_as(CorpusError, "--output-prefix", self.prefix, "be writable", "choose another prefix"):
            self._temporary_bin.parent.mkdir(parents=True, exist_ok=True)
            self._bin: BinaryIO = io.BufferedWriter(io.FileIO(self._temporary_bin, "w"))

    @property
    def num_documents(self) -> int:
        """Number of documents added so far, empty ones included."""
        return len(self._boundaries) - 1

    def add_document(self, document: Document) -> None:
        """Append one document: one sequence of token ids, or several (sentences, for example).

        An empty list is a document without a sequence, as Megatron's preprocessing writes it.

        Raises:
            VocabularyError: a token id does not fit the dtype.
        """
        single = isinstance(document, np.ndarray) or (len(document) > 0 and np.isscalar(document[0]))
        sequences = [np.asarray(sequence) for sequence in ([document] if single else document)]
        tokens = np.concatenate(sequences) if sequences else np.empty(0, np.int64)
        self.add_documents(tokens, np.array([len(ids) for ids in sequences], np.int64), np.array([len(sequences)]))

    def add_documents(
        self,
        tokens: npt.NDArray[Any],
        sequence_lengths: npt.NDArray[np.int64],
        sequences_per_document: npt.NDArray[np.int64],
    ) -> None:
        """Append many documents at once.

        Args:
            tokens: token ids of all documents, end to end, [T].
            sequence_lengths: tokens of every sequence, [S]; their sum is T.
            sequences_per_document: [D]; their sum is S, 0 for a document without a sequence.

        Raises:
            VocabularyError: a token id does not fit the dtype.
            CorpusError: a sequence is too long for the format.
        """
        if sequence_lengths.size and int(sequence_lengths.max()) > np.iinfo(np.int32).max:
            raise CorpusError(
                "length of a sequence",
                int(sequence_lengths.max()),
                "fit the format's 32-bit lengths",
                "split the document",
            )
        self._bin.write(self._checked(tokens).tobytes())
        self._boundaries.frombytes((len(self._lengths) + np.cumsum(sequences_per_document, dtype=np.int64)).tobytes())
        self._lengths.frombytes(sequence_lengths.astype(np.int32).tobytes())
        self.num_tokens += tokens.size
        ends = np.concatenate([[0], np.cumsum(sequence_lengths)])[np.cumsum(sequences_per_document)]
        lengths = np.diff(ends, prepend=0)
        self.num_empty += int((lengths == 0).sum())
        self.longest_document = max(self.longest_document, int(lengths.max(initial=0)))

    def close(self) -> None:
        """Put the corpus in place, durable on disk. A second call does nothing.

        Raises:
            CorpusError: no token was added; the temporary files are removed.
        """
        if self._bin.closed:
            return
        if self.num_tokens == 0 and not self._may_be_empty:
            self.abort()
            raise CorpusError("number of tokens to write", 0, "be at least 1", "check the input")
        sync_and_close(self._bin)
        with open(self._temporary_idx, "wb") as index:
            self._write_index(index)
            sync_and_close(index)
        put_in_place(self.prefix, self._temporary_bin, self._temporary_idx)

    def abort(self) -> None:
        """Remove the temporary files; an older corpus at `prefix` stays."""
        self._bin.close()
        for path in (self._temporary_bin, self._temporary_idx):
            path.unlink(missing_ok=True)

    def __enter__(self) -> IndexedCorpusWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()

    def _checked(self, ids: npt.NDArray[Any]) -> npt.NDArray[Any]:
        if ids.size == 0:
            return ids.astype(self.dtype)
        lowest, highest = int(ids.min()), int(ids.max())
        if lowest < self._limits.min or highest > self._limits.max:
            raise VocabularyError(
                "token id to write",
                highest if highest > self._limits.max else lowest,
                f"fit {self.dtype.name}",
                "choose the dtype with the tokenizer's true vocabulary size",
            )
        self.max_token_id = highest if self.max_token_id is None else max(self.max_token_id, highest)
        return ids.astype(self.dtype)

    def _write_index(self, index: BinaryIO) -> None:
        lengths = np.frombuffer(self._lengths, dtype=np.int32)
        pointers = np.zeros(lengths.size, dtype=np.int64)
        np.cumsum(lengths[:-1], dtype=np.int64, out=pointers[1:])
        header = HEADER.pack(MAGIC, VERSION, CODE_BY_DTYPE[self.dtype], lengths.size, len(self._boundaries))
        index.write(header)
        index.write(lengths.astype("<i4").tobytes())
        index.write((pointers * self.dtype.itemsize).astype("<i8").tobytes())
        index.write(np.frombuffer(self._boundaries, dtype=np.int64).astype("<i8").tobytes())


def temporary_path(path: Path) -> Path:
    """Return the path at which this process writes a file until it is whole."""
    return path.with_name(f"{path.name}.part-{os.getpid()}")


def put_in_place(
    prefix: str | Path, temporary_bin: Path, temporary_idx: Path, temporary_sidecar: Path | None = None
) -> None:
    """Rename whole, durable files to those of the corpus `prefix`, after removing an older corpus; the index last.

    Args:
        prefix: path of the corpus without `.bin` and `.idx`.
        temporary_bin, temporary_idx: the files, on the file system of `prefix`.
        temporary_sidecar: its `.meta.json`, renamed before the index if that file exists.
    """
    # An old index over a new .bin of the same size would read as whole.
    for stale in (idx_path(prefix), sidecar_path(prefix)):
        stale.unlink(missing_ok=True)
    os.replace(temporary_bin, bin_path(prefix))
    if temporary_sidecar is not None and temporary_sidecar.exists():
        os.replace(temporary_sidecar, sidecar_path(prefix))
    os.replace(temporary_idx, idx_path(prefix))
    with contextlib.suppress(OSError):  # some network file systems cannot sync a folder
        sync_folder(bin_path(prefix).parent)


def sync_and_close(stream: BinaryIO) -> None:
    """Flush a stream to disk and close it."""
    stream.flush()
    os.fsync(stream.fileno())
    stream.close()
