"""Fixed texts as samples, one text per sample, never packed."""

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
"""Limit of the texts of a file: they are kept in memory, and each evaluation records all their losses."""


@dataclass(frozen=True, kw_only=True)
class TextSamples:
    """Texts, each padded to a sample of `sequence_length` inputs."""

    name: str
    sequence_length: int
    ids: tuple[npt.NDArray[np.int64], ...]
    """Token ids of each text, int64, from 2 to `sequence_length + 1` of them."""
    sources: tuple[str, ...]
    """Source of each text, for display."""
    cut: tuple[int, ...] = ()
    """Indices of the texts that were truncated."""

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int, /) -> Sample:
        own, length = self.ids[index], self.sequence_length
        tokens = np.full(length + 1, PADDING_ID, np.int64)
        tokens[: own.size] = own
        ends = [own.size] if own.size <= length else []
        return Sample(tokens, np.arange(length) < own.size - 1, np.array(ends, np.int64))


def read_texts(path: str, tokenizer: Tokenizer, *, sequence_length: int, field: str) -> TextSamples:
    """Read the texts of a file: JSON lines with a `text` each (.gz and .zst too), or .txt, which is one text.

    A text longer than a sample is truncated, with a warning.

    Args:
        sequence_length: inputs of a sample, `s`.
        field: the flag that names the file, for errors.

    Raises:
        ConfigError: the file is missing or not UTF-8, has a line without a text, has no text or too many, or a text has
            fewer than two tokens.
        VocabularyError: the tokenizer cannot encode a text (NullTokenizer reads numbers).
    """
    ids: list[npt.NDArray[np.int64]] = []
    sources: list[str] = []
    cut: list[int] = []
    for place, text in _texts(path, field):
        tokens = np.array(tokenizer.encode(text), np.int64)
        if tokens.size < 2:
            raise ConfigError(
                field, f"{path}, {place}", "have at least two tokens (the first is not predicted)", "remove the text"
            )
        if tokens.size > sequence_length + 1:
            logger.warning(
                "%s %s, %s: using the first %d of %d tokens, the length of a sample",
                field, path, place, sequence_length + 1, tokens.size,
            )  # fmt: skip
            cut.append(len(ids))
        ids.append(tokens[: sequence_length + 1])
        sources.append(place if place != "text" else Path(path).name)
        if len(ids) > MOST_TEXTS:
            raise ConfigError(
                field,
                path,
                f"have at most {MOST_TEXTS} texts",
                "remove texts, or make them a corpus for --valid-data-path",
            )
    if not ids:
        raise ConfigError(field, path, "have at least one text", "write one JSON object with a `text` on each line")
    return TextSamples(
        name=Path(path).name, sequence_length=sequence_length, ids=tuple(ids), sources=tuple(sources), cut=tuple(cut)
    )


def _texts(path: str, field: str) -> Iterator[tuple[str, str]]:
    """Yield the place of each text in the file, and the text."""
    try:
        with open_decompressed(Path(path), field) as (stream, _):
            content = stream.read()
    except CorpusError as error:
        raise ConfigError(field, path, error.rule, "check the file") from error
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
                field,
                f"{path}, line {number}",
                f"be a JSON object ({error})",
                "correct the line; plain text ends in .txt",
            ) from error
        if not isinstance(record, dict) or not isinstance(record.get("text"), str):
            raise ConfigError(field, f"{path}, line {number}", "have a text under `text`", "correct the line")
        yield f"line {number}", record["text"]


def _not_utf8(field: str, place: str, error: UnicodeDecodeError) -> ConfigError:
    return ConfigError(field, place, f"be UTF-8 ({error.reason} at byte {error.start})", "convert the file")
