"""Extracts texts from a line of the input, with a loss mask for texts that are not trained on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from megatron_slm.config.scores import check_column_name
from megatron_slm.errors import ConfigError

MISSING_KEY = "no key"
"""Begins the reason of a line that lacks a key."""


class InvalidLineError(Exception):
    """Raised for an invalid line; the message is the reason. Internal to preprocessing: see `--on-error`."""


class Texts(NamedTuple):
    """The texts of one document under one key."""

    texts: list[str]
    """One text, or several if the value is a list."""
    trained: list[int] | None
    """For every text 1 if its tokens are trained on, else 0; None without a mask."""
    columns: tuple[npt.NDArray[np.float64], ...] = ()
    """A number for each token of all texts, end to end, in the order of `DocumentKeys.score_keys`."""


@dataclass(frozen=True, kw_only=True)
class DocumentKeys:
    """Keys of a line, under the names of the flags of `tools/preprocess_data.py`."""

    json_keys: tuple[str, ...] = ("text",)
    """Keys of texts, one corpus per key. Unused with `prompt_key` and `response_key`."""
    loss_mask_key: str | None = None
    """Key of a list of 0 and 1, one for every text of the list under the only JSON key."""
    prompt_key: str | None = None
    """Key of a text that is context only, not trained on."""
    response_key: str | None = None
    """Key of the text that follows the prompt and is trained on."""
    score_keys: tuple[str, ...] = ()
    """Keys of numbers for the tokens of the only text, a column each (see `scores.py`)."""
    score_default: float = 0.0
    """Number of characters that no span covers."""

    def __post_init__(self) -> None:
        if not self.json_keys or len(set(self.json_keys)) != len(self.json_keys):
            raise ConfigError("--json-keys", self.json_keys, "be one or more different keys", "name each key once")
        if self.prompt_key is None and self.response_key is not None:
            raise ConfigError.missing("--prompt-key", "--response-key", "pass both or neither")
        if self.response_key is None and self.prompt_key is not None:
            raise ConfigError.missing("--response-key", "--prompt-key", "pass both or neither")
        if self.loss_mask_key is not None and (self.prompt_key is not None or len(self.json_keys) != 1):
            raise ConfigError(
                "--loss-mask-key",
                self.loss_mask_key,
                "be used with exactly one of --json-keys, and without --prompt-key",
                "choose one way to mask the loss",
            )
        if self.score_keys:
            if self.prompt_key is not None or len(self.json_keys) != 1:
                raise ConfigError(
                    "--score-key",
                    list(self.score_keys),
                    "be used with exactly one of --json-keys, and without --prompt-key",
                    "preprocess the keys one by one",
                )
            for key in self.score_keys:
                check_column_name("--score-key", key, key)
            if len(set(self.score_keys)) != len(self.score_keys):
                raise ConfigError("--score-key", list(self.score_keys), "name each key once", "remove one of them")

    @property
    def corpora(self) -> tuple[str, ...]:
        """Names of the corpora, in the order of `texts`."""
        return ("sft",) if self.prompt_key is not None else self.json_keys

    @property
    def is_masked(self) -> bool:
        """True if the corpora have a loss mask, so that every document is one sequence."""
        return self.prompt_key is not None or self.loss_mask_key is not None

    @property
    def columns(self) -> tuple[str, ...]:
        """Every key that is read, in order."""
        if self.prompt_key is not None and self.response_key is not None:
            return self.prompt_key, self.response_key
        mask = () if self.loss_mask_key is None else (self.loss_mask_key,)
        return (*self.json_keys, *mask, *self.score_keys)

    def texts(self, document: Mapping[str, Any]) -> list[Texts]:
        """Return the texts of every corpus.

        Raises:
            InvalidLineError: a key is missing, or its value is not text.
        """
        if self.prompt_key is not None and self.response_key is not None:
            return [Texts([_text(document, self.prompt_key), _text(document, self.response_key)], [0, 1])]
        texts = [_texts(document, key) for key in self.json_keys]
        if self.loss_mask_key is None:
            return [Texts(of_key, None) for of_key in texts]
        return [Texts(texts[0], _mask(document, self.loss_mask_key, len(texts[0])))]


def parse_line(line: bytes) -> dict[str, Any]:
    """Parse the JSON object of a line.

    Raises:
        InvalidLineError: the line is not a JSON object in UTF-8.
    """
    try:
        document = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise InvalidLineError(f"not UTF-8 ({error.reason} at byte {error.start})") from error
    except (ValueError, RecursionError) as error:
        raise InvalidLineError(f"not JSON ({error})") from error
    if not isinstance(document, dict):
        raise InvalidLineError(f"not a JSON object but {type(document).__name__}")
    return document


def value_of(document: Mapping[str, Any], key: str) -> Any:
    """Return the value of a key.

    Raises:
        InvalidLineError: there is no such key.
    """
    if key not in document:
        raise InvalidLineError(f"{MISSING_KEY} {key!r} (the keys are {', '.join(map(repr, document)) or 'none'})")
    return document[key]


def _texts(document: Mapping[str, Any], key: str) -> list[str]:
    value = value_of(document, key)
    texts = value if isinstance(value, list) else [value]
    for text in texts:
        if not isinstance(text, str):
            raise InvalidLineError(f"the value of {key!r} is not text but {type(text).__name__}")
        if not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise InvalidLineError(f"the value of {key!r} has half of a surrogate pair") from error
    return texts


def _text(document: Mapping[str, Any], key: str) -> str:
    texts = _texts(document, key)
    if len(texts) != 1 or isinstance(document[key], list):
        raise InvalidLineError(f"the value of {key!r} is not text but list")
    return texts[0]


def _mask(document: Mapping[str, Any], key: str, num_texts: int) -> list[int]:
    value = value_of(document, key)
    mask = value if isinstance(value, list) else [value]
    if len(mask) != num_texts or any(entry not in (0, 1) for entry in mask):
        raise InvalidLineError(f"the value of {key!r} is not {num_texts} times 0 or 1, one for every text")
    return [int(entry) for entry in mask]
