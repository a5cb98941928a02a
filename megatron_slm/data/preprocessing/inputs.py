"""The input of preprocessing, cut into pieces that workers read by themselves: JSON lines, compressed ones, Parquet."""

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
STREAM_PIECE_BYTES = 16 << 20
_MIN_PIECE_BYTES, _MAX_PIECE_BYTES, _PIECES = 1 << 20, 64 << 20, 64
_MIN_LAST_PIECE_BYTES, _PIECES_LEFT_PER_WORKER = 1 << 18, 2
_ROWS_PER_BATCH = 1024
_READ_SUFFIXES = (*COMPRESSED_SUFFIXES, ".parquet")
_UNREAD_SUFFIXES = (".bz2", ".xz", ".lz4", ".zip", ".7z", ".tar", ".tgz")


class Line(NamedTuple):
    """A line of text, or a row of a table."""

    number: int
    """Counted from 0 at the piece's first line."""
    num_bytes: int
    """Size in the input, decompressed."""
    document: dict[str, Any] | None
    """What it says; None where the line is blank, or not a document."""
    problem: str
    """Why it is not a document; empty where it is, and for a blank line."""


class Piece(Protocol):
    """A part of one input: a plain value, so that it travels to a worker."""

    @property
    def source(self) -> str:
        """The file, for messages."""

    @property
    def begins(self) -> bool:
        """Whether the source begins with it; a file that is named twice begins twice."""

    @property
    def input_bytes(self) -> int:
        """How much of the input's size on disk it is."""

    def identity(self) -> str:
        """Another one for every other content."""

    def lines(self, columns: Sequence[str]) -> Iterator[Line]:
        """Its lines; of a table only these columns are read.

        Raises:
            CorpusError: the file cannot be read.
        """


@dataclass(frozen=True)
class _OfFile(ABC):
    path: Path
    size: int
    modified_ns: int
    input_bytes: int

    @property
    def source(self) -> str:
        """The path."""
        return str(self.path)

    @property
    def begins(self) -> bool:
        """See `Piece`."""
        return True

    def identity(self) -> str:
        """Path, size, time of change, and which part."""
        return repr((type(self).__name__, str(self.path.resolve()), self))

    def lines(self, columns: Sequence[str]) -> Iterator[Line]:
        """See `Piece`; a file that changes while it is read is an error too."""
        _require_unchanged(self.path, self.size, self.modified_ns)
        yield from self._lines(columns)
        _require_unchanged(self.path, self.size, self.modified_ns)

    @abstractmethod
    def _lines(self, columns: Sequence[str]) -> Iterator[Line]: ...


@dataclass(frozen=True)
class ByteRange(_OfFile):
    """The lines of a plain file that start within [start, stop)."""

    start: int
    stop: int

    @property
    def begins(self) -> bool:
        """See `Piece`."""
        return self.start == 0

    def _lines(self, columns: Sequence[str]) -> Iterator[Line]:
        with open_decompressed(self.path) as (file, _):
            if self.start:
                file.seek(self.start - 1)
                file.readline()  # the rest of a line that starts before; nothing if the byte before ends one
            yield from _parsed(self._raw(file))

    def _raw(self, file: BinaryIO) -> Iterator[bytes]:
        position = file.tell()
        while position < self.stop and (line := file.readline()):
            position += len(line)
            yield line


@dataclass(frozen=True)
class WholeFile(_OfFile):
    """A compressed file, from its beginning to its end."""

    def _lines(self, columns: Sequence[str]) -> Iterator[Line]:
        yield from _parsed(line + b"\n" for line in read_lines(self.path))


@dataclass(frozen=True)
class RowGroups(_OfFile):
    """The row groups [start, stop) of a Parquet file; a line is a row."""

    start: int
    stop: int

    @property
    def begins(self) -> bool:
        """See `Piece`."""
        return self.start == 0

    def _lines(self, columns: Sequence[str]) -> Iterator[Line]:
        table = _parquet(self.path)
        wanted = [name for name in dict.fromkeys(columns) if name in table.schema_arrow.names]
        number = 0
        try:
            groups = list(range(self.start, self.stop))
            for batch in table.iter_batches(_ROWS_PER_BATCH, groups, wanted, use_threads=False):
                row_bytes = batch.nbytes // max(1, batch.num_rows)
                for row in batch.to_pylist():
                    yield Line(number, row_bytes, row, "")
                    number += 1
        except (OSError, ValueError) as error:  # pyarrow's errors are these
            raise CorpusError(
                "input", str(self.path), f"cannot be read as Parquet ({error})", "copy the file again"
            ) from error


@dataclass(frozen=True)
class StreamedLines:
    """Lines that were read already: of standard input, or of one large compressed file."""

    source: str
    input_bytes: int
    content: bytes = field(repr=False)
    begins: bool = True

    def identity(self) -> str:
        """The content itself."""
        return f"{self.source} {hashlib.sha256(self.content).hexdigest()}"

    def lines(self, columns: Sequence[str]) -> Iterator[Line]:
        """See `Piece`."""
        yield from _parsed(io.BytesIO(self.content))


def expand_inputs(inputs: Sequence[str | Path]) -> list[Path]:
    """The files that `inputs` name, in order; a pattern (`data/*.jsonl`) gives its files sorted by name.

    Raises:
        CorpusError: one names no file, or a file of a kind that is not read.
    """
    files = []
    for name in map(str, inputs):
        matching = [name] if Path(name).is_file() else sorted(glob.glob(name, recursive=True))
        found = [path for path in map(Path, matching) if path.is_file()]
        if not found:
            raise CorpusError(
                "input",
                name,
                "must be a file, or a pattern that matches some",
                "check the path (- reads standard input)",
            )
        files += found
    for path in files:
        if path.suffix.lower() in _UNREAD_SUFFIXES or path.suffix != path.suffix.lower() in _READ_SUFFIXES:
            read = ", ".join(_READ_SUFFIXES)
            raise CorpusError(
                "input",
                str(path),
                f"must be JSON lines, or end in one of {read} (in lower case)",
                "decompress or rename it; what another program writes is read with --input -",
            )
    return files


class Inputs:
    """All inputs, in order.

    Args:
        inputs: files and patterns; `-` alone is standard input.

    Attributes:
        total_bytes: size on disk; None for standard input.

    Raises:
        CorpusError: one names no file, or `-` is not alone.
    """

    def __init__(self, inputs: Sequence[str]) -> None:
        if STANDARD_INPUT in inputs and len(inputs) > 1:
            raise CorpusError("input", STANDARD_INPUT, "must be the only input (it is standard input)", "leave it out")
        self.files = [] if STANDARD_INPUT in inputs else expand_inputs(inputs)
        self.total_bytes = sum(path.stat().st_size for path in self.files) if self.files else None

    def pieces(self, workers: int) -> Iterator[Piece]:
        """Cut the inputs. Compressed files are read by the workers where there are enough, else here, piece by piece.

        Several workers get smaller pieces towards the end, so that none waits long for another's last one.

        Raises:
            CorpusError: a file cannot be read.
        """
        if not self.files:
            yield from _stream(STANDARD_INPUT, sys.stdin.buffer, None)
        total_bytes = left_bytes = self.total_bytes or 0
        compressed = [path for path in self.files if path.suffix in COMPRESSED_SUFFIXES]
        for path in self.files:
            status = path.stat()
            of_file = (path, status.st_size, status.st_mtime_ns)
            if path.suffix == ".parquet":
                yield from _row_groups(of_file, _piece_bytes(total_bytes, left_bytes, workers))
            elif path.suffix not in COMPRESSED_SUFFIXES:
                start = 0
                while start < status.st_size:
                    piece_bytes = _piece_bytes(total_bytes, left_bytes - start, workers)
                    stop = min(start + piece_bytes, status.st_size)
                    yield ByteRange(*of_file, stop - start, start, stop)
                    start = stop
            elif len(compressed) >= 2 * workers or workers == 1:
                yield WholeFile(*of_file, status.st_size)
            else:
                with open_decompressed(path) as (stream, file):
                    yield from _stream(str(path), stream, file)
                _require_unchanged(*of_file)
            left_bytes -= status.st_size


def _require_unchanged(path: Path, size: int, modified_ns: int) -> None:
    now = path.stat()
    if (now.st_size, now.st_mtime_ns) != (size, modified_ns):
        raise CorpusError(
            "input",
            str(path),
            f"must not change while it is read (it has {now.st_size} bytes now, and had {size})",
            "start again when it is complete",
        )


def _piece_bytes(total_bytes: int, left_bytes: int, workers: int) -> int:
    """A power of two, so that most pieces stay what they are where files are added or workers are another number."""
    share = max(1, total_bytes // _PIECES)
    piece_bytes = min(_MAX_PIECE_BYTES, max(_MIN_PIECE_BYTES, 1 << (share - 1).bit_length()))
    if workers == 1:
        return piece_bytes
    last = max(1, left_bytes // (_PIECES_LEFT_PER_WORKER * workers))
    return min(piece_bytes, max(_MIN_LAST_PIECE_BYTES, 1 << (last.bit_length() - 1)))


def _stream(source: str, stream: BinaryIO, beneath: BinaryIO | None) -> Iterator[StreamedLines]:
    position = 0
    while content := stream.read(STREAM_PIECE_BYTES):
        content += stream.readline()  # a line is never cut; at its end this reads the next one
        here = position + len(content) if beneath is None else beneath.tell()
        yield StreamedLines(source, here - position, content, position == 0)
        position = here


def _row_groups(of_file: tuple[Path, int, int], piece_bytes: int) -> Iterator[RowGroups]:
    path, size, _ = of_file
    metadata = _parquet(path).metadata
    sizes = [metadata.row_group(index).total_byte_size for index in range(metadata.num_row_groups)]
    start, taken = 0, 0
    for stop, group in enumerate(sizes, start=1):
        taken += group
        if taken >= piece_bytes or stop == len(sizes):
            yield RowGroups(*of_file, size * taken // max(1, sum(sizes)), start, stop)
            start, taken = stop, 0


def _parquet(path: Path) -> Any:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise CorpusError(
            "input", str(path), "needs the package pyarrow", "pip install 'megatron_slm[preprocess]'"
        ) from error
    try:
        return parquet.ParquetFile(path)
    except (OSError, ValueError) as error:
        raise CorpusError("input", str(path), f"must be a Parquet file ({error})", "copy the file again") from error


def _parsed(raw_lines: Iterable[bytes]) -> Iterator[Line]:
    for number, raw in enumerate(raw_lines):
        line = raw.rstrip(b"\r\n")
        if not line.strip():
            yield Line(number, len(raw), None, "")
            continue
        try:
            yield Line(number, len(raw), parse_line(line), "")
        except InvalidLineError as error:
            yield Line(number, len(raw), None, str(error))
