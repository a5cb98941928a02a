"""Workers that tokenize pieces of the input, each into files of its own that are whole or not there."""

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
from typing import Any, NamedTuple

import numpy as np

from megatron_slm.data.corpus.indexed import bin_path, idx_path
from megatron_slm.data.corpus.indexed_writer import IndexedCorpusWriter, part_path
from megatron_slm.data.preprocessing.documents import InvalidLineError, Texts
from megatron_slm.data.preprocessing.encoding import EncodedDocuments, Encoder, Encoding, encode_documents
from megatron_slm.data.preprocessing.inputs import Piece
from megatron_slm.errors import ConfigError, CorpusError, os_errors_as

REPORTED_INVALID_LINES = 100
_DOCUMENTS_PER_BATCH = 1024
_BYTES_PER_BATCH = 1 << 20
_PIECES_AHEAD_PER_WORKER = 2
_PR_SET_PDEATHSIG = 1
"""Of prctl (linux/prctl.h): says which signal this process gets when the thread that started it ends."""


class InvalidLine(NamedTuple):
    """A line that is not a document."""

    line: int
    """Its number within the piece, from 0."""
    reason: str
    """What is wrong with it."""


@dataclass(kw_only=True)
class CorpusCounts:
    """What one corpus of a shard holds."""

    num_tokens: int = 0
    """Tokens."""
    num_trained: int = 0
    """Tokens that the loss mask lets through; 0 where there is no mask."""
    num_empty: int = 0
    """Documents without a token."""
    longest_document: int = 0
    """Tokens of the longest document."""
    max_token_id: int = -1
    """The largest token id; -1 without a token."""


@dataclass(kw_only=True)
class Shard:
    """What came of a piece; complete once it is stored."""

    name: str
    """Derived from the piece's content and the way it was encoded."""
    num_lines: int = 0
    """Lines, blank and invalid ones included."""
    num_bytes: int = 0
    """Size of the lines, decompressed."""
    num_documents: int = 0
    """Lines that are documents."""
    num_invalid: int = 0
    """Lines that are not, nor blank."""
    invalid: list[InvalidLine] = field(default_factory=list)
    """The first of them."""
    corpora: list[CorpusCounts] = field(default_factory=list)
    """In the order of `DocumentKeys.corpora`; empty where the shard stopped at an invalid line."""
    resumed: bool = False
    """Whether an earlier run made it."""

    def prefix(self, folder: Path, corpus: int) -> Path:
        """Where the tokens of one corpus are."""
        return folder / f"{self.name}.{corpus}"

    def mask_prefix(self, folder: Path, corpus: int) -> Path:
        """Where its loss mask is."""
        return folder / f"{self.name}.{corpus}.mask"


@dataclass(frozen=True, kw_only=True)
class ShardWriter:
    """How a worker makes a shard; travels to the workers once."""

    encoding: Encoding
    encoder: Encoder
    dtype: str
    folder: Path
    stop_at_invalid: bool
    identity: str
    """Of everything but the piece that the result depends on."""

    def make(self, piece: Piece) -> Shard:
        """Tokenize a piece, or find it done by an earlier run.

        Raises:
            CorpusError: the piece cannot be read, or the shard not be written.
            FastEncoderError: a fast encoder differs from the tokenizer.
        """
        with os_errors_as(
            CorpusError, "output prefix", str(self.folder), "must be writable", "free space, then start again"
        ):
            return self._make(piece)

    def _make(self, piece: Piece) -> Shard:
        name = hashlib.sha256(f"{self.identity} {piece.identity()}".encode()).hexdigest()[:32]
        stored = self._stored(name)
        if stored is not None and not (stored.num_invalid and self.stop_at_invalid):
            return stored
        shard = Shard(name=name)
        with contextlib.ExitStack() as stack:
            writers = self._open_writers(shard, stack)
            for batch in self._batches(piece, shard):
                if shard.num_invalid and self.stop_at_invalid:
                    for writer in writers:
                        writer.abort()
                    stack.pop_all()
                    return shard
                self._write_batch(batch, shard, writers)
        self._store(shard)
        return shard

    def _open_writers(self, shard: Shard, stack: contextlib.ExitStack) -> list[IndexedCorpusWriter]:
        """Token writers, each followed by its mask's where there are masks."""
        writers = []
        for corpus in range(len(self.encoding.keys.corpora)):
            shard.corpora.append(CorpusCounts())
            kinds: list[tuple[Path, Any]] = [(shard.prefix(self.folder, corpus), self.dtype)]
            if self.encoding.keys.is_masked:
                kinds.append((shard.mask_prefix(self.folder, corpus), np.uint8))
            for prefix, dtype in kinds:
                writers.append(stack.enter_context(IndexedCorpusWriter(prefix, dtype, may_be_empty=True)))
        return writers

    def _batches(self, piece: Piece, shard: Shard) -> Iterator[list[list[Texts]]]:
        """Documents of about a megabyte at a time, [documents][corpora]; invalid lines are counted in `shard`."""
        keys = self.encoding.keys
        batch: list[list[Texts]] = []
        batch_bytes = 0
        for line in piece.lines(keys.columns):
            shard.num_lines = line.number + 1
            shard.num_bytes += line.num_bytes
            problem = line.problem
            if line.document is not None:
                try:
                    batch.append(keys.texts(line.document))
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

    def _write_batch(self, batch: list[list[Texts]], shard: Shard, writers: list[IndexedCorpusWriter]) -> None:
        shard.num_documents += len(batch)
        free = iter(writers)
        for corpus, counts in enumerate(shard.corpora):
            encoded = encode_documents([document[corpus] for document in batch], self.encoding, self.encoder)
            writer = next(free)
            _add(writer, encoded)
            if encoded.loss_mask is not None:
                next(free).add_documents(encoded.loss_mask, encoded.sequence_lengths, encoded.sequences_per_document)
                counts.num_trained += int(encoded.loss_mask.sum(dtype=np.int64))
            counts.num_tokens, counts.num_empty = writer.num_tokens, writer.num_empty
            counts.longest_document = writer.longest_document
            counts.max_token_id = -1 if writer.max_token_id is None else writer.max_token_id

    def _store(self, shard: Shard) -> None:
        """Last of all: a shard without this file is none."""
        path = self.folder / f"{shard.name}.json"
        part = part_path(path)
        part.write_text(json.dumps({**dataclasses.asdict(shard), "sizes": self._sizes(shard)}))
        os.replace(part, path)

    def _stored(self, name: str) -> Shard | None:
        try:
            values = json.loads((self.folder / f"{name}.json").read_text())
            sizes = values.pop("sizes")
            values["invalid"] = [InvalidLine(*entry) for entry in values["invalid"]]
            values["corpora"] = [CorpusCounts(**counts) for counts in values["corpora"]]
            shard = Shard(**{**values, "resumed": True})
            return shard if self._sizes(shard) == sizes else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _sizes(self, shard: Shard) -> list[int]:
        prefixes = [shard.prefix(self.folder, corpus) for corpus in range(len(shard.corpora))]
        if self.encoding.keys.is_masked:
            prefixes += [shard.mask_prefix(self.folder, corpus) for corpus in range(len(shard.corpora))]
        return [path(prefix).stat().st_size for prefix in prefixes for path in (bin_path, idx_path)]


def make_shards(
    pieces: Iterable[Piece], writer: ShardWriter, num_workers: int
) -> Generator[tuple[Piece, Shard], None, None]:
    """The shards of all pieces, in order, made in this process (`num_workers` 1) or in as many others.

    Workers end with the thread that takes the first shard. They are one thread each if `OMP_NUM_THREADS` is 1 in the
    environment (NumPy's library starts threads otherwise).

    Raises:
        ConfigError: a worker was killed.
        CorpusError: a piece cannot be read, or a shard cannot be written.
        FastEncoderError: a fast encoder differs from the tokenizer.
    """
    if num_workers == 1:
        for piece in pieces:
            yield piece, writer.make(piece)
        return
    # Spawned, not forked: tokenizer libraries hold threads and locks that a fork would break.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(num_workers, context, initializer=_start_worker, initargs=(writer,))
    try:
        waiting: deque[tuple[Piece, str, Future[Shard]]] = deque()
        for piece in pieces:
            identity = piece.identity()
            # Of two equal pieces (a file that is named twice) one is made: two workers would write the same files.
            same = next((future for _, other, future in waiting if other == identity), None)
            waiting.append((piece, identity, same or pool.submit(_make_in_worker, piece)))
            if len(waiting) >= num_workers * _PIECES_AHEAD_PER_WORKER:
                first, _, future = waiting.popleft()
                yield first, future.result()
        while waiting:
            first, _, future = waiting.popleft()
            yield first, future.result()
    except BrokenProcessPool as error:
        raise ConfigError(
            "workers", num_workers, "a worker process was killed (out of memory?)", "use fewer workers"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_WRITER_OF_WORKER: list[ShardWriter] = []


def _start_worker(writer: ShardWriter) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core a worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole group: the parent ends its workers
    _WRITER_OF_WORKER[:] = [writer]
    _end_with_parent()


def _end_with_parent() -> None:
    """A killed parent cannot end its workers, and they would wait for work for ever.

    The kernel does it rather than a thread that waits: glibc's malloc takes no lock in a process of one thread, and
    tokenizers allocate so much that a second thread, though it only sleeps, costs 8 % of the speed.
    """
    parent = multiprocessing.parent_process()
    if parent is None:
        return
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent.pid:  # it was dead before that
            os._exit(1)
    else:
        threading.Thread(target=_exit_after, args=(parent.sentinel,), daemon=True).start()


def _exit_after(sentinel: int) -> None:
    connection.wait([sentinel])
    os._exit(1)


def _make_in_worker(piece: Piece) -> Shard:
    return _WRITER_OF_WORKER[0].make(piece)


def _add(writer: IndexedCorpusWriter, encoded: EncodedDocuments) -> None:
    writer.add_documents(encoded.tokens, encoded.sequence_lengths, encoded.sequences_per_document)
