"""tiktoken's tokenizers: Megatron's JSON files (special tokens first) and OpenAI's `.tiktoken` files (ranks first)."""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from typing_extensions import override

from megatron_slm.data.tokenizers.base import PROBES, Ragged, Tokenizer, characters_before
from megatron_slm.errors import ConfigError, VocabularyError

NUM_SPECIAL_TOKENS = 1000
MEGATRON_VOCAB_SIZE = 2**17
MEGATRON_SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "<mask>", "<pad>", "<cls>", "<sep>")
END_TOKENS = ("</s>", "<|endoftext|>", "<|end_of_text|>")
BEGIN_TOKENS = ("<s>", "<|begin_of_text|>")

_WORD = r"[^\r\n\p{L}\p{N}]?"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_SUFFIX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s+(?!\S)|\s+"
PATTERNS = {
    "v1": r"[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|" + _SPACES,
    "v2": rf"{_WORD}{_UPPER}*{_LOWER}+|{_WORD}{_UPPER}+{_LOWER}*|\p{{N}}"
    rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|\s*[\r\n]+|{_SPACES}",
    "gpt2": rf"'(?:[sdmt]|ll|ve|re)| ?\p{{L}}+| ?\p{{N}}+| ?[^\s\p{{L}}\p{{N}}]+|{_SPACES}",
    "cl100k": rf"{_SUFFIX}|{_WORD}\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|{_SPACES}",
    "o200k": rf"{_WORD}{_UPPER}*{_LOWER}+{_SUFFIX}?|{_WORD}{_UPPER}+{_LOWER}*{_SUFFIX}?|\p{{N}}{{1,3}}"
    rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|\s*[\r\n]+|{_SPACES}",
}
"""Regular expressions that split a text before bytes are merged; v1 and v2 are Megatron's, cl100k also Llama 3's."""


class TikTokenizer(Tokenizer):
    """A byte-level BPE of tiktoken.

    A special token spelled out in a text becomes that token, as in Megatron, unless `special_tokens_are_plain`.

    Args:
        path: `.json` in Megatron's format (a list of {"rank", "token_bytes", "token_str"}; special tokens have the ids
            below the ranks), or `.tiktoken` (a token in base64 and its rank per line; special tokens follow the ranks).
        pattern: a name in `PATTERNS`, or the regular expression itself.
        vocab_size: special tokens and ranks together; longer `.json` files are cut to it (None: 131072).
        num_special_tokens: number of special tokens of a `.json` vocabulary.
        special_tokens: their texts, in the order of their ids, `TEXT=ID` for an explicit id; None: Megatron's seven for
            `.json`, `<|endoftext|>` for `.tiktoken`.

    Raises:
        ConfigError: a file is missing, or the flags contradict each other.
        VocabularyError: the file is not such a vocabulary.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        pattern: str = "v2",
        vocab_size: int | None = None,
        num_special_tokens: int = NUM_SPECIAL_TOKENS,
        special_tokens: Sequence[str] | None = None,
    ) -> None:
        self._path = Path(path)
        if not self._path.is_file():
            raise ConfigError("--tokenizer-model", str(path), "be a .json or .tiktoken file", "pass its path")
        self._pattern = PATTERNS.get(pattern, pattern)
        if self._path.suffix == ".json":
            size = MEGATRON_VOCAB_SIZE if vocab_size is None else vocab_size
            names = MEGATRON_SPECIAL_TOKENS if special_tokens is None else special_tokens
            self._special = _megatron_special_tokens(names, num_special_tokens, size)
            self._ranks = _read_json(self._path, size - num_special_tokens, num_special_tokens)
        else:
            self._ranks = _read_tiktoken(self._path)
            names = END_TOKENS[1:2] if special_tokens is None else special_tokens
            self._special = _numbered(names, len(self._ranks))
        taken = set(self._ranks.values()) & set(self._special.values())
        if taken:
            raise ConfigError(
                "--tiktoken-special-tokens", min(taken), "not be the id of another token", "choose other ids"
            )

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return _restore, (self._path, self._pattern, self._ranks, self._special, self.special_tokens_are_plain)

    @cached_property
    def _encoding(self) -> Any:
        import tiktoken

        try:
            return tiktoken.Encoding(
                str(self._path), pat_str=self._pattern, mergeable_ranks=self._ranks, special_tokens=self._special
            )
        except ValueError as error:
            raise ConfigError(
                "--tiktoken-pattern",
                self._pattern,
                f"be one of {', '.join(PATTERNS)}, or a regular expression ({error})",
                "correct the expression",
            ) from error

    @property
    @override
    def vocab_size(self) -> int:
        return max(max(self._ranks.values()), max(self._special.values(), default=0)) + 1

    @property
    @override
    def bos_id(self) -> int | None:
        return next((self._special[token] for token in BEGIN_TOKENS if token in self._special), None)

    @property
    @override
    def eod_id(self) -> int | None:
        return next((self._special[token] for token in END_TOKENS if token in self._special), None)

    @override
    def encode(self, text: str) -> list[int]:
        return list(self._encoding.encode(text, **self._parsing))

    @override
    def encode_with_ends(self, text: str) -> tuple[list[int], list[int]]:
        ids = self.encode(text)
        sizes = [len(self._encoding.decode_single_token_bytes(index)) for index in ids]
        return ids, characters_before(text, np.cumsum(sizes))

    @override
    def encode_ragged(self, texts: Sequence[str]) -> Ragged:
        parsing = self._parsing
        rows = [self._encoding.encode_to_numpy(text, **parsing) for text in texts]
        ids = np.concatenate(rows) if rows else np.empty(0, np.int32)
        return Ragged(ids.astype(np.int32), np.fromiter(map(len, rows), np.int64, len(rows)))

    @property
    def _parsing(self) -> dict[str, Any]:
        """tiktoken's arguments: which special tokens become tokens, and which raise."""
        return {"allowed_special": set() if self.special_tokens_are_plain else "all", "disallowed_special": ()}

    @override
    def special_tokens(self) -> dict[str, int]:
        return dict(self._special)

    @override
    def decode(self, ids: Sequence[int]) -> str:
        return str(self._encoding.decode(list(ids)))

    @override
    def token_table(self) -> list[str]:
        """Return the tokens with bytes spelled as in GPT-2, so that the Hugging Face form has the same table."""
        table = [""] * self.vocab_size
        for token, index in self._ranks.items():
            table[index] = _spelled(token)
        for text, index in self._special.items():
            table[index] = text
        return table

    @override
    def definition(self) -> bytes:
        content = repr((self._pattern, sorted(self._special.items()), sorted(self._ranks.items())))
        return hashlib.sha256(content.encode()).digest()

    @override
    def fast_definition(self) -> str | None:
        return str(self._backend().to_str())

    @property
    @override
    def fast_definition_parses(self) -> bool:
        return self.special_tokens_are_plain  # no tokenizer.json has plain special tokens

    @override
    def save_pretrained(self, folder: str | Path) -> None:
        """Write the Hugging Face tokenizer with the same ids.

        Raises:
            VocabularyError: the Hugging Face form has other ids, as checked on `PROBES`.
        """
        from transformers import PreTrainedTokenizerFast

        fast_class: Any = PreTrainedTokenizerFast
        backend = self._backend()
        for text in PROBES:
            found, expected = backend.encode(text, add_special_tokens=False).ids, self.encode(text)
            if found != expected:
                raise VocabularyError(
                    "tiktoken vocabulary",
                    str(self._path),
                    f"have an exact Hugging Face form; {text!r} would become {found} instead of {expected}",
                    "use a Hugging Face tokenizer",
                )
        table, ends = self.token_table(), {"bos_token": self.bos_id, "eos_token": self.eod_id}
        names = {name: table[index] for name, index in ends.items() if index is not None}
        fast_class(tokenizer_object=backend, clean_up_tokenization_spaces=False, **names).save_pretrained(str(folder))

    def _backend(self) -> Any:
        """Return the `tokenizers` form: every split of a token into two tokens is a merge, in order of rank."""
        from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
        from tokenizers import Tokenizer as Backend

        merges = []
        for token in sorted(self._ranks, key=self._ranks.__getitem__):
            halves = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
            halves = [pair for pair in halves if pair[0] in self._ranks and pair[1] in self._ranks]
            halves.sort(key=lambda pair: (self._ranks[pair[0]], self._ranks[pair[1]]))
            merges += [(_spelled(left), _spelled(right)) for left, right in halves]
        vocabulary = {_spelled(token): index for token, index in self._ranks.items()} | self._special
        backend = Backend(models.BPE(vocabulary, merges, fuse_unk=False, ignore_merges=True))
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(self._pattern), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        backend.decoder = decoders.ByteLevel()
        backend.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in self._special])
        return backend


def _restore(
    path: Path, pattern: str, ranks: dict[bytes, int], special: dict[str, int], are_plain: bool
) -> TikTokenizer:
    tokenizer = TikTokenizer.__new__(TikTokenizer)
    tokenizer.special_tokens_are_plain = are_plain
    tokenizer.__dict__.update(_path=path, _pattern=pattern, _ranks=ranks, _special=special)
    return tokenizer


def _byte_letters() -> list[str]:
    """Return GPT-2's letter for every byte: the byte itself if printable, else the next letter from 256 on."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


_LETTERS = _byte_letters()


def _spelled(token: bytes) -> str:
    return "".join(_LETTERS[byte] for byte in token)


def _megatron_special_tokens(names: Sequence[str], count: int, vocab_size: int) -> dict[str, int]:
    special = _numbered([*names, *(f"<SPECIAL_{index}>" for index in range(len(names), count))], 0)
    if not len(names) <= count < vocab_size or len(special) != count or max(special.values(), default=0) >= count:
        raise ConfigError(
            "--tiktoken-num-special-tokens",
            count,
            f"cover the {len(names)} special tokens, each once, and be below the vocabulary's {vocab_size}",
            "check --tiktoken-special-tokens and --vocab-size",
        )
    return special


def _numbered(names: Sequence[str], first: int) -> dict[str, int]:
    """Return the ids of special tokens: explicit in `TEXT=ID`, else the position counted from `first`."""
    special = {}
    for index, name in enumerate(names, start=first):
        text, equals_sign, number = name.rpartition("=")
        if equals_sign and number.isascii() and number.isdigit():
            special[text] = int(number)
        else:
            special[name] = index
    return special


def _read_json(path: Path, count: int, first_id: int) -> dict[bytes, int]:
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))[:count]
        ranks = {base64.b64decode(entry["token_bytes"], validate=True): entry["rank"] for entry in entries}
    except (ValueError, KeyError, TypeError) as error:
        raise _not_a_vocabulary(path, error) from error
    if sorted(ranks.values()) != list(range(len(entries))) or not ranks:
        raise _not_a_vocabulary(path, "ranks must be 0, 1, 2, ..., each with a different token")
    return {token: rank + first_id for token, rank in ranks.items()}


def _read_tiktoken(path: Path) -> dict[bytes, int]:
    try:
        lines = [line.split() for line in path.read_bytes().splitlines() if line.strip()]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
    except (ValueError, binascii.Error) as error:
        raise _not_a_vocabulary(path, error) from error
    if len(set(ranks.values())) != len(lines) or not ranks:
        raise _not_a_vocabulary(path, "every token must have a different rank")
    return ranks


def _not_a_vocabulary(path: Path, why: object) -> VocabularyError:
    return VocabularyError(
        "--tokenizer-model",
        str(path),
        f"be a tiktoken vocabulary: a JSON list with rank and token_bytes, or lines of base64 and rank ({why})",
        "check the file",
    )
