"""Numbers beside the tokens: by token, by characters, and the ends of tokens in the text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_slm.data.corpus.columns import column_prefix, numbers_of, open_column, read_column_sidecar
from megatron_slm.data.corpus.indexed import IndexedCorpus
from megatron_slm.data.preprocessing.documents import DocumentKeys
from megatron_slm.data.preprocessing.preprocess import PreprocessConfig, preprocess
from megatron_slm.data.tokenizers.base import Tokenizer
from megatron_slm.data.tokenizers.registry import HuggingFaceTokenizer, NullTokenizer
from megatron_slm.data.tokenizers.sentencepiece import SentencePieceTokenizer
from megatron_slm.data.tokenizers.tiktoken import TikTokenizer
from megatron_slm.errors import ConfigError, CorpusError, VocabularyError
from tests.data.byte_level import byte_level_folder, tiktoken_file
from tests.data.texts import TEXTS


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> dict[str, Tokenizer]:
    folder = tmp_path_factory.mktemp("tokenizers")
    return {
        "byte-level": HuggingFaceTokenizer(byte_level_folder(folder / "hf")),
        "sentencepiece": SentencePieceTokenizer(tokenizer_folder / "tokenizer.model"),
        "its Hugging Face form": HuggingFaceTokenizer(tokenizer_folder),
        "tiktoken": TikTokenizer(tiktoken_file(folder), pattern="gpt2"),
    }


@pytest.mark.parametrize("name", ["byte-level", "sentencepiece", "its Hugging Face form", "tiktoken"])
def test_ends_cover_every_text(name: str, tokenizers: dict[str, Tokenizer]) -> None:
    """Rising, the last at the text's end; the text up to an end is the text of the tokens up to there."""
    tokenizer = tokenizers[name]
    for text in TEXTS:
        ids, ends = tokenizer.encode_with_ends(text)
        assert ids == tokenizer.encode(text)
        assert ends == sorted(ends)
        assert ends[-1:] in ([], [len(text)])
        if tokenizer.decode(ids) != text:
            continue  # normalized: leading spaces, for example
        for i, end in enumerate(ends):
            assert text[:end] == tokenizer.decode(ids[: i + 1]).rstrip("\ufffd") or text[end : end + 1].isspace()


def test_tokenizers_of_the_same_bytes_agree(tokenizers: dict[str, Tokenizer]) -> None:
    for text in TEXTS:
        assert tokenizers["byte-level"].encode_with_ends(text)[1] == tokenizers["tiktoken"].encode_with_ends(text)[1]
        plain = Tokenizer.encode_with_ends(tokenizers["byte-level"], text)
        assert plain == tokenizers["byte-level"].encode_with_ends(text)


def test_a_lossy_tokenizer_has_no_ends() -> None:
    with pytest.raises(VocabularyError, match="must be equal to what its tokens decode to"):
        Tokenizer.encode_with_ends(NullTokenizer(100), "1  2")


def run(folder: Path, documents: list[dict[str, Any]], tokenizer: Tokenizer, **changes: Any) -> IndexedCorpus:
    path = folder / "in.jsonl"
    path.write_text("".join(json.dumps(document) + "\n" for document in documents))
    keys = {"score_keys": ("quality",), **changes.pop("keys", {})}
    config = PreprocessConfig(
        input=(str(path),), output_prefix=str(folder / "out"), keys=DocumentKeys(**keys), **changes
    )
    preprocess(config, tokenizer)
    return IndexedCorpus(folder / "out_text_document")


def columns_of(corpus: IndexedCorpus, name: str = "quality") -> list[list[float]]:
    column = open_column(corpus, name)
    return [numbers_of(column.get(i)).tolist() for i in range(column.num_sequences)]


def test_numbers_by_token(tmp_path: Path) -> None:
    documents = [
        {"text": "1 2 3", "quality": [0.5, -1, 2]},
        {"text": "", "quality": []},
        {"text": "4", "quality": [7]},
    ]
    corpus = run(tmp_path, documents, NullTokenizer(100), append_eod=True)
    assert columns_of(corpus) == [[0.5, -1.0, 2.0, 2.0], [7.0, 7.0]]  # the end has its neighbor's number
    assert open_column(corpus, "quality").num_documents == corpus.num_documents == 3
    sidecar = read_column_sidecar(corpus, "quality")
    assert (sidecar.minimum, sidecar.maximum, sidecar.dtype) == (-1.0, 7.0, "float16")


def test_several_texts_with_a_mask_and_two_columns(tmp_path: Path) -> None:
    documents = [{"text": ["1 2", "3"], "mask": [0, 1], "quality": [[1, 2], [3]], "weight": [[0.5, 0.25], []]}]
    keys = {"score_keys": ("quality", "weight"), "loss_mask_key": "mask", "score_default": 4.0}
    corpus = run(tmp_path, documents, NullTokenizer(100), append_eod=True, keys=keys)
    assert columns_of(corpus) == [[1.0, 2.0, 3.0, 3.0]]
    assert columns_of(corpus, "weight") == [[0.5, 0.25, 4.0, 4.0]]


@pytest.mark.parametrize("name", ["byte-level", "sentencepiece"])
@pytest.mark.parametrize("workers", [1, 2])
def test_numbers_by_characters(name: str, workers: int, tmp_path: Path, tokenizers: dict[str, Tokenizer]) -> None:
    """The mean over the characters of each token, the slow way."""
    tokenizer = tokenizers[name]
    texts = [text for text in TEXTS if tokenizer.encode(text)]
    documents = []
    for i, text in enumerate(texts):
        middle = len(text) // 2
        spans = [[0, middle, i], [middle // 2, middle, -1]] if middle > 1 else [[0, len(text), i]]
        documents.append({"text": text, "quality": spans})
    corpus = run(tmp_path, documents, tokenizer, workers=workers, keys={"score_default": 0.5})
    found = columns_of(corpus)
    for document, numbers in zip(documents, found, strict=True):
        text, spans = document["text"], document["quality"]
        by_character = [0.5] * len(text)
        for start, end, number in spans:
            by_character[start:end] = [number] * (end - start)
        ids, ends = tokenizer.encode_with_ends(text)
        assert len(ids) == len(numbers)
        start = 0
        for end, number in zip(ends, numbers, strict=True):
            own = by_character[start:end] or by_character[min(start, len(text) - 1) :][:1]
            assert number == pytest.approx(sum(own) / len(own), rel=1e-3, abs=1e-3)
            start = end


BAD = {
    "too few": ([1.0, 2.0], "2 numbers, but the text has 3 tokens"),
    "no list": (1.0, "not a list of numbers for each of 1 texts"),
    "a word": (["x"], "an entry that is no number and no \\[start, end, number\\]"),
    "beyond the text": ([[0, 99, 1.0]], "the span \\[0, 99\\), which is no span of 5 characters"),
    "not finite": ([[0, 1, float("nan")]], "no number and no"),
    "too large": ([1e6, 0.0, 0.0], "finite and at most 65504"),
}


@pytest.mark.parametrize("case", BAD)
def test_lists_that_do_not_fit(case: str, tmp_path: Path) -> None:
    value, match = BAD[case]
    documents = [{"text": "1 2 3", "quality": value}, {"text": "4 5", "quality": [1, 2]}]
    with pytest.raises(CorpusError, match=match):
        run(tmp_path, documents, NullTokenizer(100))
    corpus = run(tmp_path, documents, NullTokenizer(100), on_error="skip")
    assert columns_of(corpus) == [[1.0, 2.0]]


def test_a_missing_key_is_named(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"no key 'quality'.*--json-keys and --score-key"):
        run(tmp_path, [{"text": "1"}], NullTokenizer(100))


@pytest.mark.parametrize(
    ("keys", "match"),
    [
        ({"json_keys": ("a", "b")}, "exactly one of --json-keys"),
        ({"prompt_key": "p", "response_key": "r"}, "without --prompt-key"),
        ({"score_keys": ("a/b",)}, "must name a column with letters"),
        ({"score_keys": ("a", "a")}, "must name each key once"),
    ],
)
def test_keys_that_do_not_go_together(keys: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        DocumentKeys(**{"score_keys": ("quality",), **keys})


def test_a_column_does_not_change_the_corpus(tmp_path: Path) -> None:
    documents = [{"text": "1 2 3", "quality": [1, 2, 3]}, {"text": "4 5", "quality": [[0, 3, 1.0]]}]
    scored = run(tmp_path, documents, NullTokenizer(100), append_eod=True)
    content = Path(f"{scored.prefix}.bin").read_bytes()
    plain = run(tmp_path, documents, NullTokenizer(100), append_eod=True, keys={"score_keys": ()})
    assert Path(f"{plain.prefix}.bin").read_bytes() == content
    assert np.array_equal(scored.sequence_lengths, plain.sequence_lengths)
    assert Path(f"{column_prefix(scored.prefix, 'quality')}.bin").stat().st_size == len(content)
