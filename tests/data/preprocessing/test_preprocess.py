"""JSON lines to corpora: Megatron's bytes, exact counts, and all corpora or none."""

from __future__ import annotations

import errno
import fcntl
import gzip
import hashlib
import io
import itertools
import json
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import zstandard
from pyarrow import parquet

from megatron_slm.data.corpus.indexed import IndexedCorpus
from megatron_slm.data.corpus.sidecar import read_sidecar, verify_hashes
from megatron_slm.data.preprocessing.documents import DocumentKeys
from megatron_slm.data.preprocessing.preprocess import PreprocessConfig, PreprocessReport, preprocess
from megatron_slm.data.tokenizers.registry import HuggingFaceTokenizer, NullTokenizer
from megatron_slm.data.tokenizers.sentencepiece import SentencePieceTokenizer
from megatron_slm.errors import ConfigError, CorpusError
from tests.data.megatron_oracle import IndexedDatasetBuilder
from tests.data.texts import TEXTS, write_json_lines


def run(output_prefix: Path, *inputs: Path, model: Path | None = None, vocab_size: int = 100, **changed):
    """Preprocess with NullTokenizer, or SentencePiece with a model."""
    tokenizer = NullTokenizer(vocab_size) if model is None else SentencePieceTokenizer(model)
    on_progress = changed.pop("on_progress", lambda _: None)
    return preprocess(config(output_prefix, *inputs, **changed), tokenizer, on_progress)


def config(output_prefix: Path, *inputs: Path, **changed) -> PreprocessConfig:
    """Build a configuration; the arguments of `DocumentKeys` come in `keys`."""
    changed["keys"] = DocumentKeys(**changed.get("keys", {}))
    return PreprocessConfig(input=tuple(map(str, inputs)), output_prefix=str(output_prefix), **changed)


@pytest.mark.parametrize("append_eod", [True, False])
def test_same_bytes_as_megatrons_tool(tmp_path: Path, model_file: Path, append_eod: bool) -> None:
    """Megatron's loop with its own builder: documents without a token stay as documents without a sequence."""
    texts: list[str | list[str]] = [*TEXTS, ["Two sentences.", "", "In one document."], [], *TEXTS]
    path = write_json_lines(tmp_path / "in.jsonl", texts)
    report = run(tmp_path / "ours", path, model=model_file, append_eod=append_eod)

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
    counts = report.corpora["text"]
    assert (counts.num_tokens, counts.num_empty, counts.longest_document) == (num_tokens, num_empty, longest)
    assert num_empty == 3


def test_the_result_does_not_depend_on_the_workers(tmp_path: Path, model_file: Path) -> None:
    path = write_json_lines(tmp_path / "in.jsonl", [*TEXTS] * 40)
    reports = [run(tmp_path / str(workers), path, path, model=model_file, workers=workers) for workers in (1, 2)]
    for suffix in ("bin", "idx"):
        one, two = (tmp_path / f"{workers}_text_document.{suffix}" for workers in (1, 2))
        assert one.read_bytes() == two.read_bytes()
    assert reports[0].corpora == reports[1].corpora
    assert reports[0].num_bytes == reports[1].num_bytes == 2 * path.stat().st_size


def test_several_files_and_keys(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"x": "1 2", "y": "3"}\n{"x": "", "y": "4"}\n'))
    (tmp_path / "b.jsonl").write_bytes(b'{"x": "5", "y": "6 7 8"}')
    inputs = (tmp_path / "a.jsonl.gz", tmp_path / "b.jsonl")
    report = run(tmp_path / "out" / "c", *inputs, keys={"json_keys": ("x", "y")})
    x, y = (IndexedCorpus(tmp_path / "out" / f"c_{key}_document") for key in "xy")
    assert [x.get(at).tolist() for at in range(x.num_sequences)] == [[1, 2], [5]]
    assert [y.get(at).tolist() for at in range(y.num_sequences)] == [[3], [4], [6, 7, 8]]
    assert (x.num_documents, y.num_documents) == (3, 3)
    assert [(counts.num_empty, counts.longest_document) for counts in report.corpora.values()] == [(1, 2), (0, 3)]


def test_sidecar(tmp_path: Path, model_file: Path) -> None:
    path = write_json_lines(tmp_path / "in.jsonl", [*TEXTS])
    run(tmp_path / "c", path, model=model_file, append_eod=True, command="the command")
    sidecar, corpus = read_sidecar(tmp_path / "c_text_document"), IndexedCorpus(tmp_path / "c_text_document")
    assert sidecar is not None
    assert sidecar.tokenizer_fingerprint == SentencePieceTokenizer(model_file).fingerprint()
    assert (sidecar.num_documents, sidecar.num_tokens) == (corpus.num_documents, corpus.num_tokens)
    assert (sidecar.vocab_size, sidecar.eod_id, sidecar.command) == (500, 2, "the command")
    assert sidecar.max_token_id == corpus.max_token_id()
    run(tmp_path / "c", path, model=model_file)
    again = read_sidecar(tmp_path / "c_text_document")
    assert again is not None
    assert again.eod_id is None


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65_498, "uint16"), (65_499, "int32")])
def test_dtype_by_the_true_vocabulary(tmp_path: Path, vocab_size: int, dtype: str) -> None:
    """NullTokenizer adds one id, and the border is at 65500."""
    path = write_json_lines(tmp_path / "in.jsonl", ["1 2"])
    run(tmp_path / "c", path, vocab_size=vocab_size)
    assert IndexedCorpus(tmp_path / "c_text_document").dtype.name == dtype


def test_invalid_lines_stop_the_run_and_leave_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(b'{"text": "1"}\n\n{"text": 2}\n{')
    prefix = tmp_path / "out" / "c"
    with pytest.raises(CorpusError, match=r"--input is '.*in.jsonl:3': must be a valid document \(the value"):
        run(prefix, path)
    assert list(prefix.parent.iterdir()) == []


def test_invalid_lines_are_skipped_and_reported(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(b'{"text": "1"}\n{\n[]\n' + b"nonsense\n" * 150 + b'{"text": "2"}')
    report = run(tmp_path / "c", path, on_error="skip")
    assert IndexedCorpus(tmp_path / "c_text_document").num_tokens == 2
    assert (report.num_documents, report.num_invalid, len(report.invalid)) == (2, 152, 100)
    assert [(line.line, line.reason.split(" (")[0]) for line in report.invalid[:2]] == [
        (2, "not JSON"),
        (3, "not a JSON object but list"),
    ]


def test_no_corpus_is_put_in_place_when_one_would_be_empty(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text(json.dumps({"a": "1 2", "b": ""}))
    message = r"--input is .*must have a text with tokens under 'b' \(1 documents were read\)"
    with pytest.raises(CorpusError, match=message):
        run(tmp_path / "out" / "c", path, keys={"json_keys": ("a", "b")})
    assert list((tmp_path / "out").iterdir()) == []


def test_progress(tmp_path: Path, small_chunks: None) -> None:
    path = write_json_lines(tmp_path / "in.jsonl", ["1"] * 600)
    seen: list[float] = []

    def on_progress(report: PreprocessReport) -> None:
        seen.append(report.input_bytes / (report.total_input_bytes or 0))

    report = run(tmp_path / "c", path, on_progress=on_progress)
    assert len(seen) == 14
    assert sorted(set(seen)) == seen
    assert seen[-1] == 1
    assert report.seconds > 0


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 600 bytes, so that small inputs have many."""
    monkeypatch.setattr("megatron_slm.data.preprocessing.inputs._chunk_bytes", lambda *_: 600)


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "jsonl.zst", "parquet", "-"])
def test_every_kind_of_input_gives_the_same_corpus(
    tmp_path: Path, model_file: Path, kind: str, small_chunks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [text for text in TEXTS if "\0" not in text] * 9
    plain = write_json_lines(tmp_path / "in.jsonl", texts)
    run(tmp_path / "expected", plain, model=model_file, append_eod=True)
    path = Path("-") if kind == "-" else tmp_path / f"other.{kind}"
    if kind == "parquet":
        parquet.write_table(pa.table({"text": texts}), path, row_group_size=10)
    elif kind == "-":
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(plain.read_bytes())))
    else:
        compress = {"jsonl": bytes, "jsonl.gz": gzip.compress, "jsonl.zst": zstandard.compress}[kind]
        path.write_bytes(compress(plain.read_bytes()))
    report = run(tmp_path / "c", path, model=model_file, append_eod=True)
    assert same_corpora(tmp_path / "expected_text_document", tmp_path / "c_text_document")
    assert report.num_documents == len(texts)


def same_corpora(one: Path, other: Path) -> bool:
    """By the bytes of both files."""
    return all(Path(f"{one}.{end}").read_bytes() == Path(f"{other}.{end}").read_bytes() for end in ("bin", "idx"))


def test_loss_mask_lies_beside_the_corpus(tmp_path: Path, small_chunks: None) -> None:
    path = tmp_path / "in.jsonl"
    rows = [{"p": f"{at} 1", "r": "2 " * (at % 4)} for at in range(90)] + [{"p": "", "r": ""}]
    path.write_text("\n".join(map(json.dumps, rows)))
    keys = {"prompt_key": "p", "response_key": "r"}
    report = run(tmp_path / "c", path, keys=keys, append_eod=True, prepend_bos=False)
    corpus, mask = IndexedCorpus(tmp_path / "c_sft_document"), IndexedCorpus(tmp_path / "c_sft_document_loss_mask")
    sidecar = read_sidecar(tmp_path / "c_sft_document")
    assert sidecar is not None
    assert sidecar.loss_mask == "c_sft_document_loss_mask"
    assert mask.dtype == np.uint8
    np.testing.assert_array_equal(corpus.sequence_lengths, mask.sequence_lengths)
    np.testing.assert_array_equal(corpus.document_indices, mask.document_indices)
    for at in range(90):
        assert corpus.get(at).tolist() == [at, 1, *[2] * (at % 4), 100]
        assert mask.get(at).tolist() == [0, 0, *[1] * (at % 4), 1]
    assert report.corpora["sft"].num_trained == sum(int(mask.get(at).sum()) for at in range(90))
    assert verify_hashes(tmp_path / "c_sft_document")[-1] == tmp_path / "c_sft_document_loss_mask.idx"


def test_a_mask_of_zeros(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"text": "1 2", "m": 0}')
    with pytest.raises(CorpusError, match="must have a token whose loss mask is 1"):
        run(tmp_path / "out" / "c", tmp_path / "in.jsonl", keys={"loss_mask_key": "m"})


def test_hashes_in_the_sidecar_are_those_of_the_files(tmp_path: Path, model_file: Path) -> None:
    path = write_json_lines(tmp_path / "in.jsonl", [*TEXTS])
    run(tmp_path / "c", path, model=model_file)
    sidecar = read_sidecar(tmp_path / "c_text_document")
    assert sidecar is not None
    for end, recorded in (("bin", sidecar.bin_sha256), ("idx", sidecar.idx_sha256)):
        assert hashlib.sha256((tmp_path / f"c_text_document.{end}").read_bytes()).hexdigest() == recorded


def test_line_numbers_count_across_chunks(tmp_path: Path, small_chunks: None) -> None:
    lines = ['{"text": "1"}'] * 500
    for at in (100, 300, 499):
        lines[at] = "{"
    lines[10] = ""
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    report = run(tmp_path / "c", tmp_path / "in.jsonl", on_error="skip", workers=2)
    assert [entry.line for entry in report.invalid] == [101, 301, 500]
    assert (report.num_documents, report.num_invalid) == (496, 3)
    with pytest.raises(CorpusError, match=r"in.jsonl:101': must be a valid document"):
        run(tmp_path / "d", tmp_path / "in.jsonl", workers=2)


def test_a_stopped_run_is_resumed(tmp_path: Path, small_chunks: None) -> None:
    """Finished shards are reused, and the result is that of an uninterrupted run."""
    path = write_json_lines(tmp_path / "in.jsonl", [str(at % 90) for at in range(600)])
    run(tmp_path / "expected", path, append_eod=True)

    class Killed(BaseException):
        """Simulates the end of the process."""

    def stop_after(count: int):
        calls = iter(range(count))

        def on_progress(_: PreprocessReport) -> None:
            if next(calls, None) is None:
                raise Killed

        return on_progress

    parts = tmp_path / "c.parts"
    with pytest.raises(Killed):
        run(tmp_path / "c", path, append_eod=True, on_progress=stop_after(4))
    assert not (tmp_path / "c_text_document.bin").exists()
    done = sorted(parts.glob("*.json"))
    assert len(done) == 5
    torn = done[0].with_suffix(".0.bin")
    torn.write_bytes(torn.read_bytes()[:-2])  # a damaged shard is made again
    report = run(tmp_path / "c", path, append_eod=True)
    assert 0 < report.num_resumed_bytes <= 4 * 620
    assert same_corpora(tmp_path / "expected_text_document", tmp_path / "c_text_document")
    assert not parts.exists()


def test_shards_of_another_command_or_input_are_ignored(tmp_path: Path, small_chunks: None) -> None:
    path = write_json_lines(tmp_path / "in.jsonl", [str(at % 90) for at in range(100)])
    parts = tmp_path / "c.parts"

    def leave_parts() -> None:
        with pytest.raises(ZeroDivisionError):
            run(tmp_path / "c", path, append_eod=True, on_progress=lambda _: 1 // 0)
        assert list(parts.glob("*.json"))

    leave_parts()
    assert run(tmp_path / "c", path, append_eod=False).num_resumed_bytes == 0
    assert 100 not in IndexedCorpus(tmp_path / "c_text_document").get(0)
    leave_parts()
    write_json_lines(path, [str(at % 80) for at in range(100)])
    assert run(tmp_path / "c", path, append_eod=True).num_resumed_bytes == 0
    leave_parts()
    assert run(tmp_path / "c", path, append_eod=True).num_resumed_bytes > 0


def test_two_processes_do_not_write_to_one_prefix(tmp_path: Path) -> None:
    path = write_json_lines(tmp_path / "in.jsonl", ["1"])
    (tmp_path / "c.parts").mkdir()
    with open(tmp_path / "c.parts" / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match=r"--output-prefix is .*must not be in use by another process"):
            run(tmp_path / "c", path)
    run(tmp_path / "c", path)


def test_tokens_that_the_tokenizer_does_not_have(tmp_path: Path, tokenizer_folder: Path) -> None:
    path = write_json_lines(tmp_path / "in.jsonl", ["1"])
    with pytest.raises(
        ConfigError, match="--prepend-bos is True: must be used with a tokenizer that defines bos_token"
    ):
        run(tmp_path / "c", path, prepend_bos=True)
    shutil.copy(tokenizer_folder / "tokenizer.json", tmp_path)
    bare = HuggingFaceTokenizer(tmp_path / "tokenizer.json")
    with pytest.raises(ConfigError, match="--append-eod is True: must be used with a tokenizer that defines eos_token"):
        preprocess(config(tmp_path / "c", path, append_eod=True), bare)


def test_bos_only_with_its_flag(tmp_path: Path, model_file: Path) -> None:
    path = write_json_lines(tmp_path / "in.jsonl", ["a", "", ["b", "c"]])
    run(tmp_path / "c", path, model=model_file, prepend_bos=True)
    corpus = IndexedCorpus(tmp_path / "c_text_document")
    assert [int(corpus.get(at)[0]) == 1 for at in range(3)] == [True, True, False]
    sidecar = read_sidecar(tmp_path / "c_text_document")
    assert sidecar is not None
    assert (sidecar.bos_id, sidecar.eod_id) == (1, None)


def test_the_output_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    path = write_json_lines(tmp_path / "in.jsonl", ["1"])
    with pytest.raises(CorpusError, match=r"--output-prefix is .*must be writable"):
        run(tmp_path / "file" / "c", path)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"on_error": "ignore"}, "--on-error is 'ignore': must be stop or skip"),
        ({"workers": 0}, "--workers is 0: must be at least 1"),
    ],
)
def test_bad_config(tmp_path: Path, changed: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(tmp_path / "c", tmp_path, **changed)


@pytest.mark.parametrize("workers", [1, 2])
def test_input_that_changes_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int) -> None:
    monkeypatch.setattr("megatron_slm.data.preprocessing.inputs._chunk_bytes", lambda *_: 600)
    path = write_json_lines(tmp_path / "in.jsonl", [str(at % 90) for at in range(1000)])

    def append(report: PreprocessReport) -> None:
        if report.num_documents < 100:
            with path.open("a") as file:
                file.write('{"text": "1"}\n')

    with pytest.raises(CorpusError, match=r"in\.jsonl': must not change while it is read"):
        run(tmp_path / "c", path, workers=workers, on_progress=append)
    assert not list(tmp_path.glob("c_text*"))


@pytest.mark.parametrize("workers", [1, 2])
def test_a_file_that_is_named_twice(tmp_path: Path, workers: int, caplog: pytest.LogCaptureFixture) -> None:
    """Its documents count twice, its lines are numbered from 1 each time, and none count as resumed."""
    path = tmp_path / "in.jsonl"
    path.write_text('{"text": "1"}\nno\n')
    with caplog.at_level("WARNING"):
        report = run(tmp_path / "c", path, path, workers=workers, on_error="skip")
    assert "in.jsonl is named 2 times" in caplog.text
    assert (report.num_documents, [line.line for line in report.invalid]) == (2, [2, 2])
    assert report.num_resumed_bytes == 0


def test_a_disk_that_fills_up_at_the_end_leaves_the_older_corpora(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both keys' corpora are durable before the first is put in place; after that only names change."""
    path = tmp_path / "in.jsonl"
    path.write_text('{"a": "1", "b": "2"}\n')
    real, calls, survived = os.fsync, 0, 100

    def fsync(handle: int) -> None:
        nonlocal calls
        if os.path.isdir(f"/proc/self/fd/{handle}"):
            return
        calls += 1
        if calls > survived:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    run(tmp_path / "c", path, keys={"json_keys": ("a", "b")})
    in_all, before = calls, {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert in_all == 2 * (2 + 3), "of each key a shard's two files, then the corpus's three"
    path.write_text('{"a": "3", "b": "4 5"}\n')
    for survived in range(in_all):
        shutil.rmtree(tmp_path / "c.parts", ignore_errors=True)
        calls = 0
        with pytest.raises(CorpusError, match="No space left on device"):
            run(tmp_path / "c", path, keys={"json_keys": ("a", "b")})
        found = {file.name: file.read_bytes() for file in tmp_path.iterdir() if file.is_file()}
        assert found == {**before, "in.jsonl": path.read_bytes()}, survived
    survived = 100
    run(tmp_path / "c", path, keys={"json_keys": ("a", "b")})
    assert IndexedCorpus(tmp_path / "c_b_document").get(0).tolist() == [4, 5]
    assert len(list(tmp_path.iterdir())) == 1 + 2 * 3
