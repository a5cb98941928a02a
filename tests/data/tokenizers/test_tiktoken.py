"""tiktoken vocabularies: Megatron's ids for its JSON files, tiktoken's for .tiktoken files, and their Hugging Face form."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import tiktoken
from megatron.core.tokenizers.text.libraries.tiktoken_tokenizer import TikTokenTokenizer
from transformers import AutoTokenizer

from megatron_slm.data.tokenizers.base import PROBES
from megatron_slm.data.tokenizers.tiktoken import PATTERNS, TikTokenizer
from megatron_slm.errors import ConfigError, VocabularyError
from tests.data.byte_level import byte_ranks, megatron_json_file, tiktoken_file
from tests.data.texts import TEXTS

ALL = [*TEXTS, *PROBES, "a </s> b <SPECIAL_17><pad>", "2024-11-05 It's  THE'LL\n\n x"]


@pytest.mark.parametrize("pattern", ["v1", "v2"])
def test_json_files_have_megatrons_ids(tmp_path: Path, pattern: str) -> None:
    path, size = megatron_json_file(tmp_path), len(byte_ranks()) + 50
    ours = TikTokenizer(path, pattern=pattern, num_special_tokens=50)
    theirs = TikTokenTokenizer(str(path), num_special_tokens=50, pattern=pattern, vocab_size=size)
    assert (ours.vocab_size, ours.bos_id, ours.eod_id) == (size, theirs.bos_id, theirs.eos_id)
    for text in ALL:
        assert ours.encode(text) == theirs.text_to_ids(text)
    ragged = ours.encode_ragged(ALL)
    assert ragged.ids.tolist() == [token for text in ALL for token in ours.encode(text)]
    assert ragged.lengths.tolist() == [len(ours.encode(text)) for text in ALL]
    assert ours.encode("</s>") == [2]


@pytest.mark.parametrize("pattern", ["v1", "v2", "gpt2", "cl100k", "o200k", r"\s*\S+|\s+"])
def test_tiktoken_files_and_their_hugging_face_form(tmp_path: Path, pattern: str) -> None:
    path, ranks = tiktoken_file(tmp_path), {token: rank for rank, token in enumerate(byte_ranks())}
    ours = TikTokenizer(path, pattern=pattern)
    special = {"<|endoftext|>": len(ranks)}
    theirs = tiktoken.Encoding(
        "x", pat_str=PATTERNS.get(pattern, pattern), mergeable_ranks=ranks, special_tokens=special
    )
    assert (ours.vocab_size, ours.eod_id) == (len(ranks) + 1, len(ranks))
    ours.save_pretrained(tmp_path / "hf")
    loaded = AutoTokenizer.from_pretrained(str(tmp_path / "hf"))
    restored = pickle.loads(pickle.dumps(ours))
    for text in ALL:
        ids = theirs.encode(text, allowed_special="all")
        assert ours.encode(text) == restored.encode(text) == ids
        assert loaded(text, add_special_tokens=False).input_ids == ids
        assert ours.decode(ids) == text
    table = ours.token_table()
    assert len(set(table)) == ours.vocab_size
    assert loaded.get_vocab() == {token: index for index, token in enumerate(table)}


@pytest.mark.parametrize(("name", "encoding"), [("cl100k", "cl100k_base"), ("o200k", "o200k_base"), ("gpt2", "gpt2")])
def test_patterns_cut_as_openais(name: str, encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from tiktoken_ext import openai_public

    ranks = {token: rank for rank, token in enumerate(byte_ranks())}
    monkeypatch.setattr(openai_public, "load_tiktoken_bpe", lambda *_, **__: ranks)
    monkeypatch.setattr(openai_public, "data_gym_to_mergeable_bpe_ranks", lambda *_, **__: ranks)
    theirs = getattr(openai_public, encoding)()["pat_str"]
    ours, expected = (
        tiktoken.Encoding("x", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
        for pattern in (PATTERNS[name], theirs)
    )
    for text in ALL:
        assert ours.encode(text, disallowed_special=()) == expected.encode(text, disallowed_special=())


def test_special_tokens_with_ids_of_their_own(tmp_path: Path) -> None:
    count = len(byte_ranks())
    tokenizer = TikTokenizer(tiktoken_file(tmp_path), special_tokens=["<s>", f"</s>={count + 7}", "a=b"])
    assert (tokenizer.bos_id, tokenizer.eod_id, tokenizer.vocab_size) == (count, count + 7, count + 8)
    assert tokenizer.encode("a=b") == [count + 2]
    with pytest.raises(ConfigError, match="--tiktoken-special-tokens is 3: must not be the id of another token"):
        TikTokenizer(tiktoken_file(tmp_path), special_tokens=["<s>=3"])


@pytest.mark.parametrize("content", ["{}", "[]", "[1]", '[{"rank": 1, "token_bytes": "YQ=="}]', "nonsense"])
def test_json_files_that_are_none(tmp_path: Path, content: str) -> None:
    (tmp_path / "v.json").write_text(content)
    with pytest.raises(VocabularyError, match="must be a tiktoken vocabulary"):
        TikTokenizer(tmp_path / "v.json")


@pytest.mark.parametrize("content", ["", "YQ==", "YQ== 0\nYg== 0", "*** 1", "YQ== x"])
def test_tiktoken_files_that_are_none(tmp_path: Path, content: str) -> None:
    (tmp_path / "v.tiktoken").write_text(content)
    with pytest.raises(VocabularyError, match="must be a tiktoken vocabulary"):
        TikTokenizer(tmp_path / "v.tiktoken")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"num_special_tokens": 6}, "--tiktoken-num-special-tokens is 6: must cover the 7 special tokens"),
        ({"special_tokens": ["a", "a"]}, "--tiktoken-num-special-tokens is 1000: must cover the 2"),
        ({"pattern": "("}, r"--tiktoken-pattern is '\(': must be one of v1"),
    ],
)
def test_flags_that_do_not_fit(tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TikTokenizer(megatron_json_file(tmp_path), **changed).encode("a")


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--tokenizer-model is .*must be a .json or .tiktoken file"):
        TikTokenizer(tmp_path / "v.json")


def test_definitions_tell_patterns_apart(tmp_path: Path) -> None:
    path = tiktoken_file(tmp_path)
    assert TikTokenizer(path).definition() == TikTokenizer(path).definition()
    assert TikTokenizer(path).definition() != TikTokenizer(path, pattern="v1").definition()
