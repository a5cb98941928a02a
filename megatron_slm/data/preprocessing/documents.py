"""What a line of the input says: the texts of its keys, and which of them are trained on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from megatron_slm.errors import ConfigError


class InvalidLineError(Exception):
    """A line that is not a document; its text says why. Never leaves the package: see `--on-error`."""


class Texts(NamedTuple):
    """The texts of one document under one key."""

    texts: list[str]
    """One, or several where the value is a list."""
    trained: list[int] | None
    """0 or 1 for every text: whether its tokens are trained on. None where all are, without a mask."""


@dataclass(frozen=True, kw_only=True)
class DocumentKeys:
    """Which keys of a line hold what; the names are the flags' of `tools/preprocess_data.py`."""

    json_keys: tuple[str, ...] = ("text",)
    """Keys of texts, a corpus each. With `prompt_key` and `response_key` not used."""
    loss_mask_key: str | None = None
    """The key of a list of 0 and 1, one for every text of the list under the only JSON key."""
    prompt_key: str | None = None
    """The key of a text that is read and not trained on."""
    response_key: str | None = None
    """The key of the text that follows it and is trained on."""

    def __post_init__(self) -> None:
        if not self.json_keys or len(set(self.json_keys)) != len(self.json_keys):
            raise ConfigError(
                "json_keys", self.json_keys, "must be at least one key, none of them twice", "name each key once"
            )
        if (self.prompt_key is None) != (self.response_key is None):
            raise ConfigError(
                "prompt_key, response_key", (self.prompt_key, self.response_key), "go together", "give both or neither"
            )
        if self.loss_mask_key is not None and (self.prompt_key is not None or len(self.json_keys) != 1):
            raise ConfigError(
                "loss_mask_key",
                self.loss_mask_key,
                "goes with exactly one of --json-keys, and not with --prompt-key",
                "choose one way to say which tokens are trained on",
            )

    @property
    def corpora(self) -> tuple[str, ...]:
        """What the corpora are named after, in the order of `texts`."""
        return ("sft",) if self.prompt_key is not None else self.json_keys

    @property
    def is_masked(self) -> bool:
        """Whether some tokens are not trained on, so that every document is one sequence with a loss mask."""
        return self.prompt_key is not None or self.loss_mask_key is not None

    @property
    def columns(self) -> tuple[str, ...]:
        """Every key that is read."""
        if self.prompt_key is not None and self.response_key is not None:
            return self.prompt_key, self.response_key
        return self.json_keys if self.loss_mask_key is None else (*self.json_keys, self.loss_mask_key)

    def texts(self, document: Mapping[str, Any]) -> list[Texts]:
        """The texts of every corpus.

        Raises:
            InvalidLineError: a key is missing, or does not hold what it should.
        """
        if self.prompt_key is not None and self.response_key is not None:
            return [Texts([_text(document, self.prompt_key), _text(document, self.response_key)], [0, 1])]
        texts = [_texts(document, key) for key in self.json_keys]
        if self.loss_mask_key is None:
            return [Texts(of_key, None) for of_key in texts]
        return [Texts(texts[0], _mask(document, self.loss_mask_key, len(texts[0])))]


def parse_line(line: bytes) -> dict[str, Any]:
    """The JSON object of a line.

    Raises:
        InvalidLineError: it is none.
    """
    try:
        document = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise InvalidLineError(f"not UTF-8 ({error.reason} at byte {error.start})") from error
    except (ValueError, RecursionError) as error:
        raise InvalidLineError(f"not JSON ({error})") from error
    if not isinstance(document, dict):
        raise InvalidLineError(f"not a JSON object but a {type(document).__name__}")
    return document


def _value(document: Mapping[str, Any], key: str) -> Any:
    if key not in document:
        raise InvalidLineError(f"no key {key!r} (it has {', '.join(map(repr, document)) or 'none'})")
    return document[key]


def _texts(document: Mapping[str, Any], key: str) -> list[str]:
    value = _value(document, key)
    texts = value if isinstance(value, list) else [value]
    for text in texts:
        if not isinstance(text, str):
            raise InvalidLineError(f"the value of {key!r} is not a text but a {type(text).__name__}")
        if not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise InvalidLineError(f"the value of {key!r} holds half of a surrogate pair") from error
    return texts


def _text(document: Mapping[str, Any], key: str) -> str:
    texts = _texts(document, key)
    if len(texts) != 1 or isinstance(document[key], list):
        raise InvalidLineError(f"the value of {key!r} is not a text but a list")
    return texts[0]


def _mask(document: Mapping[str, Any], key: str, num_texts: int) -> list[int]:
    value = _value(document, key)
    mask = value if isinstance(value, list) else [value]
    if len(mask) != num_texts or any(entry not in (0, 1) for entry in mask):
        raise InvalidLineError(f"the value of {key!r} is not {num_texts} times 0 or 1, once for every text")
    return [int(entry) for entry in mask]
