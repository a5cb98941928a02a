"""The corpus reader: reading, rejection of damaged files, agreement with Megatron's reader and writer."""

from __future__ import annotations

import pickle
import struct
from pathlib import Path

import numpy as np
import pytest

from megatron_slm.data.corpus.indexed import (
    HEADER,
    IndexedCorpus,
    bin_path,
    dtype_for_vocabulary,
    idx_path,
    sidecar_path,
)
from megatron_slm.errors import CorpusError, VocabularyError
from tests.data.corpora import make_corpus

LENGTHS = (5, 0, 3, 7)


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    """A good corpus of 15 tokens in four documents, one of them without a token."""
    make_corpus(tmp_path / "corpus", LENGTHS)
    return tmp_path / "corpus"


def patch(path: Path, offset: int, value: bytes) -> None:
    """Overwrite bytes of a file."""
    content = bytearray(path.read_bytes())
    content[offset : offset + len(value)] = value
    path.write_bytes(content)


def test_reads_what_was_written(prefix: Path) -> None:
    corpus = IndexedCorpus(prefix)
    assert (corpus.num_sequences, corpus.num_documents, corpus.num_tokens) == (4, 4, 15)
    assert corpus.dtype == np.uint16
    assert corpus.sequence_lengths.tolist() == list(LENGTHS)
    assert corpus.sequence_lengths.dtype == np.int32
    assert corpus.sequence_pointers.tolist() == [0, 10, 10, 16]
    assert corpus.document_indices.tolist() == [0, 1, 2, 3, 4]
    assert corpus.get(0).tolist() == [0, 1, 2, 3, 4]
    assert corpus.get(1).tolist() == []
    assert corpus.get(3, offset=2).tolist() == [10, 11, 12, 13, 14]
    assert corpus.get(3, offset=2, length=3).tolist() == [10, 11, 12]
    assert "4 sequences, 15 tokens" in repr(corpus)


def test_tokens_cannot_be_overwritten(prefix: Path) -> None:
    with pytest.raises(ValueError, match="read-only"):
        IndexedCorpus(prefix).get(0)[0] = 1


def test_is_handed_to_another_process_by_its_prefix(prefix: Path) -> None:
    again = pickle.loads(pickle.dumps(IndexedCorpus(prefix)))
    assert again.get(2).tolist() == [5, 6, 7]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((4,), "sequence 4 of .*, which has 4"),
        ((-1,), "sequence -1 of"),
        ((0, 0, 6), r"tokens \[0, 6\) of sequence 0 .* holds 5"),
        ((0, -1, 2), r"tokens \[-1, 1\)"),
        ((0, 6), r"tokens \[6, 5\)"),
    ],
)
def test_get_rejects_tokens_outside_the_sequence(prefix: Path, arguments: tuple[int, ...], message: str) -> None:
    with pytest.raises(IndexError, match=message):
        IndexedCorpus(prefix).get(*arguments)


def test_multimodal_modes_are_tolerated(prefix: Path) -> None:
    idx_path(prefix).write_bytes(idx_path(prefix).read_bytes() + bytes(4))
    assert IndexedCorpus(prefix).num_tokens == 15


@pytest.mark.parametrize(("vocab_size", "name"), [(1, "uint16"), (65499, "uint16"), (65500, "int32")])
def test_dtype_for_vocabulary(vocab_size: int, name: str) -> None:
    assert dtype_for_vocabulary(vocab_size).name == name


@pytest.mark.parametrize("path_of", [idx_path, bin_path])
def test_missing_file(prefix: Path, path_of) -> None:
    path_of(prefix).unlink()
    with pytest.raises(
        CorpusError, match=rf"corpus prefix is .*: must name existing files; {path_of(prefix)} is missing"
    ):
        IndexedCorpus(prefix)


def test_prefix_with_a_suffix(prefix: Path) -> None:
    with pytest.raises(CorpusError, match=f"pass the prefix '{prefix}'"):
        IndexedCorpus(f"{prefix}.bin")


@pytest.mark.parametrize(
    ("offset", "value", "message"),
    [
        (0, b"X", r"corpus.idx: magic is b'XMIDIDX.*must be"),
        (9, struct.pack("<Q", 2), "corpus.idx: version is 2: must be 1"),
        (17, b"\x09", "dtype code is 9: must be one of"),
        (17, b"\x07", "dtype code is 7: must be .*integers"),
        (18, struct.pack("<Q", 3), "corpus.idx: size is .*must be .* bytes for 3 sequences and 4 documents"),
        (34, struct.pack("<i", -1), r"of sequence 0 is \(-1, 0\)"),
        (34, struct.pack("<i", 6), r"of sequence 1 is \(0, 10\)"),
        (50 + 8, struct.pack("<q", 11), r"of sequence 1 is \(0, 11\)"),
        (82, struct.pack("<q", 1), r"document_indices is \(1, 4\): must start at 0 and end at 4"),
        (82 + 32, struct.pack("<q", 5), r"document_indices is \(0, 5\)"),
        (82 + 16, struct.pack("<q", 0), r"document_indices\[2\] is 0: must not decrease"),
    ],
)
def test_damaged_index(prefix: Path, offset: int, value: bytes, message: str) -> None:
    patch(idx_path(prefix), offset, value)
    with pytest.raises(CorpusError, match=message):
        IndexedCorpus(prefix)


@pytest.mark.parametrize("size", [0, 33, 34, 50, -1])
def test_truncated_index(prefix: Path, size: int) -> None:
    idx_path(prefix).write_bytes(idx_path(prefix).read_bytes()[:size])
    with pytest.raises(CorpusError, match=r"corpus\.idx: size is"):
        IndexedCorpus(prefix)


def test_index_without_a_document_boundary(prefix: Path) -> None:
    idx_path(prefix).write_bytes(HEADER.pack(b"MMIDIDX\0\0", 1, 8, 0, 0))
    with pytest.raises(CorpusError, match=r"document_indices is \(\)"):
        IndexedCorpus(prefix)


@pytest.mark.parametrize(("change", "relation"), [(-2, "shorter"), (+2, "longer")])
def test_bin_of_another_size(prefix: Path, change: int, relation: str) -> None:
    content = bin_path(prefix).read_bytes() + b"\0\0"
    bin_path(prefix).write_bytes(content[: 30 + change])
    with pytest.raises(CorpusError, match=rf"corpus.bin: size is .*must be 30 bytes .*it is {relation}"):
        IndexedCorpus(prefix)


def test_corpus_without_a_token(prefix: Path) -> None:
    idx_path(prefix).write_bytes(HEADER.pack(b"MMIDIDX\0\0", 1, 8, 0, 1) + bytes(8))
    bin_path(prefix).write_bytes(b"")
    with pytest.raises(CorpusError, match=r"corpus\.bin: number of tokens is 0: must be at least 1"):
        IndexedCorpus(prefix)


def test_checks_continue_beyond_the_first_block(prefix: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_slm.data.corpus.indexed._SEQUENCES_PER_CHECK", 2)
    assert IndexedCorpus(prefix).num_tokens == 15
    patch(idx_path(prefix), 50 + 24, struct.pack("<q", 18))
    with pytest.raises(CorpusError, match=r"of sequence 3 is \(7, 18\)"):
        IndexedCorpus(prefix)
    make_corpus(prefix, LENGTHS)
    patch(idx_path(prefix), 82 + 24, struct.pack("<q", 1))  # across the border of two blocks
    with pytest.raises(CorpusError, match=r"\[3\] is 1: must not decrease"):
        IndexedCorpus(prefix)


def test_vocabulary_check_names_the_id(prefix: Path) -> None:
    corpus = IndexedCorpus(prefix)
    assert corpus.max_token_id() == 14
    corpus.check_vocabulary(15)
    with pytest.raises(VocabularyError, match=r"corpus.bin: token id is 14: must be in \[0, 14\)"):
        corpus.check_vocabulary(14)


def test_vocabulary_check_finds_negative_ids(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path / "negative", [4], dtype="int32", first_id=-2)
    with pytest.raises(VocabularyError, match="token id is -2: must be in"):
        corpus.check_vocabulary(100)


def test_max_token_id_beyond_the_budget_samples_the_whole_file(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path / "long", [20_000])
    assert corpus.max_token_id(byte_budget=40_000) == 19_999
    assert corpus.max_token_id(byte_budget=1_000) == 19_999, "the last block ends at the last token"
    blocks = list(corpus._scanned_blocks(500))
    assert len(blocks) == 64
    assert blocks[0][0] == 0
    assert {len(block) for block in blocks} == {7}
    middle = [int(block[0]) for block in blocks]
    assert max(np.diff(middle)) < 20_000 / 60, "evenly spaced"


def test_sidecar_path(prefix: Path) -> None:
    assert sidecar_path(prefix) == prefix.with_name("corpus.meta.json")
