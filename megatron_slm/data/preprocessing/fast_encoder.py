"""Encodes with a library faster than the tokenizer, and checks its ids on samples of the text."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from megatron_slm.data.tokenizers.base import PROBES, Ragged, Tokenizer

LIBRARY = "gigatoken"
_CHECKED_CHARACTERS = 8192
_REBUILT_AFTER_CHARACTERS = 1 << 28
"""The library caches every word it has seen: rebuilding it from time to time bounds its memory."""


class FastEncoderError(Exception):
    """Raised if the library cannot replace the tokenizer; the message is the reason. Internal to preprocessing."""


class FastEncoder:
    """Encodes with gigatoken, in the calling thread.

    One text of every batch, or a slice of it if it is long, is also encoded by the tokenizer, and the ids must agree
    (about 1 % of the text for batches of a megabyte). Texts that spell out special tokens are left to the tokenizer
    where these are plain characters to it: the library always parses them.

    Args:
        tokenizer: the tokenizer to agree with.

    Raises:
        FastEncoderError: gigatoken is not installed, does not support this kind of tokenizer, or returns other ids for
            a special token or one of `PROBES`.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        definition = tokenizer.fast_definition()
        if definition is None:
            raise FastEncoderError(f"this tokenizer has no form that {LIBRARY} supports")
        self._tokenizer = tokenizer
        self._definition = definition
        longest_first = sorted(tokenizer.special_tokens(), key=len, reverse=True)
        self._left_to_tokenizer: re.Pattern[str] | None = None
        if tokenizer.fast_definition_parses and longest_first:
            self._left_to_tokenizer = re.compile("|".join(map(re.escape, longest_first)))
        self._build()
        table = tokenizer.token_table()
        special = [table[index] for index in (tokenizer.bos_id, tokenizer.eod_id) if index is not None]
        special += [str(entry["content"]) for entry in json.loads(definition).get("added_tokens", [])]
        for token in dict.fromkeys(special):
            self._compare(f"a {token} b{token}{token}")
        for text in PROBES:
            self._compare(text)
        self._num_batches = 0

    def __reduce__(self) -> tuple[type[FastEncoder], tuple[Tokenizer]]:
        return type(self), (self._tokenizer,)

    def encode_ragged(self, texts: Sequence[str]) -> Ragged:
        """Return the token ids of several texts.

        Raises:
            FastEncoderError: the tokenizer returns other ids for the checked text.
        """
        encoded = self._encode_mixed(texts)
        if texts:
            self._check(texts, encoded)
        self._num_characters += sum(map(len, texts))
        if self._num_characters > _REBUILT_AFTER_CHARACTERS:
            self._build()
        return encoded

    def _build(self) -> None:
        try:
            import gigatoken
        except ImportError as error:
            raise FastEncoderError(f"{LIBRARY} is not installed (pip install 'megatron_slm[preprocess]')") from error
        try:
            self._library: Any = gigatoken.Tokenizer.from_json(self._definition)
        except Exception as error:  # the library raises bare exceptions for what it does not support
            raise FastEncoderError(
                f"{LIBRARY} does not support this tokenizer: {str(error).splitlines()[0]}"
            ) from error
        self._num_characters = 0

    def _encode_mixed(self, texts: Sequence[str]) -> Ragged:
        """Encode with the library, and with the tokenizer the texts whose special tokens the library would parse."""
        spells = self._left_to_tokenizer
        slow = [] if spells is None else [at for at, text in enumerate(texts) if spells.search(text)]
        if not slow:
            return self._encode(texts)
        left = set(slow)
        fast = [at for at in range(len(texts)) if at not in left]
        ids_of: dict[int, Any] = {}
        for places, encode in ((fast, self._encode), (slow, self._tokenizer.encode_ragged)):
            ids, lengths = encode([texts[at] for at in places])
            ids_of |= zip(places, np.split(ids, np.cumsum(lengths)[:-1]) if places else [], strict=True)
        in_order = [ids_of[at] for at in range(len(texts))]
        return Ragged(np.concatenate(in_order), np.array([len(ids) for ids in in_order], np.int64))

    def _encode(self, texts: Sequence[str]) -> Ragged:
        if not texts:
            return Ragged(np.empty(0, np.int32), np.empty(0, np.int64))
        try:
            layout = self._library.encode_batch(list(texts), parallel=False).layout
        except Exception as error:
            raise FastEncoderError(f"{LIBRARY} failed: {error}") from error
        offsets = np.asarray(layout.offsets.data)
        ids = np.asarray(layout.content.data)[offsets[0] : offsets[-1]]
        return Ragged(ids.astype(np.int32), np.diff(offsets).astype(np.int64))

    def _check(self, texts: Sequence[str], encoded: Ragged) -> None:
        self._num_batches += 1
        at = self._num_batches * 7919 % len(texts)
        text = texts[at]
        if len(text) > _CHECKED_CHARACTERS:
            start = self._num_batches * 104_729 % (len(text) - _CHECKED_CHARACTERS)
            self._compare(text[start : start + _CHECKED_CHARACTERS])
            return
        stop = int(encoded.lengths[: at + 1].sum())
        self._compare(text, encoded.ids[stop - int(encoded.lengths[at]) : stop].tolist())

    def _compare(self, text: str, found: list[int] | None = None) -> None:
        if found is None:
            found = self._encode_mixed([text]).ids.tolist()
        expected = self._tokenizer.encode_ragged([text]).ids.tolist()
        if found != expected:
            same = next((i for i, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b), len(found))
            raise FastEncoderError(
                f"{LIBRARY} returns other ids from token {same} of {text[:60]!r}: {found[same : same + 4]} instead of "
                f"{expected[same : same + 4]}"
            )
