"""Tokenizers under Megatron's type names: one small interface over Hugging Face, SentencePiece, ids."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from typing_extensions import override

from megatron_slm.data.tokenizers.base import Tokenizer
from megatron_slm.data.tokenizers.hugging_face import Gpt2BpeTokenizer, HuggingFaceTokenizer
from megatron_slm.data.tokenizers.sentencepiece import SentencePieceTokenizer
from megatron_slm.data.tokenizers.tiktoken import NUM_SPECIAL_TOKENS, TikTokenizer
from megatron_slm.errors import ConfigError, VocabularyError

SENTENCEPIECE_TYPES = ("SentencePieceTokenizer", "GPTSentencePieceTokenizer", "Llama2Tokenizer")
TOKENIZER_TYPES = ("HuggingFaceTokenizer", *SENTENCEPIECE_TYPES, "GPT2BPETokenizer", "TikTokenizer", "NullTokenizer")

__all__ = [
    "SENTENCEPIECE_TYPES",
    "TOKENIZER_TYPES",
    "Gpt2BpeTokenizer",
    "HuggingFaceTokenizer",
    "NullTokenizer",
    "SentencePieceTokenizer",
    "TikTokenizer",
    "Tokenizer",
    "build_tokenizer",
    "check_same_vocabulary",
]


class NullTokenizer(Tokenizer):
    """Megatron's stand-in: the text already is ids with spaces between (`"17 4 9"`).

    Args:
        vocab_size: ids of the text are in [0, vocab_size); as in Megatron one more, the end of a document,
            comes after them, so the true size is `vocab_size + 1`.

    Raises:
        ConfigError: the size is not given or not positive.
    """

    def __init__(self, vocab_size: int | None) -> None:
        if vocab_size is None or vocab_size < 1:
            raise ConfigError("vocab_size", vocab_size, "NullTokenizer needs a positive one", "give --vocab-size")
        self._eod_id = vocab_size

    @property
    @override
    def vocab_size(self) -> int:
        return self._eod_id + 1

    @property
    @override
    def bos_id(self) -> int | None:
        return None

    @property
    @override
    def eod_id(self) -> int | None:
        return self._eod_id

    @override
    def encode(self, text: str) -> list[int]:
        """The numbers of the text.

        Raises:
            VocabularyError: something in it is not an id of the vocabulary.
        """
        ids = []
        for word in text.split():
            if not (word.isascii() and word.isdigit() and int(word) < self.vocab_size):
                raise VocabularyError(
                    "text for NullTokenizer",
                    word,
                    f"must be ids within [0, {self.vocab_size})",
                    "give ids as text",
                )
            ids.append(int(word))
        return ids

    @override
    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(str(index) for index in ids)

    @override
    def token_table(self) -> list[str]:
        return [str(index) for index in range(self.vocab_size)]

    @override
    def definition(self) -> bytes:
        return str(self._eod_id).encode()

    @override
    def save_pretrained(self, folder: str | Path) -> None:
        """Refused: there is nothing that `transformers` could load.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(
            "tokenizer_type",
            "NullTokenizer",
            f"cannot be written as a Hugging Face folder ({folder})",
            "leave it out",
        )


def build_tokenizer(
    tokenizer_type: str,
    tokenizer_model: str | Path | None,
    vocab_size: int | None = None,
    *,
    vocab_file: str | Path | None = None,
    merge_file: str | Path | None = None,
    tiktoken_pattern: str = "v2",
    tiktoken_num_special_tokens: int = NUM_SPECIAL_TOKENS,
    tiktoken_special_tokens: Sequence[str] | None = None,
) -> Tokenizer:
    """The tokenizer of Megatron's `--tokenizer-type` and the flags that go with it.

    Args:
        tokenizer_type: one of `TOKENIZER_TYPES`; the three SentencePiece names mean the same.
        tokenizer_model: a local folder or tokenizer.json; a SentencePiece .model file; a folder with GPT-2's vocab.json
            and merges.txt; tiktoken's ranks. None for NullTokenizer.
        vocab_size: for NullTokenizer, which has no file to read it from; for TikTokenizer, where its file is cut.
        vocab_file, merge_file: for GPT2BPETokenizer, instead of the folder.
        tiktoken_pattern, tiktoken_num_special_tokens, tiktoken_special_tokens: see `TikTokenizer`.

    Raises:
        ConfigError: the type is unknown, or the path is missing.
        VocabularyError: the file cannot be read as a tokenizer.
    """
    if tokenizer_type not in TOKENIZER_TYPES:
        raise ConfigError(
            "tokenizer_type",
            tokenizer_type,
            f"must be one of {', '.join(TOKENIZER_TYPES)}",
            "choose one of them",
        )
    if tokenizer_type == "NullTokenizer":
        return NullTokenizer(vocab_size)
    if tokenizer_type == "GPT2BPETokenizer" and vocab_file is not None and merge_file is not None:
        return Gpt2BpeTokenizer(vocab_file, merge_file)
    if tokenizer_model is None:
        other = ", or --vocab-file and --merge-file" if tokenizer_type == "GPT2BPETokenizer" else ""
        raise ConfigError("tokenizer_model", None, f"{tokenizer_type} needs a path", f"give --tokenizer-model{other}")
    if tokenizer_type == "HuggingFaceTokenizer":
        return HuggingFaceTokenizer(tokenizer_model)
    if tokenizer_type == "GPT2BPETokenizer":
        return Gpt2BpeTokenizer(Path(tokenizer_model) / "vocab.json", Path(tokenizer_model) / "merges.txt")
    if tokenizer_type == "TikTokenizer":
        return TikTokenizer(
            tokenizer_model,
            pattern=tiktoken_pattern,
            vocab_size=vocab_size,
            num_special_tokens=tiktoken_num_special_tokens,
            special_tokens=tiktoken_special_tokens,
        )
    return SentencePieceTokenizer(tokenizer_model)


def check_same_vocabulary(first: Tokenizer, second: Tokenizer, first_name: str, second_name: str) -> None:
    """Check that every id means the same token to both.

    Args:
        first, second: the tokenizers.
        first_name, second_name: what they are to the user ("the model", "the reference").

    Raises:
        VocabularyError: naming the first id whose tokens differ, and both sizes.
    """
    tables = first.token_table(), second.token_table()
    if tables[0] == tables[1]:
        return
    shared = min(map(len, tables))
    at = next((index for index in range(shared) if tables[0][index] != tables[1][index]), shared)
    tokens = tuple(repr(table[at]) if at < len(table) else "none" for table in tables)
    raise VocabularyError(
        f"vocabulary of {first_name} and {second_name}",
        f"id {at}",
        f"must be the same token in both: it is {tokens[0]} in {first_name} ({len(tables[0])} tokens) "
        f"and {tokens[1]} in {second_name} ({len(tables[1])} tokens)",
        "use models that share one tokenizer",
    )
