"""Streams of lines: compressed, truncated, and of another format."""

from __future__ import annotations

import gzip
import sys
from pathlib import Path

import pytest
import zstandard

from megatron_slm.data.preprocessing.compressed import read_lines
from megatron_slm.errors import CorpusError

LINES = [b'{"text": "one"}', b"", "Zürich".encode(), b"x" * 300_000, b"last, without a line break"]
PLAIN = b"\r\n".join(LINES[:2]) + b"\n" + b"\n".join(LINES[2:])


def write(path: Path, cut: int = 0) -> Path:
    """The lines above, compressed by the suffix of the path, without the last `cut` bytes."""
    half = len(PLAIN) // 2
    content = {
        ".jsonl": PLAIN,
        ".gz": gzip.compress(PLAIN),
        # two frames, as tools that compress in parallel write them
        ".zst": zstandard.compress(PLAIN[:half]) + zstandard.compress(PLAIN[half:]),
    }[path.suffix]
    path.write_bytes(content[: len(content) - cut])
    return path


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "jsonl.zst"])
def test_lines_of_any_compression(tmp_path: Path, suffix: str) -> None:
    assert list(read_lines(write(tmp_path / f"a.{suffix}"))) == LINES


@pytest.mark.parametrize("suffix", ["jsonl.gz", "jsonl.zst"])
def test_a_truncated_file(tmp_path: Path, suffix: str) -> None:
    with pytest.raises(CorpusError, match=r"--input is .*must be readable to its end \(EOFError"):
        list(read_lines(write(tmp_path / f"a.{suffix}", cut=5)))


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_a_file_of_another_kind(tmp_path: Path, suffix: str) -> None:
    (tmp_path / f"a.{suffix}").write_bytes(PLAIN)
    with pytest.raises(CorpusError, match=r"--input is .*must be readable to its end"):
        list(read_lines(tmp_path / f"a.{suffix}"))


def test_without_zstandard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a.zst")
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(CorpusError, match="must be read with the package zstandard"):
        list(read_lines(tmp_path / "a.zst"))
