"""Megatron's corpus format and its reader: token ids in `.bin`, sequence and document boundaries in `.idx`.

`.idx` (little-endian): magic `MMIDIDX\\0\\0` (9 bytes) | version u64 = 1 | dtype code u8 | N sequences u64 |
M documents + 1 u64 | lengths i32[N] (tokens) | pointers i64[N] (bytes into `.bin`) | document_indices i64[M]
(document k holds the sequences [d[k], d[k + 1])) | modes i8[N] (multimodal corpora only, ignored here).
"""

from __future__ import annotations

import errno
import glob
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from megatron_slm.data.corpus.open_files import OpenFile
from megatron_slm.errors import CorpusError, VocabularyError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")

_DTYPE_BY_CODE: dict[int, type[np.generic]] = {
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    6: np.float64,
    7: np.float32,
    8: np.uint16,
}
CODE_BY_DTYPE = {np.dtype(kind): code for code, kind in _DTYPE_BY_CODE.items()}
INTEGER_CODES = tuple(code for code, kind in _DTYPE_BY_CODE.items() if issubclass(kind, np.integer))

_SEQUENCES_PER_CHECK = 1 << 20
_TOKENS_PER_SCAN = 1 << 22
_SAMPLED_BLOCKS = 64
DEFAULT_SCAN_BYTES = 256 << 20
_REPLACE = "preprocess the corpus again, or copy it again from its source"


def bin_path(prefix: str | Path) -> Path:
    """Return the path of the file of tokens of the corpus `prefix`."""
    return Path(f"{prefix}.bin")


def idx_path(prefix: str | Path) -> Path:
    """Return the path of the index of the corpus `prefix`."""
    return Path(f"{prefix}.idx")


def sidecar_path(prefix: str | Path) -> Path:
    """Return the path of the JSON file that records how the corpus `prefix` was made (see `sidecar.py`)."""
    return Path(f"{prefix}.meta.json")


def dtype_for_vocabulary(vocab_size: int) -> np.dtype[Any]:
    """Return Megatron's choice of token dtype: uint16 when `vocab_size` < 65500, else int32."""
    return np.dtype(np.uint16) if vocab_size < 65500 else np.dtype(np.int32)


class CorpusIndex:
    """The boundaries of a corpus on disk, memory-mapped while in use, validated against its `.bin` on opening.

    Attributes:
        prefix: path without `.bin` and `.idx`.
        dtype: dtype of the token ids.
        num_sequences: number of sequences (Megatron packs and splits by sequence).
        num_documents: number of documents, empty ones included.
        num_tokens: tokens of the whole corpus, possibly 0.

    Raises:
        CorpusError: a file is missing, truncated, damaged, or of another format.
    """

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = str(prefix)
        self._require_files()
        self.dtype, self.num_sequences, num_boundaries = self._read_header()
        self.num_documents = num_boundaries - 1
        path = idx_path(self.prefix)
        self._index = OpenFile(path, partial(_map_index, path, self.num_sequences, num_boundaries))
        self._check_documents()
        self.num_tokens = self._check_sequences()
        self._check_bin_size()

    @property
    def sequence_lengths(self) -> npt.NDArray[np.int32]:
        """Tokens of every sequence, int32 [N]. Whoever keeps the array keeps the file open."""
        return self._index.use().lengths

    @property
    def sequence_pointers(self) -> npt.NDArray[np.int64]:
        """Start of every sequence in `.bin`, bytes, int64 [N]."""
        return self._index.use().pointers

    @property
    def document_indices(self) -> npt.NDArray[np.int64]:
        """First sequence of every document, then N, int64 [documents + 1]."""
        return self._index.use().document_indices

    def _require_files(self) -> None:
        for path in (idx_path(self.prefix), bin_path(self.prefix)):
            if path.is_file():
                continue
            bare = self.prefix.removesuffix(".bin").removesuffix(".idx")
            near = _nearby_prefixes(self.prefix)
            fix = "check the prefix, or preprocess again"
            if bare != self.prefix:
                fix = f"pass the prefix {bare!r}"
            elif near:
                fix = f"pass {' or '.join(map(repr, near))}"
            raise CorpusError("corpus prefix", self.prefix, f"name existing files; {path} is missing", fix)

    def _read_header(self) -> tuple[np.dtype[Any], int, int]:
        path = idx_path(self.prefix)
        with _readable(path), path.open("rb") as file:
            header, size = file.read(HEADER.size), os.fstat(file.fileno()).st_size
        if size < HEADER.size:
            raise CorpusError(
                f"{path}: size", size, f"be at least {HEADER.size} bytes, the size of the header", _REPLACE
            )
        magic, version, code, num_sequences, num_boundaries = HEADER.unpack(header)
        if magic != MAGIC:
            raise CorpusError(f"{path}: magic", magic, f"be {MAGIC!r} (Megatron's index)", _REPLACE)
        if version != VERSION:
            raise CorpusError(f"{path}: version", version, f"be {VERSION}", _REPLACE)
        if code not in INTEGER_CODES:
            raise CorpusError(f"{path}: dtype code", code, f"be one of {INTEGER_CODES} (integers)", _REPLACE)
        expected = HEADER.size + 12 * num_sequences + 8 * num_boundaries
        if size not in (expected, expected + num_sequences):
            raise CorpusError(
                f"{path}: size",
                size,
                f"be {expected} bytes for {num_sequences} sequences and {num_boundaries - 1} documents",
                _REPLACE,
            )
        return np.dtype(_DTYPE_BY_CODE[code]).newbyteorder("<"), num_sequences, num_boundaries

    def _check_documents(self) -> None:
        boundaries, field = self.document_indices, f"{idx_path(self.prefix)}: document_indices"
        ends = (int(boundaries[0]), int(boundaries[-1])) if boundaries.size else ()
        if ends != (0, self.num_sequences):
            raise CorpusError(field, ends, f"start at 0 and end at {self.num_sequences}, the sequences", _REPLACE)
        for start in range(0, boundaries.size, _SEQUENCES_PER_CHECK):
            block = boundaries[start : start + _SEQUENCES_PER_CHECK + 1]
            if np.any(block[1:] < block[:-1]):
                at = start + int(np.argmax(block[1:] < block[:-1])) + 1
                raise CorpusError(f"{field}[{at}]", int(boundaries[at]), "not decrease", _REPLACE)

    def _check_sequences(self) -> int:
        """Check lengths and pointers block by block (an index can be big), and return the number of tokens."""
        num_tokens = 0
        for start in range(0, self.num_sequences, _SEQUENCES_PER_CHECK):
            lengths = self.sequence_lengths[start : start + _SEQUENCES_PER_CHECK].astype(np.int64)
            ends = num_tokens + np.cumsum(lengths)
            pointers = self.sequence_pointers[start : start + _SEQUENCES_PER_CHECK]
            wrong = (lengths < 0) | (pointers != (ends - lengths) * self.dtype.itemsize)
            if wrong.any():
                at = int(np.argmax(wrong))
                raise CorpusError(
                    f"{idx_path(self.prefix)}: (length, pointer) of sequence {start + at}",
                    (int(lengths[at]), int(pointers[at])),
                    "be a length >= 0 and the end of the sequence before",
                    _REPLACE,
                )
            num_tokens = int(ends[-1])
        return num_tokens

    def _check_bin_size(self) -> None:
        path, expected = bin_path(self.prefix), self.num_tokens * self.dtype.itemsize
        size = path.stat().st_size
        if size != expected:
            relation = "shorter" if size < expected else "longer"
            raise CorpusError(
                f"{path}: size",
                size,
                f"be {expected} bytes ({self.num_tokens} tokens of {self.dtype.name}); it is {relation}",
                "copy the corpus again, or preprocess again (a copy was cut off, or .bin and .idx are of two runs)",
            )


class _Index(NamedTuple):
    """The arrays of an `.idx`."""

    lengths: npt.NDArray[np.int32]
    pointers: npt.NDArray[np.int64]
    document_indices: npt.NDArray[np.int64]


def _map_index(path: Path, num_sequences: int, num_boundaries: int) -> _Index:
    index = _map(path, np.dtype(np.uint8))
    pointers = HEADER.size + 4 * num_sequences
    return _Index(
        np.frombuffer(index, "<i4", num_sequences, HEADER.size),
        np.frombuffer(index, "<i8", num_sequences, pointers),
        np.frombuffer(index, "<i8", num_boundaries, pointers + 8 * num_sequences),
    )


def _map(path: Path, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    with _readable(path):
        return np.asarray(np.memmap(path, mode="r", dtype=dtype))


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turn an error of the operating system into one that names the file."""
    try:
        yield
    except OSError as error:
        fix = "check the disk or the network share"
        if error.errno in (errno.EMFILE, errno.ENFILE):
            fix = "raise the limit of open files (ulimit -n)"
        raise CorpusError("corpus file", str(path), f"be readable ({error.strerror})", fix) from error


def _nearby_prefixes(prefix: str) -> list[str]:
    """Return up to three prefixes of corpora that continue this one, as preprocessing names them (`_text_document`)."""
    folder, name = os.path.split(prefix)
    found = sorted(Path(folder or ".").glob(f"{glob.escape(name)}*_document.idx")) if name else []
    return [os.path.join(folder, path.name.removesuffix(".idx")) for path in found[:3]]


class IndexedCorpus(CorpusIndex):
    """A corpus on disk, memory-mapped while in use, validated on opening.

    Raises:
        CorpusError: a file is missing, truncated, damaged, of another format, or holds no token.
    """

    def __init__(self, prefix: str | Path) -> None:
        super().__init__(prefix)
        if self.num_tokens == 0:
            raise CorpusError(f"{bin_path(prefix)}: number of tokens", 0, "be at least 1", "preprocess again")
        self._bin = OpenFile(bin_path(prefix), partial(_map, bin_path(prefix), self.dtype))

    def __reduce__(self) -> tuple[type[IndexedCorpus], tuple[str]]:
        return type(self), (self.prefix,)

    def __repr__(self) -> str:
        return f"IndexedCorpus({self.prefix!r}, {self.num_sequences} sequences, {self.num_tokens} tokens)"

    def get(self, index: int, offset: int = 0, length: int | None = None) -> npt.NDArray[Any]:
        """Return tokens [offset, offset + length) of one sequence: a read-only view in the corpus's dtype.

        Args:
            index: number of the sequence.
            offset: first token within the sequence.
            length: number of tokens; up to the end of the sequence when None.

        Raises:
            IndexError: the sequence does not exist, or does not hold these tokens.
        """
        if not 0 <= index < self.num_sequences:
            raise IndexError(f"sequence {index} of {self.prefix}, which has {self.num_sequences}")
        available = int(self.sequence_lengths[index])
        count = available - offset if length is None else length
        if offset < 0 or count < 0 or offset + count > available:
            raise IndexError(
                f"tokens [{offset}, {offset + count}) of sequence {index} of {self.prefix}, which holds {available}"
            )
        start = int(self.sequence_pointers[index]) // self.dtype.itemsize + offset
        return self._bin.use()[start : start + count]

    def max_token_id(self, byte_budget: int = DEFAULT_SCAN_BYTES) -> int:
        """Return the largest token id: of the whole corpus when `.bin` is within the budget, else of sampled blocks.

        Args:
            byte_budget: bytes of `.bin` that may be read.
        """
        return self._token_id_range(byte_budget)[1]

    def check_vocabulary(self, vocab_size: int, byte_budget: int = DEFAULT_SCAN_BYTES) -> None:
        """Check that the token ids (all, or a sample: see `max_token_id`) are in [0, vocab_size).

        Raises:
            VocabularyError: a token id is not; the error names it.
        """
        lowest, highest = self._token_id_range(byte_budget)
        if highest >= vocab_size or lowest < 0:
            raise VocabularyError(
                f"{bin_path(self.prefix)}: token id",
                highest if highest >= vocab_size else lowest,
                f"be in [0, {vocab_size}), the vocabulary of this run",
                "tokenize the corpus again with this run's tokenizer, or name the tokenizer it was made with",
            )

    def _token_id_range(self, byte_budget: int) -> tuple[int, int]:
        lowest, highest = np.iinfo(np.int64).max, np.iinfo(np.int64).min
        for block in self._scanned_blocks(byte_budget // self.dtype.itemsize):
            lowest, highest = min(lowest, int(block.min())), max(highest, int(block.max()))
        return lowest, highest

    def _scanned_blocks(self, max_tokens: int) -> Iterator[npt.NDArray[Any]]:
        if self.num_tokens <= max_tokens:
            for start in range(0, self.num_tokens, _TOKENS_PER_SCAN):
                yield self._bin.use()[start : start + _TOKENS_PER_SCAN]
            return
        block = max(1, max_tokens // _SAMPLED_BLOCKS)
        starts = np.linspace(0, self.num_tokens - block, _SAMPLED_BLOCKS).astype(np.int64)
        for start in starts.tolist():
            yield self._bin.use()[start : start + block]
