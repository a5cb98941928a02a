"""Reading JSON lines: plain, gzip or Zstandard files, and the texts of one line."""

from __future__ import annotations

import glob
import gzip
import io
import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from megatron_slm.errors import CorpusError

_CHUNK_BYTES = 1 << 20


class InvalidLineError(Exception):
    """A line that is not a document; its text says why. Never leaves the package: see `--on-error`."""


def expand_inputs(inputs: Sequence[str | Path]) -> list[Path]:
    """The files that `inputs` name, in order; a pattern (`data/*.jsonl`) gives its files sorted by name.

    Raises:
        CorpusError: one names no file.
    """
    files = []
    for name in map(str, inputs):
        found = [name] if Path(name).is_file() else sorted(filter(Path.is_file, map(Path, glob.glob(name))))
        if not found:
            raise CorpusError("input", name, "must be a file, or a pattern that matches some", "check the path")
        files += [Path(path) for path in found]
    return files


def read_lines(path: Path) -> Iterator[bytes]:
    """The lines of a file, decompressed by its suffix (.gz, .zst), without line breaks.

    Raises:
        CorpusError: it cannot be read to its end.
    """
    try:
        with _open(path) as stream:
            for line in stream:
                yield line.rstrip(b"\r\n")
    except (OSError, EOFError, zlib.error) as error:
        raise CorpusError(
            "input",
            str(path),
            f"cannot be read to its end ({type(error).__name__}: {error})",
            "copy the file again",
        ) from error


def texts_of_line(line: bytes, keys: Sequence[str]) -> list[list[str]]:
    """The texts of every key of one JSON line: one text, or several where the value is a list.

    Raises:
        InvalidLineError: it is not a JSON object with a text (or a list of texts) under every key.
    """
    try:
        document = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise InvalidLineError(f"not UTF-8 ({error.reason} at byte {error.start})") from error
    except (ValueError, RecursionError) as error:
        raise InvalidLineError(f"not JSON ({error})") from error
    if not isinstance(document, dict):
        raise InvalidLineError(f"not a JSON object but a {type(document).__name__}")
    return [_texts_of_value(document, key) for key in keys]


def _texts_of_value(document: dict[str, Any], key: str) -> list[str]:
    if key not in document:
        raise InvalidLineError(f"no key {key!r} (it has {', '.join(map(repr, document)) or 'none'})")
    value = document[key]
    texts = value if isinstance(value, list) else [value]
    for text in texts:
        if not isinstance(text, str):
            raise InvalidLineError(f"the value of {key!r} is not a text but a {type(text).__name__}")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InvalidLineError(f"the value of {key!r} holds half of a surrogate pair") from error
    return texts


def _open(path: Path) -> BinaryIO | gzip.GzipFile:
    if path.suffix == ".gz":
        return gzip.GzipFile(path)
    if path.suffix == ".zst":
        return io.BufferedReader(_ZstandardFile(path), _CHUNK_BYTES)
    return open(path, "rb", buffering=_CHUNK_BYTES)


class _ZstandardFile(io.RawIOBase):
    """The frames of a .zst file one after another; unlike the library's reader it notices a cut-off file."""

    def __init__(self, path: Path) -> None:
        self._file = io.FileIO(path)
        try:
            import zstandard
        except ImportError as error:
            raise CorpusError(
                "input", str(path), "needs the package zstandard", "pip install zstandard, or decompress it"
            ) from error
        self._error = zstandard.ZstdError
        self._library = zstandard.ZstdDecompressor()
        self._frame: Any = None
        self._compressed = b""
        self._plain = b""

    def readable(self) -> bool:
        """True: the only thing it does."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill `buffer` with decompressed bytes; 0 at the end of the file."""
        while not self._plain:
            if not self._compressed:
                self._compressed = self._file.read(_CHUNK_BYTES) or b""
            if not self._compressed:
                if self._frame is not None:
                    raise EOFError("the file ends within a frame")
                return 0
            self._plain = self._decompress()
        count = min(len(buffer), len(self._plain))
        buffer[:count], self._plain = self._plain[:count], self._plain[count:]
        return count

    def close(self) -> None:
        """Close the file beneath."""
        self._file.close()
        super().close()

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
