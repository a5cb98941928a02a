"""The interface of a tokenizer."""

from __future__ import annotations

import hashlib
import itertools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from os.path import commonprefix
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from megatron_slm.errors import VocabularyError

PROBES = (
    "",
    " ",
    "Plain words, twice.  Two spaces; ",
    "   leading and trailing   ",
    "def f(x):\n\treturn x ** 2\n\n\n        # deep\r\n",
    "0 12 345 6789 3.14159 1,000,000 -7e-3",
    "naïve café Ünïcödé — “quoted” … ﬁ ½ ™",
    "Привет, мир! 你好,世界 こんにちは 한국어 عربى",
    "emoji 🙂👩‍👩‍👧 and \u0000 \u00a0 \u200b \u3000 \ufeff controls",
    "aaaaaaaaaaaaaaa ------------------------ ================= .......",
    "<0x41> <unk> \N{LOWER ONE EIGHTH BLOCK} [INST]",
)
"""Texts on which tokenizers tend to differ: spaces, digits, code, scripts, controls, runs."""


def ends_of_spans(spans: Sequence[tuple[int, int]], length: int) -> list[int]:
    """Return the ends of tokens (`Tokenizer.encode_with_ends`) from their first and last characters.

    Args:
        spans: [start, end) of every token, in characters. Tokens of one character's bytes have the same span.
        length: characters of the text.
    """
    ends = [length] * len(spans)
    for i in range(len(spans) - 2, -1, -1):
        start, end = spans[i + 1]
        before = min(spans[i][1], start) if end > start else spans[i][1]
        ends[i] = min(before, ends[i + 1])
    return ends


def characters_before(text: str, ends: npt.ArrayLike) -> list[int]:
    """Return the numbers of a text's whole characters before places in its UTF-8 bytes; all before the last place."""
    begins = np.cumsum([0, *(len(character.encode()) for character in text)])
    found: list[int] = (np.searchsorted(begins, np.asarray(ends), side="right") - 1).tolist()
    return [*found[:-1], len(text)] if found else []


class Ragged(NamedTuple):
    """Token ids of several texts, end to end."""

    ids: npt.NDArray[np.int32]
    """Token ids of all texts, int32 [T]."""
    lengths: npt.NDArray[np.int64]
    """Tokens of every text, int64 [texts]."""


SpecialTokensInText = Literal["parse", "plain", "error"]
"""Treatment of special tokens that a text spells out (`</s>`): as the token, as plain characters, or as an error."""


class Tokenizer(ABC):
    """Converts text to token ids and back."""

    special_tokens_are_plain: bool = False
    """Encode special tokens that a text spells out as plain characters (`NullTokenizer` has none)."""

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """True size of the vocabulary: the largest id plus one, not padded to any multiple."""

    @property
    @abstractmethod
    def bos_id(self) -> int | None:
        """The beginning-of-text id; None if the tokenizer has none."""

    @property
    @abstractmethod
    def eod_id(self) -> int | None:
        """The end-of-document id; None if the tokenizer has none."""

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text, without BOS or EOD whatever the tokenizer's own default."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids, special tokens included."""

    @abstractmethod
    def token_table(self) -> list[str]:
        """Return the token of every id, [vocab_size]; an empty string for an id without a token."""

    @abstractmethod
    def definition(self) -> bytes:
        """Return everything that the ids depend on: tokenizers with equal definitions encode every text alike."""

    @abstractmethod
    def save_pretrained(self, folder: str | Path) -> None:
        """Write a folder that `transformers.AutoTokenizer.from_pretrained` loads."""

    def special_tokens(self) -> dict[str, int]:
        """Return the special tokens that a text can spell out, and their ids; empty by default."""
        return {}

    def id_of(self, token: str) -> int | None:
        """Return the id of a token of the table; None if it is not there."""
        return next((index for index, text in enumerate(self.token_table()) if text == token), None)

    def encode_with_ends(self, text: str) -> tuple[list[int], list[int]]:
        """Return the token ids of a text, and for each the number of the text's characters that end with it.

        Tokens cover the text without gaps: each begins where the one before ends, the first at 0, and the last ends
        at the text's length. A token that ends within a character ends before it.

        Raises:
            VocabularyError: the ids do not decode to the text, so that characters cannot be assigned.
        """
        ids = self.encode(text)
        ends = [len(commonprefix([self.decode(ids[: i + 1]), text])) for i in range(len(ids))]  # noqa: RUF071
        if (ends[-1] if ends else 0) != len(text):
            raise VocabularyError(
                "text",
                text if len(text) < 80 else f"{text[:80]}...",
                "be equal to what its tokens decode to",
                "use a lossless tokenizer",
            )
        return ids, list(itertools.accumulate(ends, max))

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of several texts, each as `encode` returns them."""
        return [self.encode(text) for text in texts]

    def encode_ragged(self, texts: Sequence[str]) -> Ragged:
        """Return the token ids of several texts as arrays, each as `encode` returns them."""
        rows = self.encode_batch(texts)
        lengths = np.fromiter(map(len, rows), np.int64, len(rows))
        return Ragged(np.fromiter(itertools.chain.from_iterable(rows), np.int32, int(lengths.sum())), lengths)

    def fast_definition(self) -> str | None:
        """Return a `tokenizer.json` that encodes every text alike, for faster libraries; None if there is none."""
        return None

    @property
    def fast_definition_parses(self) -> bool:
        """True if `fast_definition` parses special tokens that this tokenizer encodes as plain characters."""
        return False

    @property
    def adds_bos_by_default(self) -> bool:
        """True if `transformers` (and so Megatron's preprocessing) prepends `bos_id` to every text by default."""
        return False

    def fingerprint(self) -> str:
        """Return the SHA-256 of the token table, hexadecimal: equal for tokenizers whose ids mean the same tokens."""
        digest = hashlib.sha256()
        for token in self.token_table():
            content = token.encode("utf-8", "surrogatepass")
            digest.update(len(content).to_bytes(4, "little"))
            digest.update(content)
        return digest.hexdigest()
