"""The input cut into pieces: nothing lost, nothing twice, whatever the cut and the kind of file."""

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


def texts(pieces, columns=("text",)) -> list[str]:
    """All texts, read piece by piece as workers do."""
    return [line.document["text"] for piece in pieces for line in piece.lines(columns) if line.document is not None]


def test_patterns_give_files_sorted_and_order_is_kept(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl", "c.txt", "odd[1].jsonl"):
        (tmp_path / name).write_text("")
    (tmp_path / "folder.jsonl").mkdir()
    names = [path.name for path in expand_inputs([tmp_path / "c.txt", f"{tmp_path}/[ab].jsonl"])]
    assert names == ["c.txt", "a.jsonl", "b.jsonl"]
    assert expand_inputs([tmp_path / "odd[1].jsonl"]) == [tmp_path / "odd[1].jsonl"]


@pytest.mark.parametrize("name", ["missing.jsonl", "*.nothing", "."])
def test_no_such_file(tmp_path: Path, name: str) -> None:
    with pytest.raises(CorpusError, match=r"input = .*must be a file, or a pattern that matches some"):
        expand_inputs([f"{tmp_path}/{name}"])


@pytest.mark.parametrize("piece_bytes", [1, 2, 7, 64, 100, 1000, 10**6])
def test_byte_ranges_take_every_line_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece_bytes: int) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(PLAIN[:-2] if piece_bytes % 2 else PLAIN)  # without a last line break, too
    monkeypatch.setattr(module, "_piece_bytes", lambda *_: piece_bytes)
    pieces = list(Inputs([str(path), str(path)]).pieces(2))
    assert all(isinstance(piece, ByteRange) for piece in pieces)
    assert texts(pieces) == [row["text"] for row in ROWS] * 2
    assert sum(piece.input_bytes for piece in pieces) == 2 * path.stat().st_size
    assert sum(line.num_bytes for piece in pieces for line in piece.lines(())) == 2 * path.stat().st_size
    numbers = [[line.number for line in piece.lines(())] for piece in pieces]
    assert all(found == list(range(len(found))) for found in numbers)


@pytest.mark.parametrize("compress", [gzip.compress, zstandard.compress])
def test_compressed_files_are_read_whole_or_streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compress) -> None:
    monkeypatch.setattr(module, "STREAM_PIECE_BYTES", 1000)
    suffix = ".gz" if compress is gzip.compress else ".zst"
    paths = [tmp_path / f"{name}.jsonl{suffix}" for name in "abcd"]
    for path in paths:
        path.write_bytes(compress(PLAIN))
    whole, streamed = (list(Inputs([str(path) for path in paths]).pieces(workers)) for workers in (2, 3))
    assert {type(piece) for piece in whole} == {WholeFile}
    assert {type(piece) for piece in streamed} == {StreamedLines}
    assert len(streamed) > 40
    assert texts(whole) == texts(streamed) == [row["text"] for row in ROWS] * 4
    for pieces in (whole, streamed):
        assert sum(piece.input_bytes for piece in pieces) == sum(path.stat().st_size for path in paths)


def test_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STREAM_PIECE_BYTES", 1000)
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(PLAIN)))
    inputs = Inputs(["-"])
    assert inputs.total_bytes is None
    assert texts(inputs.pieces(2)) == [row["text"] for row in ROWS]
    with pytest.raises(CorpusError, match="input = '-': must be the only input"):
        Inputs(["-", "a"])


@pytest.mark.parametrize("piece_bytes", [1, 5000, 10**6])
def test_parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece_bytes: int) -> None:
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=30)
    monkeypatch.setattr(module, "_piece_bytes", lambda *_: piece_bytes)
    pieces = list(Inputs([str(path)]).pieces(2))
    assert all(isinstance(piece, RowGroups) for piece in pieces)
    assert len(pieces) == (7 if piece_bytes == 1 else 1 if piece_bytes == 10**6 else len(pieces))
    assert texts(pieces) == [row["text"] for row in ROWS]
    assert set(next(pieces[0].lines(("text",))).document or ()) == {"text"}, "only the columns that are needed"
    assert (next(pieces[0].lines(("missing",))).document or {}) == {}


def test_parquet_that_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(PLAIN)
    with pytest.raises(CorpusError, match="must be a Parquet file"):
        list(Inputs([str(path)]).pieces(1))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(CorpusError, match="needs the package pyarrow"):
        list(Inputs([str(path)]).pieces(1))


def test_identities_tell_contents_apart(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(PLAIN)
    first, again = (next(Inputs([str(path)]).pieces(1)).identity() for _ in range(2))
    assert first == again
    os.utime(path, ns=(1, 1))
    assert next(Inputs([str(path)]).pieces(1)).identity() != first
    assert StreamedLines("-", 1, b"a").identity() != StreamedLines("-", 1, b"b").identity()


def test_piece_sizes() -> None:
    mib = 1 << 20
    sizes = [module._piece_bytes(size, size, 1) for size in (0, mib, 100 * mib, 10**13)]
    assert sizes == [mib, mib, 2 * mib, 64 * mib]


@pytest.mark.parametrize("workers", [2, 3, 16])
def test_the_last_pieces_are_smaller_so_that_workers_end_together(tmp_path: Path, workers: int) -> None:
    """Of several workers, as long as there is more left than each of them could take at once."""
    mib = 2**20
    for name, size in (("a", 70 * mib), ("b", 58 * mib + 1)):
        with (tmp_path / name).open("wb") as file:
            file.truncate(size)
    inputs = Inputs([str(tmp_path / "*")])
    pieces = [piece for piece in inputs.pieces(workers) if isinstance(piece, ByteRange)]
    left = 128 * mib + 1
    for piece in pieces:
        size = piece.stop - piece.start
        assert size <= max(left // (2 * workers), mib // 4)
        assert piece.start % (1 << (size.bit_length() - 1)) == 0, "aligned, so that other cuts share it"
        left -= size
    assert left == 0
    assert pieces[0].stop == 2 * mib, "as one worker's"
    assert len(pieces) < 64 + 24 * workers


@pytest.mark.parametrize("name", ["a.jsonl.bz2", "a.jsonl.XZ", "a.tgz", "a.jsonl.GZ", "a.Parquet"])
def test_files_of_other_kinds_are_refused(tmp_path: Path, name: str) -> None:
    """Not read as text, line by line, each of which would be invalid."""
    (tmp_path / name).write_text('{"text": "1"}\n')
    with pytest.raises(
        CorpusError, match=r"must be JSON lines, or end in one of \.gz, \.zst, \.parquet \(in lower case\)"
    ):
        Inputs([str(tmp_path / "a*")])
