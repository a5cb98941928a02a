"""A corpus that is made of whole corpora, end to end: tokens copied, pointers and document indices moved along."""

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
from megatron_slm.data.corpus.indexed_writer import part_path, put_in_place, sync_and_close
from megatron_slm.data.corpus.sidecar import Sidecar, sidecar_text
from megatron_slm.errors import CorpusError, os_errors_as

_BLOCK_BYTES = 8 << 20
_ENTRIES_PER_BLOCK = 1 << 20


class Merged(NamedTuple):
    """What was written."""

    num_documents: int
    """Documents, empty ones included."""
    num_tokens: int
    """Tokens."""
    bin_sha256: str
    """SHA-256 of the `.bin`, hexadecimal."""
    idx_sha256: str
    """SHA-256 of the `.idx`."""


class JoinedCorpus(contextlib.AbstractContextManager["JoinedCorpus"]):
    """Takes corpora in order and is whole at its prefix after `finish` and `put_in_place`.

    Left before that, nothing of it stays. Memory does not grow with the corpora.

    Args:
        prefix: path without `.bin` and `.idx`; its folder is made.
        folder: where it grows, on the same file system; None: where it will be.

    Raises:
        CorpusError: it cannot be written there; the same of all methods.
    """

    def __init__(self, prefix: str | Path, folder: Path | None = None) -> None:
        self.prefix = prefix
        self._dtype: np.dtype[Any] | None = None
        self._parts: list[_Part] = []
        paths = bin_path(prefix), idx_path(prefix), sidecar_path(prefix)
        self._files = [part_path((folder or path.parent) / path.name) for path in paths]
        self._bin_part, self._idx_part, self._sidecar_part = self._files
        self._digest = hashlib.sha256()
        with self._writable():
            self._bin_part.parent.mkdir(parents=True, exist_ok=True)
            self._bin: BinaryIO = open(self._bin_part, "wb")

    def add(self, part: CorpusIndex) -> None:
        """Copy the tokens of another corpus to the end; its files must stay until `finish`.

        Raises:
            CorpusError: its token dtype is another one than the first's, or it became shorter.
        """
        self._dtype = self._dtype or part.dtype
        require_dtype(part, self._dtype)
        for block in _token_blocks(part):
            self._digest.update(block)
            with self._writable():
                self._bin.write(block)
        self._parts.append(_Part(part.prefix, part.num_sequences, part.num_documents, part.num_tokens))

    def finish(self, sidecar_of: Callable[[Merged], Sidecar | None] = lambda _: None) -> Merged:
        """Make it whole and durable where it grows.

        Args:
            sidecar_of: makes its sidecar.

        Raises:
            CorpusError: there is no token.
        """
        num_tokens = sum(part.num_tokens for part in self._parts)
        if self._dtype is None or num_tokens == 0:
            raise CorpusError("tokens to write", 0, "a corpus needs at least one token", "check the input")
        with self._writable():
            sync_and_close(self._bin)
            idx_sha256 = _write(self._idx_part, _index_blocks(self._parts, self._dtype))
            num_documents = sum(part.num_documents for part in self._parts)
            merged = Merged(num_documents, num_tokens, self._digest.hexdigest(), idx_sha256)
            if (sidecar := sidecar_of(merged)) is not None:
                _write(self._sidecar_part, [sidecar_text(sidecar).encode()])
        return merged

    def put_in_place(self) -> None:
        """Give what is whole its names: the sidecar is there before the corpus is."""
        with self._writable():
            put_in_place(self.prefix, self._bin_part, self._idx_part, self._sidecar_part)

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):  # of a disk that is full still
            self._bin.close()
        for part in self._files:
            part.unlink(missing_ok=True)

    def _writable(self) -> contextlib.AbstractContextManager[None]:
        return os_errors_as(
            CorpusError, "output prefix", str(self.prefix), "must be writable", "give another, or free space"
        )


class _Part(NamedTuple):
    """A corpus that was added. Its index is not kept open: there can be more of them than a process may have files."""

    prefix: str
    num_sequences: int
    num_documents: int
    num_tokens: int


def _write(path: Path, blocks: Iterable[bytes]) -> str:
    """Write a file, durable; its SHA-256."""
    digest = hashlib.sha256()
    with open(path, "wb") as file:
        for block in blocks:
            digest.update(block)
            file.write(block)
        sync_and_close(file)
    return digest.hexdigest()


def require_dtype(part: CorpusIndex, dtype: np.dtype[Any]) -> None:
    """Raise CorpusError where a corpus cannot be joined to others, which have this dtype."""
    if part.dtype != dtype:
        raise CorpusError(
            f"token dtype of {part.prefix}",
            part.dtype.name,
            f"must be {dtype.name}, that of the corpora before it",
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
                    f"size of {bin_path(index.prefix)}", left, "became shorter while it was read", "start again"
                )
            left -= count
            yield buffer[:count]


def _index_blocks(parts: Sequence[_Part], dtype: np.dtype[Any]) -> Iterator[bytes]:
    num_sequences = sum(part.num_sequences for part in parts)
    num_documents = sum(part.num_documents for part in parts)
    yield HEADER.pack(MAGIC, VERSION, CODE_BY_DTYPE[dtype], num_sequences, num_documents + 1)
    for part in parts:
        yield from (block.astype("<i4").tobytes() for block in _entries(CorpusIndex(part.prefix).sequence_lengths))
    moved = 0
    for part in parts:
        pointers = CorpusIndex(part.prefix).sequence_pointers
        yield from ((block + moved).astype("<i8").tobytes() for block in _entries(pointers))
        moved += part.num_tokens * dtype.itemsize
    yield np.zeros(1, "<i8").tobytes()
    moved = 0
    for part in parts:
        boundaries = CorpusIndex(part.prefix).document_indices[1:]
        yield from ((block + moved).astype("<i8").tobytes() for block in _entries(boundaries))
        moved += part.num_sequences


def _entries(array: npt.NDArray[Any]) -> Iterator[npt.NDArray[Any]]:
    for start in range(0, len(array), _ENTRIES_PER_BLOCK):
        yield array[start : start + _ENTRIES_PER_BLOCK]
