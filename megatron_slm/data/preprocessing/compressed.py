"""Reads plain and compressed files of lines; a truncated file raises an error."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from megatron_slm.errors import CorpusError

COMPRESSED_SUFFIXES = (".gz", ".zst")
_CHUNK_BYTES = 1 << 20


@contextmanager
def open_decompressed(path: Path, flag: str = "--input") -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """Open a file as a decompressed stream (by its suffix: .gz, .zst), and the raw file, whose position shows progress.

    Args:
        flag: the flag that names the file, for errors.

    Raises:
        CorpusError: the file cannot be read to its end.
    """
    try:
        with open(path, "rb", buffering=_CHUNK_BYTES) as file, _decompressed(path, file, flag) as stream:
            yield stream, file
    except (OSError, EOFError, zlib.error) as error:
        raise CorpusError(
            flag,
            str(path),
            f"be readable to its end ({type(error).__name__}: {error})",
            "copy the file again",
        ) from error


def read_lines(path: Path, flag: str = "--input") -> Iterator[bytes]:
    """Yield the lines of a file, decompressed by its suffix (.gz, .zst), without line breaks.

    Args:
        flag: the flag that names the file, for errors.

    Raises:
        CorpusError: the file cannot be read to its end.
    """
    with open_decompressed(path, flag) as (stream, _):
        for line in stream:
            yield line.rstrip(b"\r\n")


def _decompressed(path: Path, file: BinaryIO, flag: str) -> Any:
    if path.suffix == ".gz":
        return gzip.GzipFile(fileobj=file)
    if path.suffix == ".zst":
        return io.BufferedReader(_ZstandardFile(path, file, flag), _CHUNK_BYTES)
    return file


class _ZstandardFile(io.RawIOBase):
    """Reads the frames of a .zst file in turn; unlike the library's reader it detects a truncated file."""

    def __init__(self, path: Path, file: BinaryIO, flag: str) -> None:
        self._file = file
        try:
            import zstandard
        except ImportError as error:
            raise CorpusError(
                flag, str(path), "be read with the package zstandard", "pip install zstandard, or decompress it"
            ) from error
        self._error = zstandard.ZstdError
        self._library = zstandard.ZstdDecompressor()
        self._frame: Any = None
        self._compressed = b""
        self._plain = memoryview(b"")

    def readable(self) -> bool:
        """Return True: the stream can only be read."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill `buffer` with decompressed bytes and return their number; 0 at the end of the file."""
        while not self._plain:
            if not self._compressed:
                self._compressed = self._file.read(_CHUNK_BYTES)
            if not self._compressed:
                if self._frame is not None:
                    raise EOFError("the file ends within a frame")
                return 0
            self._plain = memoryview(self._decompress())
        count = min(len(buffer), len(self._plain))
        buffer[:count], self._plain = self._plain[:count], self._plain[count:]
        return count

    def _decompress(self) -> bytes:
        if self._frame is None:
            self._frame = self._library.decompressobj()
        try:
            plain: bytes = self._frame.decompress(self._compressed)
        except self._error as error:
            raise OSError(str(error)) from error
        self._compressed = self._frame.unused_data
        if self._frame.eof:
            self._frame = None
        return plain
