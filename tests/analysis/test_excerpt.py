"""Excerpts: spans of tokens and their texts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_slm.analysis.excerpt import decode_tokens, excerpt_of_corpus, excerpt_of_texts
from megatron_slm.analysis.token_types import TOKEN_TYPES, token_types
from megatron_slm.errors import AnalysisError, CorpusError
from tests.analysis.conftest import TEXTS
from tests.support.runs import write_corpus


def test_token_texts_join_to_the_text(tokenizer: Any, text_file: Path) -> None:
    """Spans overlap by one token: what each predicts is the text without its first token, once."""
    excerpt = excerpt_of_texts([str(text_file)], tokenizer, sequence_length=7, max_tokens=10**6)
    records = [json.loads(line)["text"] for line in text_file.read_text().splitlines()]
    text = ""
    for row in range(len(excerpt.spans)):
        token_texts = excerpt.token_texts(row)
        assert len(token_texts) == 1 + excerpt.valid_Ws[row].sum()
        starts_document = text in {"".join(records[:i]) for i in range(len(records) + 1)}
        text += "".join(token_texts if starts_document else token_texts[1:])
    assert text == "".join(records)


def test_spans_hold_the_documents_tokens(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXTS[2])
    excerpt = excerpt_of_texts([str(tmp_path / "a.txt")], tokenizer, sequence_length=10, max_tokens=10**6)
    ids = tokenizer(TEXTS[2], add_special_tokens=False)["input_ids"]
    assert excerpt.num_tokens == len(ids) - 1
    joined = np.concatenate([row[1:][valid] for row, valid in zip(excerpt.tokens_Ws1, excerpt.valid_Ws, strict=True)])
    assert joined.tolist() == ids[1:]
    assert (excerpt.tokens_Ws1[1:, 0] == excerpt.tokens_Ws1[:-1, -1]).all()


def test_texts_of_ids_are_the_decoded_text(tokenizer: Any) -> None:
    """A character made of several tokens comes with its last one."""
    for text in TEXTS:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        token_texts = decode_tokens(tokenizer, ids)
        assert len(token_texts) == len(ids)
        assert "".join(token_texts) == text
        assert "\N{REPLACEMENT CHARACTER}" not in "".join(token_texts)
    assert decode_tokens(None, [3, 4]) == ["3 ", "4 "]


def test_kinds_follow_the_spans(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "ab12cd", "spans": [["letters", 2], ["digits", 2], ["letters", 2]]}))
    excerpt = excerpt_of_texts([str(path)], tokenizer, sequence_length=20, max_tokens=100)
    token_texts = excerpt.token_texts(0)
    for token_text, kind in zip(token_texts, excerpt.spans[0].kinds, strict=True):
        assert kind == ("digits" if token_text[0].isdigit() else "letters")


def test_no_more_tokens_than_asked_for(tokenizer: Any, text_file: Path) -> None:
    for most in (1, 5, 20):
        assert excerpt_of_texts([str(text_file)], tokenizer, sequence_length=8, max_tokens=most).num_tokens == most


def test_types(tokenizer: Any) -> None:
    ids = tokenizer("word 12 , \n</s>", add_special_tokens=False)["input_ids"]
    names = (TOKEN_TYPES[number] for number in token_types(tokenizer, np.array(ids)))
    named = dict(zip(map(tokenizer.decode, ids), names, strict=True))
    assert named["</s>"] == "control"
    assert {named[key] for key in named if key.strip().isdigit()} == {"digits"}
    assert {named[key] for key in named if key.strip() == ","} == {"punctuation and symbols"}
    assert {named[key] for key in named if key and not key.strip()} == {"white space"}
    assert {named[key] for key in named if key.strip().isalpha() and not key.startswith(" ")} == {"word continues"}


def test_a_corpus_is_read_as_training_evaluates_it(tmp_path: Path) -> None:
    prefix = write_corpus(tmp_path / "corpus")
    excerpt = excerpt_of_corpus(str(prefix), None, sequence_length=16, max_tokens=100)
    assert excerpt.tokens_Ws1.shape == (7, 17)
    assert (excerpt.tokens_Ws1[1:, 0] == excerpt.tokens_Ws1[:-1, -1]).all()
    assert excerpt.token_texts(0)[0] == f"{excerpt.tokens_Ws1[0, 0]} "


def test_bad_input(tokenizer: Any, tmp_path: Path) -> None:
    cases = (
        ("{", r"bad.jsonl: line 1 is '{': must be a JSON object \("),
        ("[1]", "line 1 is 'list': must be a JSON object"),
        ('{"txt": "a"}', "line 1: text is missing: required by a document"),
        ('{"text": ""}', "must hold a document of at least two tokens"),
    )
    for line, match in cases:
        path = tmp_path / "bad.jsonl"
        path.write_text(line)
        with pytest.raises(AnalysisError, match=match):
            excerpt_of_texts([str(path)], tokenizer, sequence_length=8, max_tokens=100)
    with pytest.raises(CorpusError, match="must be a file"):
        excerpt_of_texts([str(tmp_path / "none.jsonl")], tokenizer, sequence_length=8, max_tokens=100)
