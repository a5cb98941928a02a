"""Columns beside a corpus: one float16 number for every token, such as a classifier's score or a weight.

    PREFIX_NAME.bin, .idx      the numbers, with the sequences and documents of the corpus PREFIX
    PREFIX_NAME.meta.json      the corpus they belong to, and their range

The index has Megatron's dtype code of uint16, since the format has none for float16: the same bits.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt

from megatron_slm.data.corpus.content import content_sha256
from megatron_slm.data.corpus.indexed import IndexedCorpus, bin_path, idx_path, sidecar_path
from megatron_slm.data.corpus.indexed_writer import IndexedCorpusWriter
from megatron_slm.errors import CorpusError
from megatron_slm.files import write_durably

STORED_DTYPE = np.dtype(np.uint16)
"""Dtype of the index; `numbers_of` reads the same bits as float16."""

FILES = (".idx", ".bin", ".meta.json")
"""Suffixes of a column's files after `PREFIX_NAME`."""

_LARGEST = float(np.finfo(np.float16).max)
_NUMBERS_PER_READ = 1 << 22
_WRITE_AGAIN = "write the column again (tools/preprocess_data.py --score-key, or ColumnWriter)"


@dataclass(frozen=True, kw_only=True)
class ColumnSidecar:
    """The corpus that a column belongs to, and the range of its numbers."""

    corpus_sha256: str
    """Checksum of the corpus (`content_sha256`)."""
    minimum: float
    maximum: float
    dtype: str = "float16"


def column_prefix(prefix: str | Path, name: str) -> str:
    """Return the prefix of the column `name` of the corpus `prefix`."""
    return f"{prefix}_{name}"


def as_stored(numbers: npt.ArrayLike, field: str) -> npt.NDArray[np.uint16]:
    """Return numbers as they are stored: the bits of float16.

    Raises:
        CorpusError: a number is not finite, or too large.
    """
    array = np.asarray(numbers, np.float64)
    wrong = ~(np.abs(array) <= _LARGEST)
    if wrong.any():
        at = int(np.argmax(wrong))
        rule = f"be finite and at most {_LARGEST:g} in size, which float16 can hold"
        raise CorpusError(f"{field}: number {at}", float(array[at]), rule, "scale the numbers")
    return array.astype("<f2").view("<u2")


def numbers_of(stored: npt.NDArray[np.uint16]) -> npt.NDArray[np.float16]:
    """Return stored bits as numbers."""
    return stored.view("<f2")


class ColumnWriter(contextlib.AbstractContextManager["ColumnWriter"]):
    """Writes a column of a corpus, sequence by sequence; nothing is at its prefix before the `with` block ends.

        with ColumnWriter("corpus_text_document", "quality") as writer:
            for sequence in range(corpus.num_sequences):
                writer.add(scores_of(corpus.get(sequence)))

    Args:
        prefix: the corpus.
        name: name of the column.

    Raises:
        CorpusError: the corpus or the column cannot be opened; (at the end) numbers of some sequences are missing.
    """

    def __init__(self, prefix: str | Path, name: str) -> None:
        self.prefix, self.name = str(prefix), name
        self._corpus = IndexedCorpus(prefix)
        self._sequence = 0
        self._writer = IndexedCorpusWriter(column_prefix(prefix, name), STORED_DTYPE)

    def add(self, numbers: npt.ArrayLike) -> None:
        """Append the numbers of the next sequence, one a token.

        Raises:
            CorpusError: they are more or fewer than the tokens, or float16 cannot hold one.
        """
        field = f"{column_prefix(self.prefix, self.name)}: sequence {self._sequence}"
        stored = as_stored(numbers, field)
        lengths = self._corpus.sequence_lengths
        wanted = int(lengths[self._sequence]) if self._sequence < len(lengths) else 0
        if stored.shape != (wanted,):
            rule = f"be ({wanted},), one number for every token of {self.prefix}"
            raise CorpusError(f"{field}: shape", stored.shape, rule, "write one number a token, sequence by sequence")
        self._writer.add_documents(stored, np.array([wanted], np.int64), np.ones(1, np.int64))
        self._sequence += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._writer.abort()
            return
        if self._sequence != self._corpus.num_sequences:
            self._writer.abort()
            raise CorpusError(
                f"{column_prefix(self.prefix, self.name)}: sequences",
                self._sequence,
                f"be those of {self.prefix}, {self._corpus.num_sequences}",
                "write the numbers of every sequence",
            )
        self._writer.close()
        write_column_sidecar(self.prefix, self.name)


def write_column_sidecar(prefix: str | Path, name: str) -> None:
    """Write the `.meta.json` of a column that lies beside its corpus; without it a column is incomplete."""
    column = column_prefix(prefix, name)
    minimum, maximum = math.inf, -math.inf
    for block in _blocks(column):
        minimum, maximum = min(minimum, float(block.min())), max(maximum, float(block.max()))
    sidecar = ColumnSidecar(corpus_sha256=content_sha256(IndexedCorpus(prefix)), minimum=minimum, maximum=maximum)
    save_column_sidecar(prefix, name, sidecar)


def save_column_sidecar(prefix: str | Path, name: str, sidecar: ColumnSidecar) -> None:
    """Write a column's `.meta.json`."""
    text = json.dumps(dataclasses.asdict(sidecar), indent=2) + "\n"
    write_durably(sidecar_path(column_prefix(prefix, name)), text.encode())


def is_column(prefix: str | Path) -> bool:
    """True if the `.meta.json` at a prefix is that of a column, not of a corpus."""
    try:
        values = json.loads(sidecar_path(prefix).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(values, dict) and "corpus_sha256" in values


def _blocks(column: str) -> Iterator[npt.NDArray[np.float16]]:
    with bin_path(column).open("rb") as file:
        while (block := np.fromfile(file, "<f2", _NUMBERS_PER_READ)).size:
            yield block


def open_column(corpus: IndexedCorpus, name: str) -> IndexedCorpus:
    """Open a column of a corpus.

    Raises:
        CorpusError: it is missing, incomplete, damaged, or has other sequences than the corpus.
    """
    column = column_prefix(corpus.prefix, name)
    if not idx_path(column).is_file():
        found = [path.name for path in idx_path(corpus.prefix).parent.glob(f"{Path(corpus.prefix).name}_*.idx")]
        beside = f" (beside the corpus: {', '.join(sorted(found)[:3])})" if found else ""
        raise CorpusError(
            f"column {name} of {corpus.prefix}", str(idx_path(column)), f"be a file{beside}", _WRITE_AGAIN
        )
    read_column_sidecar(corpus, name)
    opened = IndexedCorpus(column)
    if opened.dtype != STORED_DTYPE or not np.array_equal(opened.sequence_lengths, corpus.sequence_lengths):
        rule = f"hold one float16 for every token of {corpus.prefix}, sequence by sequence"
        raise CorpusError("column", column, rule, _WRITE_AGAIN)
    return opened


def read_column_sidecar(corpus: IndexedCorpus, name: str) -> ColumnSidecar:
    """Read the `.meta.json` of a column.

    Raises:
        CorpusError: it is missing (the column is incomplete), or damaged.
    """
    path = sidecar_path(column_prefix(corpus.prefix, name))
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return ColumnSidecar(**{field.name: values[field.name] for field in dataclasses.fields(ColumnSidecar)})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CorpusError("column sidecar", str(path), f"be complete ({error})", _WRITE_AGAIN) from error


def check_columns(corpus: IndexedCorpus, names: Sequence[str]) -> None:
    """Check that columns were made for the content of a corpus. Reads up to 256 MiB of it.

    Raises:
        CorpusError: a column was made for other tokens.
    """
    content = content_sha256(corpus) if names else ""
    for name in names:
        recorded = read_column_sidecar(corpus, name).corpus_sha256
        if recorded != content:
            raise CorpusError(
                f"{sidecar_path(column_prefix(corpus.prefix, name))}: corpus_sha256",
                recorded[:12],
                f"be that of {bin_path(corpus.prefix)} ({content[:12]}); the column is of another corpus",
                _WRITE_AGAIN,
            )
