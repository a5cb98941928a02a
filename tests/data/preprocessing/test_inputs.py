"""Chunks of the input: no line lost or repeated, for any chunk size and kind of file."""

from __future__ import annotations

import gzip
import io
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pytest
import zstandard
from pyarrow import parquet

from megatron_slm.data.preprocessing import inputs as module
from megatron_slm.data.preprocessing.inputs import ByteRange, Inputs, RowGroups, StreamedLines, WholeFile, expand_inputs
from megatron_slm.errors import CorpusError

ROWS = [{"text": f"{at} " + "x" * (at * 37 % 90), "other": at} for at in range(200)]
PLAIN = b"".join(json.dumps(row).encode() + (b"\r\n" if at % 3 else b"\n\n") for at, row in enumerate(ROWS))


def texts(chunks, columns=("text",)) -> list[str]:
    """All texts, read chunk by chunk as workers do."""
    return [line.document["text"] for chunk in chunks for line in chunk.lines(columns) if line.document is not None]


def test_patterns_give_files_sorted_and_order_is_kept(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl", "c.txt", "odd[1].jsonl"):
        (tmp_path / name).write_text("")
    (tmp_path / "folder.jsonl").mkdir()
    names = [path.name for path in expand_inputs([tmp_path / "c.txt", f"{tmp_path}/[ab].jsonl"])]
    assert names == ["c.txt", "a.jsonl", "b.jsonl"]
    assert expand_inputs([tmp_path / "odd[1].jsonl"]) == [tmp_path / "odd[1].jsonl"]


@pytest.mark.parametrize("name", ["missing.jsonl", "*.nothing", "."])
def test_no_such_file(tmp_path: Path, name: str) -> None:
    with pytest.raises(CorpusError, match=r"--input is .*must be a file, or a pattern that matches files"):
        expand_inputs([f"{tmp_path}/{name}"])


@pytest.mark.parametrize("chunk_bytes", [1, 2, 7, 64, 100, 1000, 10**6])
def test_byte_ranges_take_every_line_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk_bytes: int) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(PLAIN[:-2] if chunk_bytes % 2 else PLAIN)  # without a last line break, too
    monkeypatch.setattr(module, "_chunk_bytes", lambda *_: chunk_bytes)
    chunks = list(Inputs([str(path), str(path)]).chunks(2))
    assert all(isinstance(chunk, ByteRange) for chunk in chunks)
    assert texts(chunks) == [row["text"] for row in ROWS] * 2
    assert sum(chunk.input_bytes for chunk in chunks) == 2 * path.stat().st_size
    assert sum(line.num_bytes for chunk in chunks for line in chunk.lines(())) == 2 * path.stat().st_size
    numbers = [[line.number for line in chunk.lines(())] for chunk in chunks]
    assert all(found == list(range(len(found))) for found in numbers)


@pytest.mark.parametrize("compress", [gzip.compress, zstandard.compress])
def test_compressed_files_are_read_whole_or_streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compress) -> None:
    monkeypatch.setattr(module, "STREAM_CHUNK_BYTES", 1000)
    suffix = ".gz" if compress is gzip.compress else ".zst"
    paths = [tmp_path / f"{name}.jsonl{suffix}" for name in "abcd"]
    for path in paths:
        path.write_bytes(compress(PLAIN))
    whole, streamed = (list(Inputs([str(path) for path in paths]).chunks(workers)) for workers in (2, 3))
    assert {type(chunk) for chunk in whole} == {WholeFile}
    assert {type(chunk) for chunk in streamed} == {StreamedLines}
    assert len(streamed) > 40
    assert texts(whole) == texts(streamed) == [row["text"] for row in ROWS] * 4
    for chunks in (whole, streamed):
        assert sum(chunk.input_bytes for chunk in chunks) == sum(path.stat().st_size for path in paths)


def test_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STREAM_CHUNK_BYTES", 1000)
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(PLAIN)))
    inputs = Inputs(["-"])
    assert inputs.total_bytes is None
    assert texts(inputs.chunks(2)) == [row["text"] for row in ROWS]
    with pytest.raises(CorpusError, match="--input is '-': must be the only input"):
        Inputs(["-", "a"])


@pytest.mark.parametrize("chunk_bytes", [1, 5000, 10**6])
def test_parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk_bytes: int) -> None:
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=30)
    monkeypatch.setattr(module, "_chunk_bytes", lambda *_: chunk_bytes)
    chunks = list(Inputs([str(path)]).chunks(2))
    assert all(isinstance(chunk, RowGroups) for chunk in chunks)
    assert len(chunks) == (7 if chunk_bytes == 1 else 1 if chunk_bytes == 10**6 else len(chunks))
    assert texts(chunks) == [row["text"] for row in ROWS]
    assert set(next(chunks[0].lines(("text",))).document or ()) == {"text"}, "only the columns that are needed"
    assert (next(chunks[0].lines(("missing",))).document or {}) == {}


def test_a_file_that_is_not_parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(PLAIN)
    with pytest.raises(CorpusError, match="must be a Parquet file"):
        list(Inputs([str(path)]).chunks(1))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(CorpusError, match="must be read with the package pyarrow"):
        list(Inputs([str(path)]).chunks(1))


def test_identities_tell_contents_apart(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(PLAIN)
    first, again = (next(Inputs([str(path)]).chunks(1)).identity() for _ in range(2))
    assert first == again
    os.utime(path, ns=(1, 1))
    assert next(Inputs([str(path)]).chunks(1)).identity() != first
    assert StreamedLines("-", 1, b"a").identity() != StreamedLines("-", 1, b"b").identity()


def test_chunk_sizes() -> None:
    mib = 1 << 20
    sizes = [module._chunk_bytes(size, size, 1) for size in (0, mib, 100 * mib, 10**13)]
    assert sizes == [mib, mib, 2 * mib, 64 * mib]


@pytest.mark.parametrize("workers", [2, 3, 16])
def test_the_last_chunks_are_smaller_so_that_workers_end_together(tmp_path: Path, workers: int) -> None:
    """Of several workers, as long as there is more left than each of them could take at once."""
    mib = 2**20
    for name, size in (("a", 70 * mib), ("b", 58 * mib + 1)):
        with (tmp_path / name).open("wb") as file:
            file.truncate(size)
    inputs = Inputs([str(tmp_path / "*")])
    chunks = [chunk for chunk in inputs.chunks(workers) if isinstance(chunk, ByteRange)]
    left = 128 * mib + 1
    for chunk in chunks:
        size = chunk.stop - chunk.start
        assert size <= max(left // (2 * workers), mib // 4)
        assert chunk.start % (1 << (size.bit_length() - 1)) == 0, "aligned, so that other cuts share it"
        left -= size
    assert left == 0
    assert chunks[0].stop == 2 * mib, "as one worker's"
    assert len(chunks) < 64 + 24 * workers


@pytest.mark.parametrize("name", ["a.jsonl.bz2", "a.jsonl.XZ", "a.tgz", "a.jsonl.GZ", "a.Parquet"])
def test_files_of_other_kinds_are_rejected(tmp_path: Path, name: str) -> None:
    """Not read as text, line by line, each of which would be invalid."""
    (tmp_path / name).write_text('{"text": "1"}\n')
    with pytest.raises(
        CorpusError, match=r"must be JSON lines, or end in one of \.gz, \.zst, \.parquet \(in lower case\)"
    ):
        Inputs([str(tmp_path / "a*")])
