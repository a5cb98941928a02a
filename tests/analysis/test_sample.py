"""Windows of tokens and their text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_slm.analysis.sample import TokenTypes, decode_pieces, sample_corpus, sample_texts
from megatron_slm.errors import AnalysisError, CorpusError
from tests.analysis.conftest import TEXTS
from tests.support.runs import write_corpus


def test_pieces_join_to_the_text(tokenizer: Any, text_file: Path) -> None:
    """Windows overlap by one token: what each predicts is the text without its first token, once."""
    sample = sample_texts([str(text_file)], tokenizer, sequence_length=7, max_tokens=10**6)
    records = [json.loads(line)["text"] for line in text_file.read_text().splitlines()]
    text = ""
    for window in range(len(sample.windows)):
        pieces = sample.pieces(window)
        assert len(pieces) == 1 + sample.valid_Ws[window].sum()
        starts_document = text in {"".join(records[:i]) for i in range(len(records) + 1)}
        text += "".join(pieces if starts_document else pieces[1:])
    assert text == "".join(records)


def test_windows_hold_the_documents_tokens(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXTS[2])
    sample = sample_texts([str(tmp_path / "a.txt")], tokenizer, sequence_length=10, max_tokens=10**6)
    ids = tokenizer(TEXTS[2], add_special_tokens=False)["input_ids"]
    assert sample.num_tokens == len(ids) - 1
    joined = np.concatenate([row[1:][valid] for row, valid in zip(sample.tokens_Ws1, sample.valid_Ws, strict=True)])
    assert joined.tolist() == ids[1:]
    assert (sample.tokens_Ws1[1:, 0] == sample.tokens_Ws1[:-1, -1]).all()


def test_pieces_of_ids_are_the_decoded_text(tokenizer: Any) -> None:
    """A character made of several tokens comes with its last one."""
    for text in TEXTS:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        pieces = decode_pieces(tokenizer, ids)
        assert len(pieces) == len(ids)
        assert "".join(pieces) == text
        assert "\N{REPLACEMENT CHARACTER}" not in "".join(pieces)
    assert decode_pieces(None, [3, 4]) == ["3 ", "4 "]


def test_kinds_follow_the_spans(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "ab12cd", "spans": [["letters", 2], ["digits", 2], ["letters", 2]]}))
    sample = sample_texts([str(path)], tokenizer, sequence_length=20, max_tokens=100)
    pieces = sample.pieces(0)
    for piece, kind in zip(pieces, sample.windows[0].kinds, strict=True):
        assert kind == ("digits" if piece[0].isdigit() else "letters")


def test_no_more_tokens_than_asked_for(tokenizer: Any, text_file: Path) -> None:
    for most in (1, 5, 20):
        assert sample_texts([str(text_file)], tokenizer, sequence_length=8, max_tokens=most).num_tokens == most


def test_types(tokenizer: Any) -> None:
    types = TokenTypes()
    text = "word 12 , \n</s>"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    named = dict(
        zip(map(tokenizer.decode, ids), (types.names[t] for t in types.of(tokenizer, np.array(ids))), strict=True)
    )
    assert named["</s>"] == "control"
    assert {named[key] for key in named if key.strip().isdigit()} == {"digits"}
    assert {named[key] for key in named if key.strip() == ","} == {"punctuation and symbols"}
    assert {named[key] for key in named if key and not key.strip()} == {"white space"}
    assert {named[key] for key in named if key.strip().isalpha() and not key.startswith(" ")} == {"word goes on"}


def test_a_corpus_is_read_as_training_evaluates_it(tmp_path: Path) -> None:
    prefix = write_corpus(tmp_path / "corpus")
    sample = sample_corpus(str(prefix), None, sequence_length=16, max_tokens=100)
    assert sample.tokens_Ws1.shape == (7, 17)
    assert (sample.tokens_Ws1[1:, 0] == sample.tokens_Ws1[:-1, -1]).all()
    assert sample.pieces(0)[0] == f"{sample.tokens_Ws1[0, 0]} "


def test_bad_input(tokenizer: Any, tmp_path: Path) -> None:
    for line, match in (("{", "JSON object"), ('{"txt": "a"}', "text under `text`"), ('{"text": ""}', "two tokens")):
        path = tmp_path / "bad.jsonl"
        path.write_text(line)
        with pytest.raises(AnalysisError, match=match):
            sample_texts([str(path)], tokenizer, sequence_length=8, max_tokens=100)
    with pytest.raises(CorpusError, match="must be a file"):
        sample_texts([str(tmp_path / "none.jsonl")], tokenizer, sequence_length=8, max_tokens=100)
