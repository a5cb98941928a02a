"""What the project asks of a tokenizer."""

from __future__ import annotations

import hashlib
import itertools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

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
"""Texts that hold what tokenizers differ in: spaces, digits, code, scripts, controls, runs."""


class Ragged(NamedTuple):
    """Token ids of several texts, end to end."""

    ids: npt.NDArray[np.int32]
    """All of them, int32 [T]."""
    lengths: npt.NDArray[np.int64]
    """Tokens of every text, int64 [texts]."""


class Tokenizer(ABC):
    """Text to token ids and back."""

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """True size of the vocabulary: the largest id plus one, not padded to any multiple."""

    @property
    @abstractmethod
    def bos_id(self) -> int | None:
        """The id that begins a text, if the tokenizer has one."""

    @property
    @abstractmethod
    def eod_id(self) -> int | None:
        """The id that ends a document, if the tokenizer has one."""

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Token ids of a text; nothing is added at its start or end, whatever the tokenizer's own default."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, special tokens included."""

    @abstractmethod
    def token_table(self) -> list[str]:
        """The token of every id, [vocab_size]; an id without a token has the empty string."""

    @abstractmethod
    def definition(self) -> bytes:
        """Everything that its ids depend on: two tokenizers of one definition encode every text alike."""

    @abstractmethod
    def save_pretrained(self, folder: str | Path) -> None:
        """Write a folder that `transformers.AutoTokenizer.from_pretrained` loads."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of several texts, each as `encode` gives them."""
        return [self.encode(text) for text in texts]

    def encode_ragged(self, texts: Sequence[str]) -> Ragged:
        """Token ids of several texts, each as `encode` gives them, as arrays."""
        rows = self.encode_batch(texts)
        lengths = np.fromiter(map(len, rows), np.int64, len(rows))
        return Ragged(np.fromiter(itertools.chain.from_iterable(rows), np.int32, int(lengths.sum())), lengths)

    def fast_definition(self) -> str | None:
        """A `tokenizer.json` that encodes every text alike, for faster libraries; None where there is none."""
        return None

    @property
    def adds_bos_by_default(self) -> bool:
        """Whether `transformers` (and so Megatron's preprocessing) would begin every text with `bos_id` unasked."""
        return False

    def fingerprint(self) -> str:
        """SHA-256 of the token table, hexadecimal: equal for two tokenizers whose ids mean the same."""
        digest = hashlib.sha256()
        for token in self.token_table():
            content = token.encode("utf-8", "surrogatepass")
            digest.update(len(content).to_bytes(4, "little"))
            digest.update(content)
        return digest.hexdigest()
