"""The tokenizers under Megatron's names."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Backend
from transformers import AutoTokenizer

from megatron_slm.data.tokenizers.registry import (
    SENTENCEPIECE_TYPES,
    HuggingFaceTokenizer,
    NullTokenizer,
    SentencePieceTokenizer,
    build_tokenizer,
    check_same_vocabulary,
)
from megatron_slm.errors import ConfigError, VocabularyError
from tests.data.texts import TEXTS


@pytest.fixture(scope="module")
def bare_file(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer.json without the tokenizer_config.json."""
    path = tmp_path_factory.mktemp("bare") / "tokenizer.json"
    shutil.copy(tokenizer_folder / "tokenizer.json", path)
    return path


def test_build_by_type(tokenizer_folder: Path, model_file: Path) -> None:
    for name in SENTENCEPIECE_TYPES:
        assert isinstance(build_tokenizer(name, model_file), SentencePieceTokenizer)
    assert isinstance(build_tokenizer("HuggingFaceTokenizer", str(tokenizer_folder)), HuggingFaceTokenizer)
    assert isinstance(build_tokenizer("NullTokenizer", None, 10), NullTokenizer)


def test_build_rejects_unknown_types_and_missing_paths() -> None:
    with pytest.raises(ConfigError, match=r"--tokenizer-type is 'BertTokenizer': must be one of HuggingFace"):
        build_tokenizer("BertTokenizer", None)
    with pytest.raises(ConfigError, match="--tokenizer-model is missing: required by --tokenizer-type Llama2Tokenizer"):
        build_tokenizer("Llama2Tokenizer", None)


def test_hugging_face_is_what_transformers_gives(tokenizer_folder: Path) -> None:
    ours = HuggingFaceTokenizer(tokenizer_folder)
    theirs = AutoTokenizer.from_pretrained(str(tokenizer_folder))
    assert (ours.vocab_size, ours.bos_id, ours.eod_id) == (len(theirs), 1, 2)
    assert ours.encode_batch(TEXTS) == [theirs(text, add_special_tokens=False).input_ids for text in TEXTS]
    for text in TEXTS:
        ids = ours.encode(text)
        assert ids == theirs(text, add_special_tokens=False).input_ids
        assert ours.decode(ids) == text.replace("▁", " "), "this tokenizer loses nothing else"
    assert ours.decode([1, *ours.encode("a"), 2]) == "<s>a</s>"


def test_nothing_is_added_cut_or_padded_whatever_the_file_says(tokenizer_folder: Path, tmp_path: Path) -> None:
    """A tokenizer.json that adds a beginning, cuts at 4 tokens and pads to 8."""
    shutil.copytree(tokenizer_folder, tmp_path / "t")
    backend = Backend.from_file(str(tmp_path / "t" / "tokenizer.json"))
    content = json.loads(backend.to_str())
    content["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    content["padding"] = {
        "strategy": {"Fixed": 8},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "<unk>",
    }
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    }
    (tmp_path / "t" / "tokenizer.json").write_text(json.dumps(content))
    assert Backend.from_file(str(tmp_path / "t" / "tokenizer.json")).encode("a").ids[0] == 1
    changed, plain = HuggingFaceTokenizer(tmp_path / "t"), HuggingFaceTokenizer(tokenizer_folder)
    assert changed.encode_batch(TEXTS) == plain.encode_batch(TEXTS)


def test_special_tokens_in_the_text_are_those_tokens(tokenizer_folder: Path) -> None:
    assert HuggingFaceTokenizer(tokenizer_folder).encode("</s>") == [2]


def test_a_bare_tokenizer_json(bare_file: Path, tokenizer_folder: Path) -> None:
    bare, whole = HuggingFaceTokenizer(bare_file), HuggingFaceTokenizer(tokenizer_folder / "tokenizer.json")
    assert bare.encode(TEXTS[0]) == whole.encode(TEXTS[0])
    assert (bare.eod_id, bare.bos_id) == (None, None)
    assert (whole.eod_id, whole.bos_id) == (2, 1)
    assert bare.fingerprint() == whole.fingerprint()
    assert HuggingFaceTokenizer(bare_file.parent).encode(TEXTS[4]) == whole.encode(TEXTS[4])


def test_hugging_face_is_saved_and_loaded_again(tokenizer_folder: Path, tmp_path: Path) -> None:
    tokenizer = HuggingFaceTokenizer(tokenizer_folder)
    tokenizer.save_pretrained(tmp_path / "again")
    again = HuggingFaceTokenizer(tmp_path / "again")
    assert again.encode_batch(TEXTS) == tokenizer.encode_batch(TEXTS)
    assert again.fingerprint() == tokenizer.fingerprint()
    assert again.eod_id == tokenizer.eod_id


def test_paths_that_are_no_hugging_face_tokenizer(tmp_path: Path, model_file: Path) -> None:
    for path in (tmp_path / "missing", tmp_path, "meta-llama/Llama-2-7b"):
        with pytest.raises(ConfigError, match=r"--tokenizer-model is .*must be a folder with tokenizer.json"):
            HuggingFaceTokenizer(path)
    with pytest.raises(VocabularyError, match=r"must load as a Hugging Face tokenizer \("):
        HuggingFaceTokenizer(model_file)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(VocabularyError, match=r"must load as a Hugging Face tokenizer \("):
        HuggingFaceTokenizer(tmp_path)


def test_null_tokenizer_is_megatrons() -> None:
    from megatron.core.tokenizers.text.libraries.null_tokenizer import NullTokenizer as Theirs

    ours, theirs = NullTokenizer(10), Theirs(10)
    assert (ours.vocab_size, ours.eod_id, ours.bos_id) == (theirs.vocab_size, theirs.eod, None)
    assert ours.eod_id == ours.vocab_size - 1
    assert ours.encode("3 0 9 10") == theirs.text_to_ids("3 0 9 10")
    assert ours.encode(" ") == []
    assert ours.encode_batch(["1 2", ""]) == [[1, 2], []]
    assert ours.decode([3, 0]) == theirs.ids_to_text([3, 0]) == "3 0"
    assert ours.token_table() == [str(at) for at in range(11)]


@pytest.mark.parametrize("word", ["11", "-1", "x", "1.5", "²"])
def test_null_tokenizer_rejects_words_that_are_no_id(word: str) -> None:
    with pytest.raises(VocabularyError, match=rf"word for NullTokenizer is '{word}': must be an id in"):
        NullTokenizer(10).encode(f"1 {word}")


def test_null_tokenizer_needs_a_size() -> None:
    with pytest.raises(ConfigError, match="--vocab-size is missing: required by --tokenizer-type NullTokenizer"):
        NullTokenizer(None)
    with pytest.raises(ConfigError, match="--vocab-size is 0: must be positive"):
        NullTokenizer(0)


def test_null_tokenizer_has_no_hugging_face_form(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--tokenizer-type is 'NullTokenizer': must have a Hugging Face form"):
        NullTokenizer(3).save_pretrained(tmp_path)


def test_fingerprints_tell_tables_apart() -> None:
    assert NullTokenizer(10).fingerprint() == NullTokenizer(10).fingerprint()
    assert NullTokenizer(10).fingerprint() != NullTokenizer(11).fingerprint()
    assert len(NullTokenizer(10).fingerprint()) == 64


def test_fingerprint_does_not_run_tokens_together() -> None:
    class Table(NullTokenizer):
        """Any token table."""

        def __init__(self, *tokens: str) -> None:
            super().__init__(1)
            self.tokens = tokens

        def token_table(self) -> list[str]:
            """The tokens it was made with."""
            return list(self.tokens)

    assert Table("ab", "c").fingerprint() != Table("a", "bc").fingerprint()
    assert Table("\ud800").fingerprint() != Table("?").fingerprint()


def test_same_vocabulary(tokenizer_folder: Path, model_file: Path) -> None:
    check_same_vocabulary(
        HuggingFaceTokenizer(tokenizer_folder),
        SentencePieceTokenizer(model_file),
        "the model",
        "the reference",
    )


def test_vocabularies_that_differ(model_file: Path) -> None:
    message = (
        r"token 0 of the model and the reference is \('<unk>', '0'\): "
        r"must be the same in both vocabularies, of 500 and 11 tokens"
    )
    with pytest.raises(VocabularyError, match=message):
        check_same_vocabulary(SentencePieceTokenizer(model_file), NullTokenizer(10), "the model", "the reference")
    message = r"token 11 of a and b is \(None, '11'\): must be the same in both vocabularies, of 11 and 13 tokens"
    with pytest.raises(VocabularyError, match=message):
        check_same_vocabulary(NullTokenizer(10), NullTokenizer(12), "a", "b")
