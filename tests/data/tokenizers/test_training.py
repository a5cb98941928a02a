"""Training a tokenizer: Llama's ids, nothing lost, the same bytes every time."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_slm.data.tokenizers.registry import HuggingFaceTokenizer
from megatron_slm.data.tokenizers.sentencepiece import SentencePieceTokenizer
from megatron_slm.data.tokenizers.training import texts_of_files, train_sentencepiece, write_tokenizer
from megatron_slm.errors import ConfigError, CorpusError
from tests.data.texts import TEXTS, training_texts, write_json_lines


def test_like_llama(model_file: Path) -> None:
    tokenizer = SentencePieceTokenizer(model_file)
    table = tokenizer.token_table()
    assert table[:4] == ["<unk>", "<s>", "</s>", "<0x00>"]
    assert table[258] == "<0xFF>"
    assert len(table) == len(set(table)) == 500
    assert [table[at] for at in tokenizer.encode("1851")] == ["1", "8", "5", "1"]
    assert not any(len(token) > 1 and any(c.isdigit() for c in token) for token in table[259:])
    assert any(token.startswith("▁▁") for token in table), "runs of spaces are pieces"


def test_nothing_is_lost(model_file: Path) -> None:
    tokenizer = SentencePieceTokenizer(model_file)
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text)) == text.replace("▁", " ")


def test_deterministic() -> None:
    first, again = (train_sentencepiece(training_texts(), vocab_size=400) for _ in range(2))
    assert first == again


def test_long_lines_are_learned_from(tmp_path: Path) -> None:
    """SentencePiece alone would silently skip a line of 60,000 characters."""
    path = write_tokenizer(train_sentencepiece(["lorem " * 10_000], vocab_size=269), tmp_path / "t")
    assert "rem" in SentencePieceTokenizer(path).token_table()


@pytest.mark.parametrize("size", [1, 259])
def test_vocabulary_too_small_for_the_bytes(size: int) -> None:
    with pytest.raises(ConfigError, match=f"--vocab-size is {size}: must be above 259"):
        train_sentencepiece(training_texts(), vocab_size=size)


@pytest.mark.parametrize("size", [262, 100_000])
def test_vocabulary_that_does_not_fit_the_text(size: int) -> None:
    with pytest.raises(ConfigError, match=rf"--vocab-size is {size}: must fit the text \(SentencePiece: .*[Vv]ocab"):
        train_sentencepiece(training_texts(), vocab_size=size)


@pytest.mark.parametrize("texts", [[], ["", " \n \n"]])
def test_nothing_to_learn_from(texts: list[str]) -> None:
    with pytest.raises(CorpusError, match=r"text of --input is '': must have at least one line"):
        train_sentencepiece(texts, vocab_size=300)


def test_written_as_a_prefix_or_into_a_folder(model_file: Path, tmp_path: Path) -> None:
    model = model_file.read_bytes()
    assert write_tokenizer(model, tmp_path / "new" / "small") == tmp_path / "new" / "small.model"
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["small.model"]
    assert write_tokenizer(model, f"{tmp_path}/folder/") == tmp_path / "folder" / "tokenizer.model"
    assert HuggingFaceTokenizer(tmp_path / "folder").encode(TEXTS[0]) == SentencePieceTokenizer(model_file).encode(
        TEXTS[0]
    )


def test_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"--output is .*must be writable"):
        write_tokenizer(b"", tmp_path / "file" / "t")


def test_texts_of_files(tmp_path: Path) -> None:
    path = write_json_lines(tmp_path / "a.jsonl", ["one", ["two", "three"]], key="body")
    path.write_text(path.read_text() + "\n")
    assert list(texts_of_files([path], "body")) == ["one", "two", "three"]
    with pytest.raises(CorpusError, match=r"--input is '.*a.jsonl:1': must be a valid document \(no key 'text'"):
        list(texts_of_files([path], "text"))


def test_an_error_of_the_input_is_raised_unchanged(tmp_path: Path) -> None:
    path = write_json_lines(tmp_path / "a.jsonl", training_texts())
    path.write_text(path.read_text() + "{")
    with pytest.raises(CorpusError, match=r"--input is '.*a.jsonl:\d+': must be a valid document \(not JSON"):
        train_sentencepiece(texts_of_files([path], "text"), vocab_size=300)
