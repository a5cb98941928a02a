"""Tokenizers under Megatron's type names: one small interface over Hugging Face, SentencePiece, ids."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from typing_extensions import override

from megatron_slm.data.sentencepiece_tokenizer import SentencePieceTokenizer
from megatron_slm.data.tokenizer import Tokenizer
from megatron_slm.errors import ConfigError, VocabularyError

SENTENCEPIECE_TYPES = ("SentencePieceTokenizer", "GPTSentencePieceTokenizer", "Llama2Tokenizer")
TOKENIZER_TYPES = ("HuggingFaceTokenizer", *SENTENCEPIECE_TYPES, "NullTokenizer")

__all__ = [
    "SENTENCEPIECE_TYPES",
    "TOKENIZER_TYPES",
    "HuggingFaceTokenizer",
    "NullTokenizer",
    "SentencePieceTokenizer",
    "Tokenizer",
    "build_tokenizer",
    "check_same_vocabulary",
]


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer of `transformers`, from a local folder or a `tokenizer.json` file.

    As with Hugging Face, a special token that is spelled out in the text (`</s>`) becomes that token.
    A bare `tokenizer.json` does not say which token ends a document: its `eod_id` is None, unless the
    `tokenizer_config.json` lies beside it.

    Args:
        path: the folder or the file.

    Raises:
        ConfigError: it is neither.
        VocabularyError: it cannot be loaded.
    """

    def __init__(self, path: str | Path) -> None:
        self._tokenizer = _load_transformers_tokenizer(Path(path))
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        if backend is not None:
            # What a tokenizer.json says about cutting and padding is meant for batches, not for a corpus.
            backend.no_truncation()
            backend.no_padding()
        self._backend = backend

    @cached_property
    def _tokens_by_id(self) -> dict[int, str]:
        return {index: token for token, index in self._tokenizer.get_vocab().items()}

    @property
    @override
    def vocab_size(self) -> int:
        return max(self._tokens_by_id) + 1

    @property
    @override
    def bos_id(self) -> int | None:
        bos_id: int | None = self._tokenizer.bos_token_id
        return bos_id

    @property
    @override
    def eod_id(self) -> int | None:
        eod_id: int | None = self._tokenizer.eos_token_id
        return eod_id

    @override
    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0]

    @override
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        if self._backend is None:
            ids = self._tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
            return [list(row) for row in ids]
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    @override
    def decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    @override
    def token_table(self) -> list[str]:
        return [self._tokens_by_id.get(index, "") for index in range(self.vocab_size)]

    @override
    def save_pretrained(self, folder: str | Path) -> None:
        self._tokenizer.save_pretrained(str(folder))


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
    tokenizer_type: str, tokenizer_model: str | Path | None, vocab_size: int | None = None
) -> Tokenizer:
    """The tokenizer of Megatron's `--tokenizer-type`, `--tokenizer-model` and `--vocab-size`.

    Args:
        tokenizer_type: one of `TOKENIZER_TYPES`; the three SentencePiece names mean the same.
        tokenizer_model: a local folder or tokenizer.json, or a SentencePiece .model file; None for
            NullTokenizer.
        vocab_size: for NullTokenizer only, which has no file to read it from.

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
    if tokenizer_model is None:
        raise ConfigError("tokenizer_model", None, f"{tokenizer_type} needs a path", "give --tokenizer-model")
    if tokenizer_type == "HuggingFaceTokenizer":
        return HuggingFaceTokenizer(tokenizer_model)
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


def _load_transformers_tokenizer(path: Path) -> Any:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    fast_class: Any = PreTrainedTokenizerFast
    folder = path.parent if path.name == "tokenizer.json" else path
    has_config = (folder / "tokenizer_config.json").is_file()
    try:
        if path.is_file():
            if path.name == "tokenizer.json" and has_config:
                return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
            return fast_class(tokenizer_file=str(path))
        if path.is_dir() and (has_config or (path / "tokenizer.json").is_file()):
            return AutoTokenizer.from_pretrained(str(path), local_files_only=True)
    except Exception as error:  # the libraries below raise anything, bare Exception included
        raise VocabularyError(
            "tokenizer_model",
            str(path),
            f"must load as a Hugging Face tokenizer ({type(error).__name__}: {error})",
            "check the files, or copy them again",
        ) from error
    raise ConfigError(
        "tokenizer_model",
        str(path),
        "must be a local folder with tokenizer.json or tokenizer_config.json, or a tokenizer.json file",
        "download the tokenizer first, then give the folder",
    )
