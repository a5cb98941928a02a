"""Tokenizing in chunks: the cutting, the bookkeeping, and worker processes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from megatron_slm.data import encoding as module
from megatron_slm.data.encoding import Encoding, LineChunk, encode_chunk, encode_chunks, line_chunks
from megatron_slm.errors import ConfigError, VocabularyError
from tests.data.texts import write_json_lines


def null_encoding(append_eod: bool = True, **changed: object) -> Encoding:
    """Ids as text, with 100 as the end of a document."""
    values = {
        "keys": ("text",),
        "tokenizer_type": "NullTokenizer",
        "tokenizer_model": None,
        "vocab_size": 100,
        "append_eod": append_eod,
    }
    return Encoding(**{**values, **changed})


def test_chunks_keep_every_line_and_its_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LINES_PER_CHUNK", 3)
    monkeypatch.setattr(module, "_BYTES_PER_CHUNK", 50)
    (tmp_path / "a").write_bytes(b"1\n2\n\n4\n" + b"x" * 60 + b"\n6")
    (tmp_path / "b").write_bytes(b"7\n")
    (tmp_path / "empty").write_bytes(b"")
    chunks = list(line_chunks([tmp_path / "a", tmp_path / "empty", tmp_path / "b"]))
    assert [(chunk.path.name, chunk.first_line, len(chunk.lines)) for chunk in chunks] == [
        ("a", 1, 3),
        ("a", 4, 2),
        ("a", 6, 1),
        ("b", 1, 1),
    ]
    assert [line for chunk in chunks for line in chunk.lines][-2:] == [b"6", b"7"]


def test_one_chunk() -> None:
    lines = [b'{"text": "1 2"}', b"", b"{", b'{"text": ""}', b'{"text": ["3", " ", "4 5"]}', b'{"text": []}']
    encoding = null_encoding()
    result = encode_chunk(LineChunk(Path("f"), 11, lines), encoding, encoding.tokenizer())
    assert result.keys[0].tokens.tolist() == [1, 2, 100, 3, 4, 5, 100]
    assert result.keys[0].sequence_lengths.tolist() == [3, 1, 3]
    assert result.keys[0].sequences_per_document.tolist() == [1, 0, 2, 0]
    assert result.num_documents == 4
    assert [(line.path.name, line.line) for line in result.invalid] == [("f", 13)]
    assert result.num_bytes == sum(map(len, lines)) + 6


def test_a_line_is_left_out_for_all_keys_or_none() -> None:
    lines = [b'{"a": "1", "b": "2"}', b'{"a": "3"}', b'{"a": "5", "b": "6"}']
    encoding = null_encoding(append_eod=False, keys=("b", "a"))
    result = encode_chunk(LineChunk(Path("f"), 1, lines), encoding, encoding.tokenizer())
    assert [key.tokens.tolist() for key in result.keys] == [[2, 6], [1, 5]]
    assert [line.line for line in result.invalid] == [2]


def test_order_and_result_do_not_depend_on_the_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LINES_PER_CHUNK", 4)
    path = write_json_lines(tmp_path / "a.jsonl", [f"{at} {at}" for at in range(90)])
    alone, together = (list(encode_chunks(line_chunks([path]), null_encoding(), workers)) for workers in (1, 2))
    assert len(alone) == len(together) == 23
    for one, other in zip(alone, together, strict=True):
        assert one.keys[0].tokens.tolist() == other.keys[0].tokens.tolist()
    assert alone[0].keys[0].tokens.tolist()[:6] == [0, 0, 100, 1, 1, 100]


def test_few_chunks_are_on_their_way(tmp_path: Path) -> None:
    """The input is not read to its end while the first result waits to be taken."""
    taken = 0

    def chunks():
        nonlocal taken
        for at in range(1000):
            taken = at + 1
            yield LineChunk(Path("f"), at + 1, [b'{"text": "1"}'])

    results = encode_chunks(chunks(), null_encoding(), 2)
    next(results)
    assert taken == 2 * module._CHUNKS_AHEAD_PER_WORKER
    results.close()


def test_errors_of_a_worker_arrive(tmp_path: Path) -> None:
    chunk = LineChunk(Path("f"), 1, [b'{"text": "1000"}'])
    for workers in (1, 2):
        with pytest.raises(VocabularyError, match="text for NullTokenizer = '1000'"):
            list(encode_chunks([chunk], null_encoding(), workers))


class Killer:
    """A line that ends the process that unpickles it."""

    def __reduce__(self):
        return os._exit, (9,)


def test_a_killed_worker_is_no_hang() -> None:
    chunk = LineChunk(Path("f"), 1, [Killer()])
    with pytest.raises(ConfigError, match="workers = 2: a worker process was killed"):
        list(encode_chunks([chunk], null_encoding(), 2))


def test_number_of_workers() -> None:
    with pytest.raises(ConfigError, match="workers = 0: must be at least 1"):
        list(encode_chunks([], null_encoding(), 0))


def test_end_of_document_without_such_a_token(tokenizer_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((tokenizer_folder / "tokenizer.json").read_bytes())
    options = {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": str(tmp_path / "tokenizer.json")}
    assert null_encoding(append_eod=False, **options).tokenizer().vocab_size == 500
    with pytest.raises(ConfigError, match=r"append_eod = True: .*does not say which token ends a document"):
        null_encoding(**options).tokenizer()
