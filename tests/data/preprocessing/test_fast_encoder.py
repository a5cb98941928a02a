"""The faster library: the same ids, checked on samples, and a logged fallback if it differs."""

from __future__ import annotations

import io
import logging
import pickle
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from megatron_slm.data.preprocessing.fast_encoder import FastEncoder, FastEncoderError
from megatron_slm.data.preprocessing.preprocess import PreprocessConfig, preprocess
from megatron_slm.data.tokenizers.base import Ragged, Tokenizer
from megatron_slm.data.tokenizers.registry import (
    HuggingFaceTokenizer,
    NullTokenizer,
    SentencePieceTokenizer,
    TikTokenizer,
)
from megatron_slm.errors import ConfigError
from tests.data.byte_level import byte_level_folder, tiktoken_file
from tests.data.texts import TEXTS, write_json_lines


@pytest.fixture(scope="module", params=["byte-level", "sentencepiece", "sentencepiece as hf", "tiktoken"])
def tokenizer(
    request: pytest.FixtureRequest, model_file: Path, tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Tokenizer:
    """Every kind that has a fast form."""
    folder = tmp_path_factory.mktemp("t")
    if request.param == "byte-level":
        return HuggingFaceTokenizer(byte_level_folder(folder))
    if request.param == "tiktoken":
        return TikTokenizer(tiktoken_file(folder), pattern="gpt2")
    return (
        SentencePieceTokenizer(model_file)
        if request.param == "sentencepiece"
        else HuggingFaceTokenizer(tokenizer_folder)
    )


def test_same_ids_as_the_tokenizer(tokenizer: Tokenizer) -> None:
    encoder = FastEncoder(tokenizer)
    texts = [*TEXTS, "plain </s> and <s> <|endoftext|> x", "word " * 5000]
    for batch in (texts, texts[:1], [], ["", ""], texts[::-1]):
        found, expected = encoder.encode_ragged(batch), tokenizer.encode_ragged(batch)
        np.testing.assert_array_equal(found.ids, expected.ids)
        np.testing.assert_array_equal(found.lengths, expected.lengths)
        assert (found.ids.dtype, found.lengths.dtype) == (np.int32, np.int64)
    again = pickle.loads(pickle.dumps(encoder))
    np.testing.assert_array_equal(again.encode_ragged(texts).ids, encoder.encode_ragged(texts).ids)


def test_no_fast_form() -> None:
    with pytest.raises(FastEncoderError, match="no form that gigatoken supports"):
        FastEncoder(NullTokenizer(10))


def test_not_installed(model_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gigatoken", None)
    with pytest.raises(FastEncoderError, match="gigatoken is not installed"):
        FastEncoder(SentencePieceTokenizer(model_file))


def break_library(monkeypatch: pytest.MonkeyPatch, marker: str) -> None:
    """From now on a text that holds `marker` has another last id."""
    encode = FastEncoder._encode

    def broken(self: FastEncoder, texts: list[str]) -> Ragged:
        ids, lengths = encode(self, texts)
        ends = np.cumsum(lengths)
        for text, end in zip(texts, ends.tolist(), strict=True):
            if marker in text:
                ids[end - 1] += 1
        return Ragged(ids, lengths)

    monkeypatch.setattr(FastEncoder, "_encode", broken)


def test_a_difference_in_the_probes(model_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    break_library(monkeypatch, "Plain words")
    with pytest.raises(FastEncoderError, match=r"returns other ids from token \d+ of 'Plain words"):
        FastEncoder(SentencePieceTokenizer(model_file))


@pytest.mark.parametrize("kind", [SentencePieceTokenizer, HuggingFaceTokenizer])
def test_a_difference_in_special_tokens_that_are_spelled_out(
    tokenizer_folder: Path, model_file: Path, monkeypatch: pytest.MonkeyPatch, kind: type
) -> None:
    break_library(monkeypatch, "</s>")
    with pytest.raises(FastEncoderError, match="of 'a </s> b</s></s>'"):
        FastEncoder(kind(model_file if kind is SentencePieceTokenizer else tokenizer_folder))


@pytest.mark.parametrize("length", [1, 30_000])
def test_a_difference_in_the_text_is_found_by_the_samples(
    model_file: Path, monkeypatch: pytest.MonkeyPatch, length: int
) -> None:
    """In every text here, so in whichever is checked; of long texts a slice is."""
    break_library(monkeypatch, "uncommon")
    encoder = FastEncoder(SentencePieceTokenizer(model_file))
    encoder.encode_ragged(["all is well"])
    with pytest.raises(FastEncoderError, match="returns other ids"):
        encoder.encode_ragged(["uncommon " * length] * 3)


def test_every_place_of_a_batch_is_checked_in_time(model_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    break_library(monkeypatch, "uncommon")
    for place in range(8):
        encoder = FastEncoder(SentencePieceTokenizer(model_file))
        batch = ["fine"] * 8
        batch[place] = "uncommon"
        found = 0
        for _ in range(8):
            try:
                encoder.encode_ragged(batch)
            except FastEncoderError:
                found += 1
        assert found == 1


def run(folder: Path, source: Path, tokenizer: Tokenizer, fast: bool, workers: int = 1) -> tuple[str, bytes, bytes]:
    """The encoder's name and the corpus's bytes."""
    name = f"{folder}/{fast}{workers}"
    config = PreprocessConfig(
        input=(str(source),), output_prefix=name, append_eod=True, fast_tokenizer=fast, workers=workers
    )
    report = preprocess(config, tokenizer)
    return report.encoder, *(Path(f"{name}_text_document.{end}").read_bytes() for end in ("bin", "idx"))


def test_a_corpus_is_the_same(tmp_path: Path, tokenizer: Tokenizer) -> None:
    source = write_json_lines(tmp_path / "in.jsonl", [*TEXTS] * 5)
    plain, fast = (run(tmp_path, source, tokenizer, fast) for fast in (False, True))
    assert (plain[0], fast[0]) == ("tokenizer", "gigatoken")
    assert plain[1:] == fast[1:]


def test_falls_back_loudly_and_whole(
    tmp_path: Path, model_file: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The difference shows up late: what was encoded before is encoded again."""
    monkeypatch.setattr("megatron_slm.data.preprocessing.inputs._chunk_bytes", lambda *_: 300)
    monkeypatch.setattr(logging.getLogger("megatron_slm"), "propagate", True)
    source = write_json_lines(tmp_path / "in.jsonl", ["one two three"] * 60 + ["uncommon"] * 60)
    tokenizer = SentencePieceTokenizer(model_file)
    plain = run(tmp_path, source, tokenizer, False)
    break_library(monkeypatch, "uncommon")
    with caplog.at_level(logging.WARNING):
        fallen = run(tmp_path, source, tokenizer, True)
    assert fallen == plain
    assert "NOT using the fast tokenizer: gigatoken returns other ids" in caplog.text


def test_standard_input_cannot_be_read_again(tmp_path: Path, model_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lines already read would be lost: an error, and no fallback."""
    lines = b'{"text": "uncommon"}\n'
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(lines)))
    break_library(monkeypatch, "uncommon")
    config = PreprocessConfig(input=("-",), output_prefix=f"{tmp_path}/out/c", fast_tokenizer=True)
    with pytest.raises(
        ConfigError, match=r"--fast-tokenizer is 'gigatoken': must agree with the tokenizer \(gigatoken returns"
    ):
        preprocess(config, SentencePieceTokenizer(model_file))
    assert list((tmp_path / "out").iterdir()) == []


def test_no_fast_form_is_no_error(tmp_path: Path) -> None:
    source = write_json_lines(tmp_path / "in.jsonl", ["1"])
    config = PreprocessConfig(input=(str(source),), output_prefix=f"{tmp_path}/c", fast_tokenizer=True)
    assert preprocess(config, NullTokenizer(10)).encoder == "tokenizer"
