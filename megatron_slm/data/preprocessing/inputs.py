"""Splits the input of preprocessing (JSON lines, compressed ones, Parquet) into chunks that workers read."""

from __future__ import annotations

import glob
import hashlib
import io
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

from megatron_slm.data.preprocessing.compressed import COMPRESSED_SUFFIXES, open_decompressed, read_lines
from megatron_slm.data.preprocessing.documents import InvalidLineError, parse_line
from megatron_slm.errors import CorpusError

STANDARD_INPUT = "-"
STREAM_CHUNK_BYTES = 16 << 20
_MIN_CHUNK_BYTES, _MAX_CHUNK_BYTES, _CHUNKS = 1 << 20, 64 << 20, 64
_MIN_LAST_CHUNK_BYTES, _CHUNKS_LEFT_PER_WORKER = 1 << 18, 2
_ROWS_PER_BATCH = 1024
_READ_SUFFIXES = (*COMPRESSED_SUFFIXES, ".parquet")
_UNREAD_SUFFIXES = (".bz2", ".xz", ".lz4", ".zip", ".7z", ".tar", ".tgz")
_OTHER_KINDS = {
    ".txt": "plain text",
    ".md": "plain text",
    ".html": "a web page",
    ".csv": "a table of comma-separated values",
    ".tsv": "a table of tab-separated values",
    ".arrow": "an Arrow table",
    ".feather": "an Arrow table",
    ".pdf": "a PDF document",
    ".bin": "a binary file",
    ".idx": "an index of a corpus",
    ".npy": "an array",
}
"""Suffixes, before that of a compression, of files that are no JSON lines."""


class TextLine(NamedTuple):
    """A line of text, or a row of a table."""

    number: int
    """Counted from 0 at the chunk's first line."""
    num_bytes: int
    """Size in the input, decompressed."""
    document: dict[str, Any] | None
    """The parsed object; None for a blank or invalid line."""
    problem: str
    """Reason why the line is invalid; empty for a valid or blank line."""


class Chunk(Protocol):
    """A worker's share of an input file: a plain value that can be pickled."""

    @property
    def source(self) -> str:
        """The file, for messages."""

    @property
    def begins(self) -> bool:
        """True for the first chunk of a source; a file that is named twice has two first chunks."""

    @property
    def input_bytes(self) -> int:
        """Its share of the input's size on disk, in bytes."""

    def identity(self) -> str:
        """Return a text that differs between chunks of different content."""

    def lines(self, columns: Sequence[str]) -> Iterator[TextLine]:
        """Yield its lines; from a table, only these columns.

        Raises:
            CorpusError: the file cannot be read, or changes meanwhile.
        """


@dataclass(frozen=True)
class _OfFile(ABC):
    path: Path
    size: int
    modified_ns: int
    input_bytes: int

    @property
    def source(self) -> str:
        """Path of the file."""
        return str(self.path)

    @property
    def begins(self) -> bool:
        """True: the chunk is the whole file."""
        return True

    def identity(self) -> str:
        """Return type, path, size, modification time and range."""
        return repr((type(self).__name__, str(self.path.resolve()), self))

    def lines(self, columns: Sequence[str]) -> Iterator[TextLine]:
        """Yield the parsed lines, and raise CorpusError if the file changes meanwhile."""
        _require_unchanged(self.path, self.size, self.modified_ns)
        yield from self._lines(columns)
        _require_unchanged(self.path, self.size, self.modified_ns)

    @abstractmethod
    def _lines(self, columns: Sequence[str]) -> Iterator[TextLine]: ...


@dataclass(frozen=True)
class ByteRange(_OfFile):
    """The lines of a plain file that start within [start, stop)."""

    start: int
    stop: int

    @property
    def begins(self) -> bool:
        """True for the range from byte 0."""
        return self.start == 0

    def _lines(self, columns: Sequence[str]) -> Iterator[TextLine]:
        with open_decompressed(self.path) as (file, _):
            if self.start:
                file.seek(self.start - 1)
                file.readline()  # the rest of a line that starts before, or just the line break of the line before
            yield from _parsed(self._raw(file))

    def _raw(self, file: BinaryIO) -> Iterator[bytes]:
        position = file.tell()
        while position < self.stop and (line := file.readline()):
            position += len(line)
            yield line


@dataclass(frozen=True)
class WholeFile(_OfFile):
    """A compressed file as a whole."""

    def _lines(self, columns: Sequence[str]) -> Iterator[TextLine]:
        yield from _parsed(line + b"\n" for line in read_lines(self.path))


@dataclass(frozen=True)
class RowGroups(_OfFile):
    """The row groups [start, stop) of a Parquet file; every row is a line."""

    start: int
    stop: int

    @property
    def begins(self) -> bool:
        """True for the range from the first row group."""
        return self.start == 0

    def _lines(self, columns: Sequence[str]) -> Iterator[TextLine]:
        table = _parquet(self.path)
        wanted = [name for name in dict.fromkeys(columns) if name in table.schema_arrow.names]
        number = 0
        try:
            groups = list(range(self.start, self.stop))
            for batch in table.iter_batches(_ROWS_PER_BATCH, groups, wanted, use_threads=False):
                row_bytes = batch.nbytes // max(1, batch.num_rows)
                for row in batch.to_pylist():
                    yield TextLine(number, row_bytes, row, "")
                    number += 1
        except (OSError, ValueError) as error:  # the bases of pyarrow's errors
            raise CorpusError(
                "--input", str(self.path), f"be readable as Parquet ({error})", "copy the file again"
            ) from error


@dataclass(frozen=True)
class StreamedLines:
    """Lines that were already read, from standard input or from one large compressed file."""

    source: str
    input_bytes: int
    content: bytes = field(repr=False)
    begins: bool = True

    def identity(self) -> str:
        """Return the source and the SHA-256 of the content."""
        return f"{self.source} {hashlib.sha256(self.content).hexdigest()}"

    def lines(self, columns: Sequence[str]) -> Iterator[TextLine]:
        """Yield the parsed lines of the content."""
        yield from _parsed(io.BytesIO(self.content))


def expand_inputs(inputs: Sequence[str | Path], flag: str = "--input") -> list[Path]:
    """Return the files that `inputs` name, in order; those of a pattern (`data/*.jsonl`) sorted by name.

    Args:
        flag: the flag that names the inputs, for errors.

    Raises:
        CorpusError: a name matches no file, or a file has an unsupported suffix.
    """
    files = []
    for name in map(str, inputs):
        matching = [name] if Path(name).is_file() else sorted(glob.glob(name, recursive=True))
        found = [path for path in map(Path, matching) if path.is_file()]
        if not found:
            raise CorpusError(flag, name, "be a file, or a pattern that matches files", "check the path")
        files += found
    for path in files:
        suffix = path.suffix.lower()
        is_upper_case = suffix in _READ_SUFFIXES and suffix != path.suffix
        if suffix in _UNREAD_SUFFIXES or is_upper_case:
            raise CorpusError(
                flag,
                str(path),
                f"be JSON lines, or end in one of {', '.join(_READ_SUFFIXES)} (in lower case)",
                "decompress or rename it (tools/preprocess_data.py also reads lines from a pipe: --input -)",
            )
    return files


def expand_json_lines(inputs: Sequence[str | Path]) -> list[Path]:
    """Return the files that --input names (see `expand_inputs`), all of them JSON lines or Parquet by their names.

    Raises:
        CorpusError: a name matches no file, or is that of another kind of file.
    """
    files = expand_inputs(inputs)
    for path in files:
        kind = _OTHER_KINDS.get(_without_compression(path).suffix.lower())
        if kind is not None:
            raise CorpusError(
                "--input",
                str(path),
                f"be JSON lines or Parquet; its name is that of {kind}",
                'write one JSON object a document and line, like {"text": "..."}, or rename the file if it does',
            )
    return files


def _without_compression(path: Path) -> Path:
    return path.with_suffix("") if path.suffix.lower() in COMPRESSED_SUFFIXES else path


class Inputs:
    """The files of --input, in order.

    Args:
        inputs: files and patterns, or `-` alone for standard input.

    Attributes:
        total_bytes: size on disk; None for standard input.

    Raises:
        CorpusError: a name matches no file, or `-` is not alone.
    """

    def __init__(self, inputs: Sequence[str]) -> None:
        if STANDARD_INPUT in inputs and len(inputs) > 1:
            raise CorpusError(
                "--input", STANDARD_INPUT, "be the only input (it is standard input)", "remove the others"
            )
        self.files = [] if STANDARD_INPUT in inputs else expand_json_lines(inputs)
        self.total_bytes = sum(path.stat().st_size for path in self.files) if self.files else None

    def chunks(self, workers: int) -> Iterator[Chunk]:
        """Split the inputs. Workers read compressed files whole if there are enough; else this process streams them.

        Several workers get smaller chunks towards the end, so that none waits long for another's last one.

        Raises:
            CorpusError: a file cannot be read.
        """
        if not self.files:
            yield from _stream(STANDARD_INPUT, sys.stdin.buffer, None)
        total_bytes = left_bytes = self.total_bytes or 0
        compressed = [path for path in self.files if path.suffix in COMPRESSED_SUFFIXES]
        for path in self.files:
            status = path.stat()
            size, modified_ns = status.st_size, status.st_mtime_ns
            if path.suffix == ".parquet":
                yield from _row_groups(path, size, modified_ns, _chunk_bytes(total_bytes, left_bytes, workers))
            elif path.suffix not in COMPRESSED_SUFFIXES:
                start = 0
                while start < size:
                    stop = min(start + _chunk_bytes(total_bytes, left_bytes - start, workers), size)
                    yield ByteRange(path, size, modified_ns, input_bytes=stop - start, start=start, stop=stop)
                    start = stop
            elif len(compressed) >= 2 * workers or workers == 1:
                yield WholeFile(path, size, modified_ns, input_bytes=size)
            else:
                with open_decompressed(path) as (stream, file):
                    yield from _stream(str(path), stream, file)
                _require_unchanged(path, size, modified_ns)
            left_bytes -= size


def _require_unchanged(path: Path, size: int, modified_ns: int) -> None:
    now = path.stat()
    if (now.st_size, now.st_mtime_ns) != (size, modified_ns):
        raise CorpusError(
            "--input",
            str(path),
            f"not change while it is read (it has {now.st_size} bytes now, and had {size})",
            "start again when it is complete",
        )


def _chunk_bytes(total_bytes: int, left_bytes: int, workers: int) -> int:
    """Return a power of two, so that most chunks stay the same when files are added or `workers` changes."""
    share = max(1, total_bytes // _CHUNKS)
    chunk_bytes = min(_MAX_CHUNK_BYTES, max(_MIN_CHUNK_BYTES, 1 << (share - 1).bit_length()))
    if workers == 1:
        return chunk_bytes
    last = max(1, left_bytes // (_CHUNKS_LEFT_PER_WORKER * workers))
    return min(chunk_bytes, max(_MIN_LAST_CHUNK_BYTES, 1 << (last.bit_length() - 1)))


def _stream(source: str, stream: BinaryIO, raw_file: BinaryIO | None) -> Iterator[StreamedLines]:
    """Cut a stream at line breaks; `raw_file` is the compressed file beneath it, if any."""
    position = 0
    while content := stream.read(STREAM_CHUNK_BYTES):
        content += stream.readline()  # complete the last line; after a line break this reads one more
        end = position + len(content) if raw_file is None else raw_file.tell()
        yield StreamedLines(source, input_bytes=end - position, content=content, begins=position == 0)
        position = end


def _row_groups(path: Path, size: int, modified_ns: int, chunk_bytes: int) -> Iterator[RowGroups]:
    metadata = _parquet(path).metadata
    sizes = [metadata.row_group(index).total_byte_size for index in range(metadata.num_row_groups)]
    start, taken = 0, 0
    for stop, group in enumerate(sizes, start=1):
        taken += group
        if taken >= chunk_bytes or stop == len(sizes):
            input_bytes = size * taken // max(1, sum(sizes))
            yield RowGroups(path, size, modified_ns, input_bytes=input_bytes, start=start, stop=stop)
            start, taken = stop, 0


def _parquet(path: Path) -> Any:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise CorpusError(
            "--input", str(path), "be read with the package pyarrow", "pip install 'megatron_slm[preprocess]'"
        ) from error
    try:
        return parquet.ParquetFile(path)
    except (OSError, ValueError) as error:
        raise CorpusError("--input", str(path), f"be a Parquet file ({error})", "copy the file again") from error


def _parsed(raw_lines: Iterable[bytes]) -> Iterator[TextLine]:
    for number, raw in enumerate(raw_lines):
        line = raw.rstrip(b"\r\n")
        if not line.strip():
            yield TextLine(number, len(raw), None, "")
            continue
        try:
            yield TextLine(number, len(raw), parse_line(line), "")
        except InvalidLineError as error:
            yield TextLine(number, len(raw), None, str(error))
