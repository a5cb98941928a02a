"""Tokenizes chunks of the input in worker processes, each chunk into a shard that is whole or absent."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import hashlib
import json
import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from multiprocessing import connection
from pathlib import Path
from typing import NamedTuple

import numpy as np

from megatron_slm.data.corpus.columns import STORED_DTYPE, as_stored
from megatron_slm.data.corpus.indexed import bin_path, idx_path
from megatron_slm.data.corpus.indexed_writer import IndexedCorpusWriter, temporary_path
from megatron_slm.data.preprocessing.documents import InvalidLineError, Texts
from megatron_slm.data.preprocessing.encoding import Encoder, Encoding, encode_documents
from megatron_slm.data.preprocessing.inputs import Chunk
from megatron_slm.data.preprocessing.scores import with_columns
from megatron_slm.data.tokenizers.base import Tokenizer
from megatron_slm.errors import ConfigError, CorpusError, os_errors_as

REPORTED_INVALID_LINES = 100
_DOCUMENTS_PER_BATCH = 1024
_BYTES_PER_BATCH = 1 << 20
_CHUNKS_AHEAD_PER_WORKER = 2
_PR_SET_PDEATHSIG = 1
"""prctl option (linux/prctl.h): the signal that this process gets when the thread that started it ends."""


class InvalidLine(NamedTuple):
    """A line that is not a document."""

    line: int
    """Number of the line within the chunk, from 0."""
    reason: str


@dataclass(kw_only=True)
class CorpusCounts:
    """Counts of one corpus, in a shard or in total."""

    num_tokens: int = 0
    num_trained: int = 0
    """Tokens whose loss mask is 1; 0 without a mask."""
    num_empty: int = 0
    """Documents without a token."""
    longest_document: int = 0
    """Tokens of the longest document."""
    max_token_id: int = -1
    """The largest token id; -1 without a token."""
    num_special: int = 0
    """Special tokens that the texts spell out."""


@dataclass(kw_only=True)
class Shard:
    """The tokenized documents of one chunk: a corpus for every key, and their counts."""

    name: str
    """Derived from the chunk's content and the encoding."""
    num_lines: int = 0
    """Blank and invalid lines included."""
    num_bytes: int = 0
    """Size of the lines, decompressed."""
    num_documents: int = 0
    """Valid lines."""
    num_invalid: int = 0
    """Invalid lines; blank ones are not counted."""
    invalid: list[InvalidLine] = field(default_factory=list)
    """The first `REPORTED_INVALID_LINES` invalid lines."""
    corpora: list[CorpusCounts] = field(default_factory=list)
    """In the order of `DocumentKeys.corpora`."""
    resumed: bool = False
    """True if an earlier run made the shard."""

    def prefix(self, folder: Path, corpus: int) -> Path:
        """Return the prefix of the tokens of one corpus."""
        return folder / f"{self.name}.{corpus}"

    def mask_prefix(self, folder: Path, corpus: int) -> Path:
        """Return the prefix of the loss mask of one corpus."""
        return folder / f"{self.name}.{corpus}.mask"

    def column_prefix(self, folder: Path, column: int) -> Path:
        """Return the prefix of a column of the only corpus."""
        return folder / f"{self.name}.0.column-{column}"


class _Writers(NamedTuple):
    """The writers of one corpus of a shard."""

    tokens: IndexedCorpusWriter
    mask: IndexedCorpusWriter | None
    columns: tuple[IndexedCorpusWriter, ...] = ()

    def all(self) -> list[IndexedCorpusWriter]:
        """Return every writer."""
        return [self.tokens, *([] if self.mask is None else [self.mask]), *self.columns]


@dataclass(frozen=True, kw_only=True)
class ShardWriter:
    """Makes the shards of chunks; pickled to every worker once."""

    encoding: Encoding
    encoder: Encoder
    dtype: str
    folder: Path
    stop_at_invalid: bool
    identity: str
    """Hash of everything but the chunk that a shard depends on."""
    tokenizer: Tokenizer | None = None
    """Assigns the numbers of `DocumentKeys.score_keys` to tokens; None without such keys."""

    def make(self, chunk: Chunk) -> Shard:
        """Tokenize a chunk, or load the shard that an earlier run made of it.

        Raises:
            CorpusError: the chunk cannot be read, or the shard cannot be written.
            FastEncoderError: a fast encoder differs from the tokenizer.
        """
        with os_errors_as(
            CorpusError, "--output-prefix", str(self.folder), "be writable", "free space, then start again"
        ):
            return self._make(chunk)

    def _make(self, chunk: Chunk) -> Shard:
        name = hashlib.sha256(f"{self.identity} {chunk.identity()}".encode()).hexdigest()[:32]
        stored = self._stored(name)
        if stored is not None and not (stored.num_invalid and self.stop_at_invalid):
            return stored
        shard = Shard(name=name)
        with contextlib.ExitStack() as stack:
            writers = self._open_writers(shard, stack)
            for batch in self._batches(chunk, shard):
                if shard.num_invalid and self.stop_at_invalid:
                    for writer in (one for of_corpus in writers for one in of_corpus.all()):
                        writer.abort()
                    stack.pop_all()
                    return shard
                self._write_batch(batch, shard, writers)
        self._store(shard)
        return shard

    def _open_writers(self, shard: Shard, stack: contextlib.ExitStack) -> list[_Writers]:
        writers = []
        for corpus in range(len(self.encoding.keys.corpora)):
            shard.corpora.append(CorpusCounts())
            prefix, mask_prefix = shard.prefix(self.folder, corpus), shard.mask_prefix(self.folder, corpus)
            tokens = stack.enter_context(IndexedCorpusWriter(prefix, self.dtype, may_be_empty=True))
            mask = None
            if self.encoding.keys.is_masked:
                mask = stack.enter_context(IndexedCorpusWriter(mask_prefix, np.uint8, may_be_empty=True))
            columns = tuple(
                stack.enter_context(
                    IndexedCorpusWriter(shard.column_prefix(self.folder, i), STORED_DTYPE, may_be_empty=True)
                )
                for i in range(len(self.encoding.keys.score_keys))
            )
            writers.append(_Writers(tokens, mask, columns))
        return writers

    def _batches(self, chunk: Chunk, shard: Shard) -> Iterator[list[list[Texts]]]:
        """Yield documents of about a megabyte at a time, [documents][corpora], and count lines in `shard`."""
        keys = self.encoding.keys
        batch: list[list[Texts]] = []
        batch_bytes = 0
        for line in chunk.lines(keys.columns):
            shard.num_lines = line.number + 1
            shard.num_bytes += line.num_bytes
            problem = line.problem
            if line.document is not None:
                try:
                    document = keys.texts(line.document)
                    if self.tokenizer is not None:
                        document = [with_columns(document[0], line.document, keys, self.tokenizer)]
                    for counts, num_special in zip(shard.corpora, self.encoding.count_special(document), strict=True):
                        counts.num_special += num_special
                    batch.append(document)
                    batch_bytes += line.num_bytes
                except InvalidLineError as error:
                    problem = str(error)
            if problem:
                shard.num_invalid += 1
                if len(shard.invalid) < REPORTED_INVALID_LINES:
                    shard.invalid.append(InvalidLine(line.number, problem))
                if self.stop_at_invalid:
                    yield []
                    return
            if len(batch) >= _DOCUMENTS_PER_BATCH or batch_bytes >= _BYTES_PER_BATCH:
                yield batch
                batch, batch_bytes = [], 0
        yield batch

    def _write_batch(self, batch: list[list[Texts]], shard: Shard, writers: list[_Writers]) -> None:
        shard.num_documents += len(batch)
        for corpus, (counts, (tokens, mask, columns)) in enumerate(zip(shard.corpora, writers, strict=True)):
            encoded = encode_documents([document[corpus] for document in batch], self.encoding, self.encoder)
            tokens.add_documents(encoded.tokens, encoded.sequence_lengths, encoded.sequences_per_document)
            if mask is not None and encoded.loss_mask is not None:
                mask.add_documents(encoded.loss_mask, encoded.sequence_lengths, encoded.sequences_per_document)
                counts.num_trained += int(encoded.loss_mask.sum(dtype=np.int64))
            for writer, column in zip(columns, encoded.columns, strict=True):
                stored = as_stored(column, "column")
                writer.add_documents(stored, encoded.sequence_lengths, encoded.sequences_per_document)
            counts.num_tokens = tokens.num_tokens
            counts.num_empty = tokens.num_empty
            counts.longest_document = tokens.longest_document
            counts.max_token_id = -1 if tokens.max_token_id is None else tokens.max_token_id

    def _store(self, shard: Shard) -> None:
        """Write the shard's JSON file last: without it a shard is incomplete."""
        path = self.folder / f"{shard.name}.json"
        temporary = temporary_path(path)
        temporary.write_text(json.dumps({**dataclasses.asdict(shard), "sizes": self._sizes(shard)}))
        os.replace(temporary, path)

    def _stored(self, name: str) -> Shard | None:
        """Load a whole shard of an earlier run; None if there is none."""
        try:
            values = json.loads((self.folder / f"{name}.json").read_text())
            sizes = values.pop("sizes")
            values["invalid"] = [InvalidLine(*entry) for entry in values["invalid"]]
            values["corpora"] = [CorpusCounts(**counts) for counts in values["corpora"]]
            shard = Shard(**values)
            shard.resumed = True
            return shard if self._sizes(shard) == sizes else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _sizes(self, shard: Shard) -> list[int]:
        prefixes = [shard.prefix(self.folder, corpus) for corpus in range(len(shard.corpora))]
        if self.encoding.keys.is_masked:
            prefixes += [shard.mask_prefix(self.folder, corpus) for corpus in range(len(shard.corpora))]
        prefixes += [shard.column_prefix(self.folder, i) for i in range(len(self.encoding.keys.score_keys))]
        return [path(prefix).stat().st_size for prefix in prefixes for path in (bin_path, idx_path)]


def make_shards(
    chunks: Iterable[Chunk], writer: ShardWriter, num_workers: int
) -> Generator[tuple[Chunk, Shard], None, None]:
    """Yield the shards of all chunks, in order, made in this process (`num_workers` 1) or in that many others.

    Workers end with the thread that takes the first shard. A worker has one thread if `OMP_NUM_THREADS` is 1 in the
    environment (otherwise NumPy's library starts more).

    Raises:
        ConfigError: a worker was killed.
        CorpusError: a chunk cannot be read, or a shard cannot be written.
        FastEncoderError: a fast encoder differs from the tokenizer.
    """
    if num_workers == 1:
        for chunk in chunks:
            yield chunk, writer.make(chunk)
        return
    # Spawned, not forked: tokenizer libraries hold threads and locks that a fork would break.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(num_workers, context, initializer=_start_worker, initargs=(writer,))
    try:
        waiting: deque[tuple[Chunk, str, Future[Shard]]] = deque()
        for chunk in chunks:
            identity = chunk.identity()
            # Equal chunks (a file that is named twice) share a shard: two workers would write the same files.
            same = next((future for _, other, future in waiting if other == identity), None)
            waiting.append((chunk, identity, same or pool.submit(_make_in_worker, chunk)))
            if len(waiting) >= num_workers * _CHUNKS_AHEAD_PER_WORKER:
                first, _, future = waiting.popleft()
                yield first, future.result()
        while waiting:
            first, _, future = waiting.popleft()
            yield first, future.result()
    except BrokenProcessPool as error:
        raise ConfigError(
            "--workers", num_workers, "keep all processes alive; one was killed (out of memory?)", "use fewer workers"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_WRITER_OF_WORKER: list[ShardWriter] = []


def _start_worker(writer: ShardWriter) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core a worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends its workers
    _WRITER_OF_WORKER[:] = [writer]
    _end_with_parent()


def _end_with_parent() -> None:
    """End this worker when its parent is killed; it would wait for work forever.

    On Linux the kernel does it, not a waiting thread: in a process with one thread glibc's malloc takes no lock, and
    tokenizers allocate so much that a second thread, even asleep, costs 8 % of the speed.
    """
    parent = multiprocessing.parent_process()
    if parent is None:
        return
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent.pid:  # the parent died before the call
            os._exit(1)
    else:
        threading.Thread(target=_exit_after, args=(parent.sentinel,), daemon=True).start()


def _exit_after(sentinel: int) -> None:
    connection.wait([sentinel])
    os._exit(1)


def _make_in_worker(chunk: Chunk) -> Shard:
    return _WRITER_OF_WORKER[0].make(chunk)
