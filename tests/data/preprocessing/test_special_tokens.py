"""Special tokens that a text spells out, and the end-of-document token that is chosen: alike for every tokenizer."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_slm.cli.preprocess import build_parser, summary
from megatron_slm.data.corpus.indexed import IndexedCorpus
from megatron_slm.data.corpus.sidecar import read_sidecar
from megatron_slm.data.preprocessing.documents import DocumentKeys
from megatron_slm.data.preprocessing.preprocess import PreprocessConfig, PreprocessReport, preprocess
from megatron_slm.data.tokenizers.base import Tokenizer
from megatron_slm.data.tokenizers.registry import build_tokenizer
from megatron_slm.errors import ConfigError, CorpusError
from tests.data.byte_level import END, byte_level_folder, megatron_json_file, tiktoken_file
from tests.data.texts import write_json_lines

MAKE: dict[str, tuple[Callable[[Path, Path], Tokenizer], str]] = {
    "HuggingFaceTokenizer": (lambda folder, _: build_tokenizer("HuggingFaceTokenizer", folder), "</s>"),
    "byte-level folder": (
        lambda _, tmp: build_tokenizer("HuggingFaceTokenizer", byte_level_folder(tmp / "folder")), END,
    ),
    "SentencePieceTokenizer": (
        lambda folder, _: build_tokenizer("SentencePieceTokenizer", folder / "tokenizer.model"), "</s>",
    ),
    "TikTokenizer, Megatron's": (
        lambda _, tmp: build_tokenizer("TikTokenizer", megatron_json_file(tmp), tiktoken_num_special_tokens=50), "</s>",
    ),
    "TikTokenizer": (lambda _, tmp: build_tokenizer("TikTokenizer", tiktoken_file(tmp)), END),
}  # fmt: skip


@pytest.fixture(params=MAKE)
def made(request: pytest.FixtureRequest, tokenizer_folder: Path, tmp_path: Path) -> tuple[Tokenizer, str]:
    make, token = MAKE[request.param]
    return make(tokenizer_folder, tmp_path), token


def run(tmp_path: Path, tokenizer: Tokenizer, texts: list[str], **changes: Any) -> tuple[PreprocessReport, list[int]]:
    path = write_json_lines(tmp_path / "in.jsonl", list(texts))
    config = PreprocessConfig(input=(str(path),), output_prefix=str(tmp_path / "out"), **changes)
    report = preprocess(config, tokenizer)
    assert isinstance(summary(config, report), str)
    return report, IndexedCorpus(tmp_path / "out_text_document").get(0).tolist()


def test_every_tokenizer_treats_them_alike(made: tuple[Tokenizer, str], tmp_path: Path) -> None:
    tokenizer, token = made
    text = f"a page {token} that spells {token} out"
    index = tokenizer.special_tokens()[token]
    assert tokenizer.eod_id == index
    for how, num_parsed in (("parse", 2), ("plain", 0)):
        report, ids = run(tmp_path, tokenizer, [text], special_tokens_in_text=how)
        assert ids.count(index) == num_parsed
        assert report.corpora["text"].num_special == 2
        sidecar = read_sidecar(tmp_path / "out_text_document")
        assert sidecar is not None
        assert (sidecar.special_tokens_in_text, sidecar.num_special_in_text) == (how, 2)
        assert tokenizer.decode(ids).strip() == text or tokenizer.decode(ids).split() != []
        copy = pickle.loads(pickle.dumps(tokenizer))
        assert copy.encode(text) == tokenizer.encode(text) == ids, "workers treat them alike"
    with pytest.raises(CorpusError, match=r"in.jsonl:1.*spells out the special token"):
        run(tmp_path, tokenizer, [text], special_tokens_in_text="error")
    report, ids = run(tmp_path, tokenizer, [text, "clean"], special_tokens_in_text="error", on_error="skip")
    assert (report.num_documents, report.num_invalid) == (1, 1)
    assert report.corpora["text"].num_special == 0


def test_plain_is_the_default_and_the_end_is_still_a_token(made: tuple[Tokenizer, str], tmp_path: Path) -> None:
    tokenizer, token = made
    _, ids = run(tmp_path, tokenizer, [f"one {token} page"], append_eod=True)
    assert ids.count(tokenizer.special_tokens()[token]) == 1
    assert ids[-1] == tokenizer.eod_id
    assert (
        build_parser()
        .parse_flags(["--input", "x", "--output-prefix", "y", "--tokenizer-type", "z"])
        .special_tokens_in_text
        == "plain"
    )


def test_the_end_token_can_be_chosen_and_is_reported(tokenizer_folder: Path, tmp_path: Path) -> None:
    tokenizer = build_tokenizer("HuggingFaceTokenizer", tokenizer_folder)
    report, ids = run(tmp_path, tokenizer, ["a"], append_eod=True)
    assert (ids[-1], report.eod) == (2, "'</s>' (2)")
    report, ids = run(tmp_path, tokenizer, ["a"], append_eod=True, eod_token="<s>")
    assert (ids[-1], report.eod) == (1, "'<s>' (1)")
    sidecar = read_sidecar(tmp_path / "out_text_document")
    assert sidecar is not None
    assert sidecar.eod_id == 1
    config = PreprocessConfig(input=("x",), output_prefix="y", append_eod=True, eod_token="<s>")
    assert "documents end with the token '<s>' (1)" in summary(config, report)
    with pytest.raises(ConfigError, match=r"--eod-token is '</z>': must be a token of the tokenizer.*'</s>'"):
        run(tmp_path, tokenizer, ["a"], append_eod=True, eod_token="</z>")
    with pytest.raises(ConfigError, match="--append-eod is missing: required by --eod-token"):
        run(tmp_path, tokenizer, ["a"], eod_token="<s>")


@pytest.mark.parametrize(
    ("keys", "advice"),
    [({}, "with --json-keys, or"), ({"prompt_key": "q", "response_key": "a"}, "with --prompt-key and --response-key")],
)
def test_wrong_keys_get_the_flag_that_names_them(tmp_path: Path, keys: dict[str, str], advice: str) -> None:
    (tmp_path / "in.jsonl").write_text('{"content": "a"}\n')
    config = PreprocessConfig(
        input=(str(tmp_path / "in.jsonl"),), output_prefix=str(tmp_path / "out"), keys=DocumentKeys(**keys)
    )
    with pytest.raises(CorpusError, match=rf"the keys are 'content'.*{advice}"):
        preprocess(config, build_tokenizer("NullTokenizer", None, 10))


@pytest.mark.parametrize(
    ("name", "kind"), [("a.txt", "plain text"), ("a.txt.gz", "plain text"), ("a.CSV", "comma-separated")]
)
def test_files_that_are_no_json_lines_are_refused_by_name(tmp_path: Path, name: str, kind: str) -> None:
    (tmp_path / name).write_text("words\n")
    config = PreprocessConfig(input=(str(tmp_path / name),), output_prefix=str(tmp_path / "out"))
    with pytest.raises(CorpusError, match=f"must be JSON lines or Parquet; its name is that of .*{kind}"):
        preprocess(config, build_tokenizer("NullTokenizer", None, 10))
