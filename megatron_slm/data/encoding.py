"""Tokenizing chunks of JSON lines, here or in worker processes, always in the order of the input."""

from __future__ import annotations

import functools
import multiprocessing
import os
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from megatron_slm.data.documents import InvalidLineError, read_lines, texts_of_line
from megatron_slm.data.tokenizers import Tokenizer, build_tokenizer
from megatron_slm.errors import ConfigError

_LINES_PER_CHUNK = 256
_BYTES_PER_CHUNK = 1 << 20
_CHUNKS_AHEAD_PER_WORKER = 4


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """How documents become token ids: plain values, so that it travels to worker processes."""

    keys: tuple[str, ...]
    """The keys of a JSON line that hold texts."""

    tokenizer_type: str
    """See `build_tokenizer`."""

    tokenizer_model: str | None
    """See `build_tokenizer`."""

    vocab_size: int | None
    """See `build_tokenizer`."""

    append_eod: bool
    """Whether a document with tokens ends with the tokenizer's `eod_id`."""

    def tokenizer(self) -> Tokenizer:
        """The tokenizer; each process builds its own.

        Raises:
            ConfigError: it is asked to append an end-of-document token and has none, or cannot be built.
        """
        tokenizer = build_tokenizer(self.tokenizer_type, self.tokenizer_model, self.vocab_size)
        if self.append_eod and tokenizer.eod_id is None:
            raise ConfigError(
                "append_eod",
                True,
                f"{self.tokenizer_model} does not say which token ends a document",
                "set eos_token in its tokenizer_config.json, or leave --append-eod out",
            )
        return tokenizer


class LineChunk(NamedTuple):
    """Some consecutive lines of one file."""

    path: Path
    """The file."""

    first_line: int
    """Number of the first line, from 1."""

    lines: list[bytes]
    """Without line breaks; blank ones included."""


class Invalid(NamedTuple):
    """A line that is not a document."""

    path: Path
    """The file."""

    line: int
    """Its number, from 1."""

    reason: str
    """What is wrong with it."""


class KeyTokens(NamedTuple):
    """The tokens of one key of the documents of a chunk."""

    tokens: npt.NDArray[np.int32]
    """All of them, end to end, [T]."""

    sequence_lengths: npt.NDArray[np.int64]
    """Tokens of every sequence; none is 0."""

    sequences_per_document: npt.NDArray[np.int64]
    """Sequences of every document [D]; 0 where the document has no token."""


class EncodedChunk(NamedTuple):
    """The documents of a `LineChunk` as token ids."""

    keys: list[KeyTokens]
    """One entry a key, in the order of `Encoding.keys`."""

    num_documents: int
    """Lines that are documents."""

    invalid: list[Invalid]
    """Lines that are not."""

    num_bytes: int
    """Size of the lines with their line breaks."""


def line_chunks(paths: Sequence[Path]) -> Iterator[LineChunk]:
    """Cut files into chunks that are big enough to travel and small enough to wait in memory."""
    for path in paths:
        lines: list[bytes] = []
        first, size = 1, 0
        for line in read_lines(path):
            lines.append(line)
            size += len(line) + 1
            if len(lines) == _LINES_PER_CHUNK or size >= _BYTES_PER_CHUNK:
                yield LineChunk(path, first, lines)
                first, size, lines = first + len(lines), 0, []
        if lines:
            yield LineChunk(path, first, lines)


def encode_chunk(chunk: LineChunk, encoding: Encoding, tokenizer: Tokenizer) -> EncodedChunk:
    """Tokenize the documents of a chunk; blank lines are passed over.

    A text without a token is no sequence, and a document of none stays as one without a sequence: what
    Megatron's preprocessing writes.
    """
    documents: list[list[list[str]]] = []
    invalid = []
    for number, line in enumerate(chunk.lines, start=chunk.first_line):
        if not line.strip():
            continue
        try:
            documents.append(texts_of_line(line, encoding.keys))
        except InvalidLineError as error:
            invalid.append(Invalid(chunk.path, number, str(error)))
    eod_id = tokenizer.eod_id if encoding.append_eod else None
    keys = [
        _encode_key([document[at] for document in documents], tokenizer, eod_id) for at in range(len(encoding.keys))
    ]
    return EncodedChunk(keys, len(documents), invalid, sum(map(len, chunk.lines)) + len(chunk.lines))


def encode_chunks(
    chunks: Iterable[LineChunk], encoding: Encoding, num_workers: int
) -> Generator[EncodedChunk, None, None]:
    """Tokenize chunks in order, in this process (`num_workers` 1) or in as many others.

    Raises:
        ConfigError: `num_workers` is not positive, or a worker was killed.
    """
    if num_workers < 1:
        raise ConfigError("workers", num_workers, "must be at least 1", "give --workers 1 or more")
    if num_workers == 1:
        tokenizer = encoding.tokenizer()
        for chunk in chunks:
            yield encode_chunk(chunk, encoding, tokenizer)
        return
    # Spawned, not forked: tokenizer libraries hold threads and locks that a fork would break.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(num_workers, context, initializer=_start_worker)
    try:
        # A bounded number of chunks is on its way, so memory does not grow with the input.
        waiting: deque[Future[EncodedChunk]] = deque()
        for chunk in chunks:
            waiting.append(pool.submit(_encode_in_worker, chunk, encoding))
            if len(waiting) >= num_workers * _CHUNKS_AHEAD_PER_WORKER:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise ConfigError(
            "workers", num_workers, "a worker process was killed (out of memory?)", "use fewer workers"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _start_worker() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core a worker


@functools.lru_cache(maxsize=1)
def _tokenizer_of(encoding: Encoding) -> Tokenizer:
    return encoding.tokenizer()


def _encode_in_worker(chunk: LineChunk, encoding: Encoding) -> EncodedChunk:
    return encode_chunk(chunk, encoding, _tokenizer_of(encoding))


def _encode_key(documents: list[list[str]], tokenizer: Tokenizer, eod_id: int | None) -> KeyTokens:
    encoded = iter(tokenizer.encode_batch([text for texts in documents for text in texts]))
    tokens: list[int] = []
    lengths: list[int] = []
    counts = []
    for texts in documents:
        sequences = [ids for ids in (next(encoded) for _ in texts) if ids]
        if sequences and eod_id is not None:
            sequences[-1] = [*sequences[-1], eod_id]
        for ids in sequences:
            tokens.extend(ids)
            lengths.append(len(ids))
        counts.append(len(sequences))
    return KeyTokens(
        np.array(tokens, dtype=np.int32), np.array(lengths, dtype=np.int64), np.array(counts, dtype=np.int64)
    )
