"""JSON lines to corpora: what Megatron's tool would write, counted, and all or nothing."""

from __future__ import annotations

import gzip
import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from megatron_slm.data.indexed import IndexedCorpus
from megatron_slm.data.preprocess import PreprocessConfig, PreprocessReport, preprocess
from megatron_slm.data.sentencepiece_tokenizer import SentencePieceTokenizer
from megatron_slm.data.sidecar import read_sidecar
from megatron_slm.errors import ConfigError, CorpusError
from tests.data.megatron_oracle import IndexedDatasetBuilder
from tests.data.texts import TEXTS, write_json_lines


def config(output_prefix: Path, *inputs: Path, model: Path | None = None, **changed) -> PreprocessConfig:
    """NullTokenizer with 100 ids, or SentencePiece with a model."""
    tokenizer = (
        {"tokenizer_type": "NullTokenizer", "vocab_size": 100}
        if model is None
        else {"tokenizer_type": "GPTSentencePieceTokenizer", "tokenizer_model": str(model)}
    )
    values = {"input": tuple(map(str, inputs)), "output_prefix": str(output_prefix), **tokenizer, **changed}
    return PreprocessConfig(**values)


@pytest.mark.parametrize("append_eod", [True, False])
def test_same_bytes_as_megatrons_tool(tmp_path: Path, model_file: Path, append_eod: bool) -> None:
    """Megatron's loop, by its own builder: documents without a token stay as documents without a sequence."""
    texts: list[str | list[str]] = [*TEXTS, ["Two sentences.", "", "In one document."], [], *TEXTS]
    path = write_json_lines(tmp_path / "in.jsonl", texts)
    report = preprocess(config(tmp_path / "ours", path, model=model_file, append_eod=append_eod))

    tokenizer = SentencePieceTokenizer(model_file)
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=np.uint16)
    num_tokens = num_empty = longest = 0
    for text in texts:
        sentences = [tokenizer.encode(part) for part in ([text] if isinstance(text, str) else text)]
        sentences = [ids for ids in sentences if ids]
        if sentences and append_eod:
            sentences[-1].append(2)
        ids = list(itertools.chain(*sentences))
        builder.add_document(np.array(ids, dtype=np.int64), [len(part) for part in sentences])
        num_tokens, num_empty = num_tokens + len(ids), num_empty + (not ids)
        longest = max(longest, len(ids))
    builder.finalize(str(tmp_path / "theirs.idx"))

    for suffix in ("bin", "idx"):
        ours = tmp_path / f"ours_text_document.{suffix}"
        assert ours.read_bytes() == (tmp_path / f"theirs.{suffix}").read_bytes()
    assert report.num_documents == len(texts)
    assert (report.num_tokens, report.num_empty) == ({"text": num_tokens}, {"text": num_empty})
    assert report.longest_document == {"text": longest}
    assert num_empty == 3


def test_the_result_does_not_depend_on_the_workers(tmp_path: Path, model_file: Path) -> None:
    path = write_json_lines(tmp_path / "in.jsonl", [*TEXTS] * 40)
    reports = [
        preprocess(config(tmp_path / str(workers), path, path, model=model_file, workers=workers)) for workers in (1, 2)
    ]
    for suffix in ("bin", "idx"):
        one, two = (tmp_path / f"{workers}_text_document.{suffix}" for workers in (1, 2))
        assert one.read_bytes() == two.read_bytes()
    assert reports[0].num_tokens == reports[1].num_tokens
    assert reports[0].num_bytes == reports[1].num_bytes == 2 * path.stat().st_size


def test_several_files_and_keys(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"x": "1 2", "y": "3"}\n{"x": "", "y": "4"}\n'))
    (tmp_path / "b.jsonl").write_bytes(b'{"x": "5", "y": "6 7 8"}')
    report = preprocess(
        config(tmp_path / "out" / "c", tmp_path / "a.jsonl.gz", tmp_path / "b.jsonl", json_keys=("x", "y"))
    )
    x, y = (IndexedCorpus(tmp_path / "out" / f"c_{key}_document") for key in "xy")
    assert [x.get(at).tolist() for at in range(x.num_sequences)] == [[1, 2], [5]]
    assert [y.get(at).tolist() for at in range(y.num_sequences)] == [[3], [4], [6, 7, 8]]
    assert (x.num_documents, y.num_documents) == (3, 3)
    assert (report.num_empty, report.longest_document) == ({"x": 1, "y": 0}, {"x": 2, "y": 3})


def test_sidecar(tmp_path: Path, model_file: Path) -> None:
    path = write_json_lines(tmp_path / "in.jsonl", [*TEXTS])
    preprocess(config(tmp_path / "c", path, model=model_file, append_eod=True, command="the command"))
    sidecar, corpus = read_sidecar(tmp_path / "c_text_document"), IndexedCorpus(tmp_path / "c_text_document")
    assert sidecar is not None
    assert sidecar.tokenizer_fingerprint == SentencePieceTokenizer(model_file).fingerprint()
    assert (sidecar.num_documents, sidecar.num_tokens) == (corpus.num_documents, corpus.num_tokens)
    assert (sidecar.vocab_size, sidecar.eod_id, sidecar.command) == (500, 2, "the command")
    assert sidecar.max_token_id == corpus.max_token_id()
    preprocess(config(tmp_path / "c", path, model=model_file))
    again = read_sidecar(tmp_path / "c_text_document")
    assert again is not None
    assert again.eod_id is None


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65_498, "uint16"), (65_499, "int32")])
def test_dtype_by_the_true_vocabulary(tmp_path: Path, vocab_size: int, dtype: str) -> None:
    """NullTokenizer adds one id, and the border is at 65500."""
    path = write_json_lines(tmp_path / "in.jsonl", ["1 2"])
    preprocess(config(tmp_path / "c", path, vocab_size=vocab_size))
    assert IndexedCorpus(tmp_path / "c_text_document").dtype.name == dtype


def test_invalid_lines_stop_the_run_and_leave_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(b'{"text": "1"}\n\n{"text": 2}\n{')
    prefix = tmp_path / "out" / "c"
    with pytest.raises(CorpusError, match=r"input = '.*in.jsonl:3': every line must be a document: the value"):
        preprocess(config(prefix, path))
    assert list(prefix.parent.iterdir()) == []


def test_invalid_lines_are_skipped_and_reported(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(b'{"text": "1"}\n{\n[]\n' + b"nonsense\n" * 150 + b'{"text": "2"}')
    report = preprocess(config(tmp_path / "c", path, on_error="skip"))
    assert IndexedCorpus(tmp_path / "c_text_document").num_tokens == 2
    assert (report.num_documents, report.num_invalid, len(report.invalid)) == (2, 152, 100)
    assert [(line.line, line.reason.split(" (")[0]) for line in report.invalid[:2]] == [
        (2, "not JSON"),
        (3, "not a JSON object but a list"),
    ]


def test_no_corpus_is_put_in_place_when_one_would_be_empty(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text(json.dumps({"a": "1 2", "b": ""}))
    message = r"input = .*must hold a text with tokens under 'b' \(1 documents were read\)"
    with pytest.raises(CorpusError, match=message):
        preprocess(config(tmp_path / "out" / "c", path, json_keys=("a", "b")))
    assert list((tmp_path / "out").iterdir()) == []


def test_progress(tmp_path: Path) -> None:
    path = write_json_lines(tmp_path / "in.jsonl", ["1"] * 600)
    seen: list[int] = []

    def on_progress(report: PreprocessReport) -> None:
        seen.append(report.num_documents)

    report = preprocess(config(tmp_path / "c", path), on_progress)
    assert seen == [256, 512, 600]
    assert report.seconds > 0


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"on_error": "ignore"}, "on_error = 'ignore': must be stop or skip"),
        ({"json_keys": ()}, r"json_keys = \(\): must be at least one key"),
        ({"json_keys": ("a", "a")}, "json_keys = .*none of them twice"),
    ],
)
def test_bad_config(tmp_path: Path, changed: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(tmp_path / "c", tmp_path, **changed)
