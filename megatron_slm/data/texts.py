"""A few fixed texts as samples: each by itself, from its start, never packed with another."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron_slm.data.preprocessing.compressed import open_decompressed
from megatron_slm.data.reading import PADDING_ID, Sample
from megatron_slm.data.tokenizers.base import Tokenizer
from megatron_slm.errors import ConfigError, CorpusError

logger = logging.getLogger(__name__)

MOST_TEXTS = 256
"""They are kept in memory, and their losses are written again and again: a corpus is for --valid-data-path."""


@dataclass(frozen=True, kw_only=True)
class TextSamples:
    """Texts, each a sample of `sequence_length` inputs, padded at its end."""

    name: str
    sequence_length: int
    ids: tuple[npt.NDArray[np.int64], ...]
    """The tokens of each text, two of them or more, at most `sequence_length + 1`."""
    sources: tuple[str, ...]
    """Where each is from, for people."""
    cut: tuple[int, ...] = ()
    """Numbers, from 0, of the texts that were longer."""

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int, /) -> Sample:
        own, length = self.ids[index], self.sequence_length
        tokens = np.full(length + 1, PADDING_ID, np.int64)
        tokens[: own.size] = own
        ends = [own.size] if own.size <= length else []
        return Sample(tokens, np.arange(length) < own.size - 1, np.array(ends, np.int64))


def read_texts(path: str, tokenizer: Tokenizer, *, sequence_length: int, field: str) -> TextSamples:
    """The texts of a file: JSON lines with a `text` each (.gz and .zst too), or .txt, which is one text.

    A text longer than a sample is cut, and a warning says so.

    Args:
        sequence_length: inputs of a sample, `s`.
        field: the flag that names the file, for errors.

    Raises:
        ConfigError: the file is missing, is not UTF-8, has a line without a text, holds no text or too many, or a text
            has no two tokens.
        VocabularyError: a text is not of the tokenizer's kind (NullTokenizer reads numbers).
    """
    ids: list[npt.NDArray[np.int64]] = []
    sources: list[str] = []
    cut: list[int] = []
    for place, text in _texts(path, field):
        tokens = np.array(tokenizer.encode(text), np.int64)
        if tokens.size < 2:
            raise ConfigError(
                field, f"{path}, {place}", "is a text of two tokens or more: the first is not predicted", "remove it"
            )
        if tokens.size > sequence_length + 1:
            logger.warning(
                "%s %s, %s: its first %d of %d tokens are taken: a sample holds no more",
                field, path, place, sequence_length + 1, tokens.size,
            )  # fmt: skip
            cut.append(len(ids))
        ids.append(tokens[: sequence_length + 1])
        sources.append(place if place != "text" else Path(path).name)
        if len(ids) > MOST_TEXTS:
            raise ConfigError(
                field, path, f"holds at most {MOST_TEXTS} texts", "give fewer; a corpus is for evaluation"
            )
    if not ids:
        raise ConfigError(field, path, "holds a text", "write one JSON object with a `text` on each line")
    return TextSamples(
        name=Path(path).name, sequence_length=sequence_length, ids=tuple(ids), sources=tuple(sources), cut=tuple(cut)
    )


def _texts(path: str, field: str) -> Iterator[tuple[str, str]]:
    """Where each text is in the file, and the text."""
    try:
        with open_decompressed(Path(path)) as (stream, _):
            content = stream.read()
    except CorpusError as error:
        raise ConfigError(field, path, f"is a file that can be read: it {error.rule}", "check the path") from error
    if Path(path).suffix == ".txt":
        try:
            text = content.decode().replace("\r\n", "\n").replace("\r", "\n")
        except UnicodeDecodeError as error:
            raise _not_utf8(field, path, error) from error
        if text.strip():
            yield "text", text
        return
    for number, line in enumerate(content.splitlines(), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line.decode())
        except UnicodeDecodeError as error:
            raise _not_utf8(field, f"{path}, line {number}", error) from error
        except ValueError as error:
            raise ConfigError(
                field, f"{path}, line {number}", f"is a JSON object ({error})", "mend the line; plain text ends in .txt"
            ) from error
        if not isinstance(record, dict) or not isinstance(record.get("text"), str):
            raise ConfigError(field, f"{path}, line {number}", "has a text under `text`", "mend the line")
        yield f"line {number}", record["text"]


def _not_utf8(field: str, place: str, error: UnicodeDecodeError) -> ConfigError:
    return ConfigError(field, place, f"is UTF-8 ({error.reason} at byte {error.start})", "convert the file")
