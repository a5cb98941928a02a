"""Builds tokenizers by Megatron's type names, and compares their vocabularies."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from pathlib import Path

from typing_extensions import override

from megatron_slm.data.tokenizers.base import Tokenizer
from megatron_slm.data.tokenizers.hugging_face import Gpt2BpeTokenizer, HuggingFaceTokenizer
from megatron_slm.data.tokenizers.sentencepiece import SentencePieceTokenizer
from megatron_slm.data.tokenizers.tiktoken import NUM_SPECIAL_TOKENS, TikTokenizer
from megatron_slm.errors import ConfigError, VocabularyError
from megatron_slm.hub import local_path

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
    "require_token",
]


class NullTokenizer(Tokenizer):
    """Megatron's NullTokenizer: the text is already ids, separated by spaces (`"17 4 9"`).

    Args:
        vocab_size: ids of the text are in [0, vocab_size); as in Megatron the end-of-document token follows them, so
            that the true size is `vocab_size + 1`.

    Raises:
        ConfigError: the size is missing or not positive.
    """

    def __init__(self, vocab_size: int | None) -> None:
        if vocab_size is None:
            raise ConfigError.missing("--vocab-size", "--tokenizer-type NullTokenizer", "pass the number of ids")
        if vocab_size < 1:
            raise ConfigError("--vocab-size", vocab_size, "be positive", "pass the number of ids")
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
        """Return the ids in the text.

        Raises:
            VocabularyError: a word is not an id of the vocabulary.
        """
        ids = []
        for word in text.split():
            if not (word.isascii() and word.isdigit() and int(word) < self.vocab_size):
                raise VocabularyError(
                    "word for NullTokenizer", word, f"be an id in [0, {self.vocab_size})", "write the text as ids"
                )
            ids.append(int(word))
        return ids

    @override
    def encode_with_ends(self, text: str) -> tuple[list[int], list[int]]:
        ends = [match.end() for match in re.finditer(r"\S+", text)]
        return self.encode(text), [*ends[:-1], len(text)] if ends else []

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
        """Raise: `transformers` has no such tokenizer.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(
            "--tokenizer-type",
            "NullTokenizer",
            f"have a Hugging Face form to write into {folder}",
            "use another tokenizer, or export without one",
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
    """Build the tokenizer of Megatron's `--tokenizer-type` and the flags that belong to it.

    Args:
        tokenizer_type: one of `TOKENIZER_TYPES`; the three SentencePiece names are synonyms.
        tokenizer_model: a folder, a tokenizer.json or a name of the Hugging Face hub; a SentencePiece .model file; a
            folder with GPT-2's vocab.json and merges.txt; tiktoken's ranks. None for NullTokenizer.
        vocab_size: size of NullTokenizer, which has no file; for TikTokenizer, the size to cut its file to.
        vocab_file, merge_file: files of GPT2BPETokenizer, instead of the folder.
        tiktoken_pattern, tiktoken_num_special_tokens, tiktoken_special_tokens: see `TikTokenizer`.

    Raises:
        ConfigError: the type is unknown, or the path is missing.
        VocabularyError: the file cannot be read as a tokenizer.
    """
    if tokenizer_type not in TOKENIZER_TYPES:
        raise ConfigError(
            "--tokenizer-type", tokenizer_type, f"be one of {', '.join(TOKENIZER_TYPES)}", "choose one of them"
        )
    if tokenizer_type == "NullTokenizer":
        return NullTokenizer(vocab_size)
    if tokenizer_type == "GPT2BPETokenizer" and vocab_file is not None and merge_file is not None:
        return Gpt2BpeTokenizer(vocab_file, merge_file)
    if tokenizer_model is None:
        fix = "pass the path of the tokenizer"
        if tokenizer_type == "GPT2BPETokenizer":
            fix += ", or --vocab-file and --merge-file"
        raise ConfigError.missing("--tokenizer-model", f"--tokenizer-type {tokenizer_type}", fix)
    if tokenizer_type == "HuggingFaceTokenizer":
        return HuggingFaceTokenizer(local_path(str(tokenizer_model), field="--tokenizer-model", part="tokenizer"))
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


def require_token(tokenizer: Tokenizer, token: str, flag: str) -> int:
    """Return the id of a token.

    Raises:
        ConfigError: the tokenizer has no such token.
    """
    index = tokenizer.id_of(token)
    if index is None:
        known = [*tokenizer.special_tokens(), *tokenizer.token_table()]
        near = difflib.get_close_matches(token, dict.fromkeys(filter(None, known)), n=3) or known[:3]
        raise ConfigError(flag, token, "be a token of the tokenizer", f"name one, such as {', '.join(map(repr, near))}")
    return index


def check_same_vocabulary(first: Tokenizer, second: Tokenizer, first_name: str, second_name: str) -> None:
    """Check that every id means the same token to both.

    Args:
        first, second: the tokenizers.
        first_name, second_name: their names in messages ("the model", "the reference").

    Raises:
        VocabularyError: the tables differ; the error names the first id whose tokens differ, and both sizes.
    """
    tables = first.token_table(), second.token_table()
    if tables[0] == tables[1]:
        return
    sizes = tuple(map(len, tables))
    differing = (index for index in range(min(sizes)) if tables[0][index] != tables[1][index])
    index = next(differing, min(sizes))
    raise VocabularyError(
        f"token {index} of {first_name} and {second_name}",
        tuple(table[index] if index < len(table) else None for table in tables),
        f"be the same in both vocabularies, of {sizes[0]} and {sizes[1]} tokens",
        "use models that share one tokenizer",
    )
