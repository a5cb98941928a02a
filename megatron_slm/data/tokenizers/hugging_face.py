"""Hugging Face tokenizers: folders, tokenizer.json files, and GPT-2's pair of vocabulary and merges."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from typing_extensions import override

from megatron_slm.data.tokenizers.base import Ragged, Tokenizer, ends_of_spans
from megatron_slm.errors import ConfigError, VocabularyError

GPT2_END = "<|endoftext|>"


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer of `transformers`, from a local folder or a `tokenizer.json` file.

    As in Hugging Face, a special token spelled out in the text (`</s>`) becomes that token, unless
    `special_tokens_are_plain`. A bare `tokenizer.json`
    does not name an end-of-document token: its `eod_id` is None unless `tokenizer_config.json` lies beside it. It is
    pickled as its `tokenizers` definition, so that other processes encode without loading `transformers`.

    Args:
        path: the folder or the file.

    Raises:
        ConfigError: `path` is neither.
        VocabularyError: the tokenizer cannot be loaded.
    """

    def __init__(self, path: str | Path) -> None:
        self._path = str(path)
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        if backend is not None:
            # Truncation and padding in a tokenizer.json are meant for batches, not for a corpus.
            backend.no_truncation()
            backend.no_padding()
        self._backend = backend
        self._bos_id: int | None = self._tokenizer.bos_token_id
        self._eod_id: int | None = self._tokenizer.eos_token_id

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        if self._backend is None:
            return type(self), (self._path,)
        return _restore, (type(self), {**self._plain_state(), "_backend": None}, self._backend.to_str())

    def _plain_state(self) -> dict[str, Any]:
        return {
            "_path": self._path,
            "_bos_id": self._bos_id,
            "_eod_id": self._eod_id,
            "special_tokens_are_plain": self.special_tokens_are_plain,
        }

    @cached_property
    def _tokenizer(self) -> Any:
        return _load_transformers_tokenizer(Path(self._path))

    @cached_property
    def _tokens_by_id(self) -> dict[int, str]:
        vocabulary = self._tokenizer.get_vocab() if self._backend is None else self._backend.get_vocab()
        return {index: token for token, index in vocabulary.items()}

    @property
    @override
    def vocab_size(self) -> int:
        return max(self._tokens_by_id) + 1

    @property
    @override
    def bos_id(self) -> int | None:
        return self._bos_id

    @property
    @override
    def eod_id(self) -> int | None:
        return self._eod_id

    @property
    @override
    def adds_bos_by_default(self) -> bool:
        return self._bos_id is not None and self._tokenizer("a").input_ids[:1] == [self._bos_id]

    @override
    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0]

    @override
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        if self._backend is None:
            plain = self.special_tokens_are_plain
            ids = self._tokenizer(list(texts), add_special_tokens=False, split_special_tokens=plain, verbose=False)[
                "input_ids"
            ]
            return [list(row) for row in ids]
        self._set_special_tokens(self._backend)
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def _set_special_tokens(self, backend: Any) -> None:
        """Tell the backend how to treat special tokens in a text; it raises if it is told while a thread encodes."""
        if backend.encode_special_tokens != self.special_tokens_are_plain:
            backend.encode_special_tokens = self.special_tokens_are_plain

    @override
    def encode_ragged(self, texts: Sequence[str]) -> Ragged:
        if self._backend is None:
            return super().encode_ragged(texts)
        self._set_special_tokens(self._backend)
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        lengths = np.fromiter(map(len, encodings), np.int64, len(encodings))
        ids = itertools.chain.from_iterable(encoding.ids for encoding in encodings)
        return Ragged(np.fromiter(ids, np.int32, int(lengths.sum())), lengths)

    @override
    def encode_with_ends(self, text: str) -> tuple[list[int], list[int]]:
        if self._backend is None:
            return super().encode_with_ends(text)
        self._set_special_tokens(self._backend)
        encoding = self._backend.encode(text, add_special_tokens=False)
        return encoding.ids, ends_of_spans(encoding.offsets, len(text))

    @override
    def decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    @override
    def token_table(self) -> list[str]:
        return [self._tokens_by_id.get(index, "") for index in range(self.vocab_size)]

    @override
    def definition(self) -> bytes:
        if self._backend is not None:
            return str(self._backend.to_str()).encode()
        files = [
            path for path in sorted(Path(self._path).glob("*")) if path.is_file() and path.suffix != ".safetensors"
        ]
        return repr([(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]).encode()

    @override
    def special_tokens(self) -> dict[str, int]:
        if self._backend is None:
            return dict(zip(self._tokenizer.all_special_tokens, self._tokenizer.all_special_ids, strict=True))
        added = self._backend.get_added_tokens_decoder()
        return {token.content: index for index, token in added.items() if token.special}

    @override
    def fast_definition(self) -> str | None:
        return None if self._backend is None else str(self._backend.to_str())

    @property
    @override
    def fast_definition_parses(self) -> bool:
        return self.special_tokens_are_plain  # no tokenizer.json has plain special tokens

    @override
    def save_pretrained(self, folder: str | Path) -> None:
        self._tokenizer.save_pretrained(str(folder))


class Gpt2BpeTokenizer(HuggingFaceTokenizer):
    """Megatron's GPT2BPETokenizer: byte-level BPE from GPT-2's `vocab.json` and `merges.txt`.

    `<|endoftext|>` ends a document; spelled out in a text it becomes that token, as in Hugging Face, unless
    `special_tokens_are_plain`.

    Args:
        vocab_file: JSON object from token to id.
        merge_file: one merge per line, the most frequent first.

    Raises:
        ConfigError: a file is missing.
        VocabularyError: the files cannot be read, or have no `<|endoftext|>`.
    """

    def __init__(self, vocab_file: str | Path, merge_file: str | Path) -> None:
        for flag, path in (("--vocab-file", vocab_file), ("--merge-file", merge_file)):
            if not Path(path).is_file():
                raise ConfigError(flag, str(path), "be a file", "pass GPT-2's vocab.json and merges.txt")
        self._merge_file = str(merge_file)
        super().__init__(vocab_file)

    @override
    def _plain_state(self) -> dict[str, Any]:
        return {**super()._plain_state(), "_merge_file": self._merge_file}

    @cached_property
    @override
    def _tokenizer(self) -> Any:
        from tokenizers import AddedToken, decoders, models, pre_tokenizers
        from tokenizers import Tokenizer as Backend
        from transformers import PreTrainedTokenizerFast

        fast_class: Any = PreTrainedTokenizerFast
        try:
            backend = Backend(models.BPE.from_file(self._path, self._merge_file))
        except Exception as error:  # the library raises bare Exception
            raise VocabularyError(
                "--vocab-file, --merge-file",
                (self._path, self._merge_file),
                f"be GPT-2's vocab.json and merges.txt ({error})",
                "check the files",
            ) from error
        if backend.token_to_id(GPT2_END) is None:
            raise VocabularyError("--vocab-file", self._path, f"have the token {GPT2_END}", "check the file")
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        backend.add_special_tokens([AddedToken(GPT2_END, normalized=False, special=True)])
        return fast_class(
            tokenizer_object=backend,
            bos_token=GPT2_END,
            eos_token=GPT2_END,
            unk_token=GPT2_END,
            clean_up_tokenization_spaces=False,
        )


def _restore(kind: type[HuggingFaceTokenizer], state: dict[str, Any], definition: str) -> HuggingFaceTokenizer:
    from tokenizers import Tokenizer as Backend

    tokenizer = kind.__new__(kind)
    tokenizer.__dict__.update(state, _backend=Backend.from_str(definition))
    return tokenizer


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
            "--tokenizer-model",
            str(path),
            f"load as a Hugging Face tokenizer ({type(error).__name__}: {error})",
            "check the files, or copy them again",
        ) from error
    raise ConfigError(
        "--tokenizer-model",
        str(path),
        "be a folder with tokenizer.json or tokenizer_config.json, a tokenizer.json file, or a name of the hub",
        "check the path",
    )
