"""What the project asks of a tokenizer."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path


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
    def save_pretrained(self, folder: str | Path) -> None:
        """Write a folder that `transformers.AutoTokenizer.from_pretrained` loads."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of several texts, each as `encode` gives them."""
        return [self.encode(text) for text in texts]

    def fingerprint(self) -> str:
        """SHA-256 of the token table, hexadecimal: equal for two tokenizers whose ids mean the same."""
        digest = hashlib.sha256()
        for token in self.token_table():
            content = token.encode("utf-8", "surrogatepass")
            digest.update(len(content).to_bytes(4, "little"))
            digest.update(content)
        return digest.hexdigest()
