"""Reading JSON lines: compressions, damaged files, and every way a line is no document."""

from __future__ import annotations

import gzip
import sys
from pathlib import Path

import pytest
import zstandard

from megatron_slm.data.documents import InvalidLineError, expand_inputs, read_lines, texts_of_line
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
def test_a_file_that_was_cut_off(tmp_path: Path, suffix: str) -> None:
    with pytest.raises(CorpusError, match=r"input = .*cannot be read to its end \(EOFError"):
        list(read_lines(write(tmp_path / f"a.{suffix}", cut=5)))


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_a_file_of_another_kind(tmp_path: Path, suffix: str) -> None:
    (tmp_path / f"a.{suffix}").write_bytes(PLAIN)
    with pytest.raises(CorpusError, match=r"input = .*cannot be read to its end"):
        list(read_lines(tmp_path / f"a.{suffix}"))


def test_without_zstandard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a.zst")
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(CorpusError, match="needs the package zstandard"):
        list(read_lines(tmp_path / "a.zst"))


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


def test_texts_of_a_line() -> None:
    line = '{"text": "Zürich \\ud83d\\ude42", "title": ["a", "b"], "id": 3}'.encode()
    assert texts_of_line(line, ["text", "title"]) == [["Zürich 🙂"], ["a", "b"]]
    assert texts_of_line(b"\xef\xbb\xbf" + line, ["text"]) == [["Zürich 🙂"]], "a byte order mark is no fault"
    assert texts_of_line(b'{"text": []}', ["text"]) == [[]]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "a', r"not JSON \(Unterminated string"),
        (b"[" * 100_000, r"not JSON \("),
        (b'["text"]', "not a JSON object but a list"),
        (b'{"body": "a", "id": 1}', r"no key 'text' \(it has 'body', 'id'\)"),
        (b"{}", r"no key 'text' \(it has none\)"),
        (b'{"text": null}', "the value of 'text' is not a text but a NoneType"),
        (b'{"text": ["a", 1]}', "the value of 'text' is not a text but a int"),
        (b'{"text": "\\ud800"}', "the value of 'text' holds half of a surrogate pair"),
        (b'{"text": "\xff"}', r"not UTF-8 \(invalid start byte at byte 10\)"),
    ],
)
def test_lines_that_are_no_document(line: bytes, reason: str) -> None:
    with pytest.raises(InvalidLineError, match=reason):
        texts_of_line(line, ["text"])
