"""Joins corpora end to end into one: copies the tokens, shifts pointers and document indices."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt

from megatron_slm.data.corpus.indexed import (
    CODE_BY_DTYPE,
    HEADER,
    MAGIC,
    VERSION,
    CorpusIndex,
    bin_path,
    idx_path,
    sidecar_path,
)
from megatron_slm.data.corpus.indexed_writer import put_in_place, sync_and_close, temporary_path
from megatron_slm.data.corpus.sidecar import Sidecar, sidecar_text
from megatron_slm.errors import CorpusError, os_errors_as

_BLOCK_BYTES = 8 << 20
_ENTRIES_PER_BLOCK = 1 << 20


class Merged(NamedTuple):
    """Counts and hashes of a joined corpus."""

    num_documents: int
    """Empty documents included."""
    num_tokens: int
    bin_sha256: str
    """SHA-256 of the `.bin`, hexadecimal."""
    idx_sha256: str
    """SHA-256 of the `.idx`, hexadecimal."""


class JoinedCorpus(contextlib.AbstractContextManager["JoinedCorpus"]):
    """Appends corpora in order; the result is at its prefix after `finish` and `put_in_place`.

    Leaving the `with` block before removes the temporary files. Memory does not grow with the corpora.

    Args:
        prefix: path without `.bin` and `.idx`; its folder is created.
        folder: folder of the temporary files, on the same file system; None: that of `prefix`.

    Raises:
        CorpusError: a file cannot be written, here and in every method.
    """

    def __init__(self, prefix: str | Path, folder: Path | None = None) -> None:
        self.prefix = prefix
        self._dtype: np.dtype[Any] | None = None
        self._members: list[_Member] = []
        paths = bin_path(prefix), idx_path(prefix), sidecar_path(prefix)
        self._temporary = [temporary_path((folder or path.parent) / path.name) for path in paths]
        self._temporary_bin, self._temporary_idx, self._temporary_sidecar = self._temporary
        self._digest = hashlib.sha256()
        with self._writable():
            self._temporary_bin.parent.mkdir(parents=True, exist_ok=True)
            self._bin: BinaryIO = open(self._temporary_bin, "wb")

    def add(self, corpus: CorpusIndex, *, on_bytes: Callable[[int], None] = lambda count: None) -> None:
        """Append the tokens of another corpus; its files must stay until `finish`.

        Args:
            on_bytes: called with the size of each block written, to show progress.

        Raises:
            CorpusError: its token dtype differs from the first corpus's, or its `.bin` was truncated meanwhile.
        """
        self._dtype = self._dtype or corpus.dtype
        require_dtype(corpus, self._dtype)
        for block in _token_blocks(corpus):
            self._digest.update(block)
            with self._writable():
                self._bin.write(block)
            on_bytes(len(block))
        self._members.append(_Member(corpus.prefix, corpus.num_sequences, corpus.num_documents, corpus.num_tokens))

    def finish(self, sidecar_of: Callable[[Merged], Sidecar | None] = lambda _: None) -> Merged:
        """Complete the temporary files and sync them to disk.

        Args:
            sidecar_of: returns the sidecar of the joined corpus, or None for no sidecar.

        Raises:
            CorpusError: the corpora hold no token.
        """
        num_tokens = sum(member.num_tokens for member in self._members)
        if self._dtype is None or num_tokens == 0:
            raise CorpusError("number of tokens to write", 0, "be at least 1", "check the input")
        with self._writable():
            sync_and_close(self._bin)
            idx_sha256 = _write(self._temporary_idx, _index_blocks(self._members, self._dtype))
            num_documents = sum(member.num_documents for member in self._members)
            merged = Merged(num_documents, num_tokens, self._digest.hexdigest(), idx_sha256)
            if (sidecar := sidecar_of(merged)) is not None:
                _write(self._temporary_sidecar, [sidecar_text(sidecar).encode()])
        return merged

    def put_in_place(self) -> None:
        """Rename the temporary files to those of the corpus, the index last."""
        with self._writable():
            put_in_place(self.prefix, self._temporary_bin, self._temporary_idx, self._temporary_sidecar)

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):  # the disk may still be full
            self._bin.close()
        for path in self._temporary:
            path.unlink(missing_ok=True)

    def _writable(self) -> contextlib.AbstractContextManager[None]:
        return os_errors_as(
            CorpusError, "--output-prefix", str(self.prefix), "be writable", "choose another prefix, or free space"
        )


class _Member(NamedTuple):
    """A corpus that was added. Its index is not kept open: corpora can outnumber the files a process may open."""

    prefix: str
    num_sequences: int
    num_documents: int
    num_tokens: int


def _write(path: Path, blocks: Iterable[bytes]) -> str:
    """Write a file, sync it to disk, and return its SHA-256, hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "wb") as file:
        for block in blocks:
            digest.update(block)
            file.write(block)
        sync_and_close(file)
    return digest.hexdigest()


def require_dtype(corpus: CorpusIndex, dtype: np.dtype[Any]) -> None:
    """Raise CorpusError if the token dtype of a corpus is not `dtype`, that of the corpora to join it to."""
    if corpus.dtype != dtype:
        raise CorpusError(
            f"{corpus.prefix}: token dtype",
            corpus.dtype.name,
            f"be {dtype.name}, as in the corpora before it",
            "preprocess one of them again, with the other's tokenizer",
        )


def _token_blocks(index: CorpusIndex) -> Iterator[Any]:
    left = index.num_tokens * index.dtype.itemsize
    buffer = memoryview(bytearray(min(left, _BLOCK_BYTES)))
    with open(bin_path(index.prefix), "rb", buffering=0) as file:
        while left:
            count = file.readinto(buffer[: min(left, len(buffer))])
            if not count:
                raise CorpusError(
                    f"{bin_path(index.prefix)}: bytes left to read", left, "be 0 at the end of the file", "start again"
                )
            left -= count
            yield buffer[:count]


def _index_blocks(members: Sequence[_Member], dtype: np.dtype[Any]) -> Iterator[bytes]:
    num_sequences = sum(member.num_sequences for member in members)
    num_documents = sum(member.num_documents for member in members)
    yield HEADER.pack(MAGIC, VERSION, CODE_BY_DTYPE[dtype], num_sequences, num_documents + 1)
    for member in members:
        yield from (block.astype("<i4").tobytes() for block in _entries(CorpusIndex(member.prefix).sequence_lengths))
    shift_bytes = 0
    for member in members:
        pointers = CorpusIndex(member.prefix).sequence_pointers
        yield from ((block + shift_bytes).astype("<i8").tobytes() for block in _entries(pointers))
        shift_bytes += member.num_tokens * dtype.itemsize
    yield np.zeros(1, "<i8").tobytes()
    shift_sequences = 0
    for member in members:
        boundaries = CorpusIndex(member.prefix).document_indices[1:]
        yield from ((block + shift_sequences).astype("<i8").tobytes() for block in _entries(boundaries))
        shift_sequences += member.num_sequences


def _entries(array: npt.NDArray[Any]) -> Iterator[npt.NDArray[Any]]:
    for start in range(0, len(array), _ENTRIES_PER_BLOCK):
        yield array[start : start + _ENTRIES_PER_BLOCK]
