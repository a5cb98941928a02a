"""A corpus that is made of whole corpora, end to end: tokens copied, pointers and document indices moved along."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt

from megatron_slm.data.indexed import CODE_BY_DTYPE, HEADER, MAGIC, VERSION, CorpusIndex, bin_path, idx_path
from megatron_slm.data.indexed_writer import part_path, put_in_place, sync_and_close
from megatron_slm.data.sidecar import Sidecar, sidecar_text
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
    """Takes corpora in order and is whole at its prefix after `close`; left before that, nothing of it stays.

    Memory does not grow with the corpora.

    Args:
        prefix: path without `.bin` and `.idx`; its folder is made.
        folder: where it grows, on the same file system; None: where it will be.

    Raises:
        CorpusError: it cannot be written there; the same of all methods.
    """

    def __init__(self, prefix: str | Path, folder: Path | None = None) -> None:
        self.prefix = prefix
        self._parts: list[CorpusIndex] = []
        bin_, idx = bin_path(prefix), idx_path(prefix)
        self._bin_part, self._idx_part = (part_path((folder or path.parent) / path.name) for path in (bin_, idx))
        self._digest = hashlib.sha256()
        with self._writable():
            self._bin_part.parent.mkdir(parents=True, exist_ok=True)
            self._bin: BinaryIO = open(self._bin_part, "wb")

    def add(self, part: CorpusIndex) -> None:
        """Copy the tokens of another corpus to the end; its files must stay until `close`.

        Raises:
            CorpusError: its token dtype is another one than the first's, or it became shorter.
        """
        self._parts.append(part)
        require_same_dtype(part, self._parts[0])
        with self._writable():
            for block in _token_blocks(part):
                self._digest.update(block)
                self._bin.write(block)

    def close(self, sidecar_of: Callable[[Merged], Sidecar | None] = lambda _: None) -> Merged:
        """Put the corpus in place, durable on disk.

        Args:
            sidecar_of: makes its sidecar, which is there before the corpus is.

        Raises:
            CorpusError: there is no token.
        """
        num_tokens = sum(part.num_tokens for part in self._parts)
        if num_tokens == 0:
            raise CorpusError("tokens to write", 0, "a corpus needs at least one token", "check the input")
        with self._writable():
            sync_and_close(self._bin)
            idx_digest = hashlib.sha256()
            with open(self._idx_part, "wb") as index:
                for block in _index_blocks(self._parts):
                    idx_digest.update(block)
                    index.write(block)
                sync_and_close(index)
            num_documents = sum(part.num_documents for part in self._parts)
            merged = Merged(num_documents, num_tokens, self._digest.hexdigest(), idx_digest.hexdigest())
            sidecar = sidecar_of(merged)
            put_in_place(
                self.prefix, self._bin_part, self._idx_part, None if sidecar is None else sidecar_text(sidecar)
            )
        return merged

    def __exit__(self, *_: object) -> None:
        self._bin.close()
        for part in (self._bin_part, self._idx_part):
            part.unlink(missing_ok=True)

    def _writable(self) -> contextlib.AbstractContextManager[None]:
        return os_errors_as(
            CorpusError, "output prefix", str(self.prefix), "must be writable", "give another, or free space"
        )


def require_same_dtype(part: CorpusIndex, first: CorpusIndex) -> None:
    """Raise CorpusError where two corpora cannot be one."""
    if part.dtype != first.dtype:
        raise CorpusError(
            f"token dtype of {part.prefix}",
            part.dtype.name,
            f"must be {first.dtype.name}, that of {first.prefix}",
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


def _index_blocks(indices: list[CorpusIndex]) -> Iterator[bytes]:
    num_sequences = sum(index.num_sequences for index in indices)
    num_documents = sum(index.num_documents for index in indices)
    yield HEADER.pack(MAGIC, VERSION, CODE_BY_DTYPE[indices[0].dtype], num_sequences, num_documents + 1)
    for index in indices:
        yield from (block.astype("<i4").tobytes() for block in _entries(index.sequence_lengths))
    moved = 0
    for index in indices:
        yield from ((block + moved).astype("<i8").tobytes() for block in _entries(index.sequence_pointers))
        moved += index.num_tokens * index.dtype.itemsize
    yield np.zeros(1, "<i8").tobytes()
    moved = 0
    for index in indices:
        yield from ((block + moved).astype("<i8").tobytes() for block in _entries(index.document_indices[1:]))
        moved += index.num_sequences


def _entries(array: npt.NDArray[Any]) -> Iterator[npt.NDArray[Any]]:
    for start in range(0, len(array), _ENTRIES_PER_BLOCK):
        yield array[start : start + _ENTRIES_PER_BLOCK]
