"""Merged corpora have the bytes of a corpus written at once, also to megatron-core's reader."""

from __future__ import annotations

import hashlib
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

from megatron_slm.data.corpus.indexed import CorpusIndex, IndexedCorpus, sidecar_path
from megatron_slm.data.corpus.indexed_writer import IndexedCorpusWriter
from megatron_slm.data.corpus.joined_corpus import JoinedCorpus
from megatron_slm.data.corpus.merging import concatenate, merge_corpora
from megatron_slm.data.corpus.sidecar import Sidecar, read_sidecar, verify_hashes
from megatron_slm.errors import CorpusError, VocabularyError
from tests.data.corpora import make_corpus, write_sidecar
from tests.data.megatron_oracle import IndexedDataset, IndexedDatasetBuilder


def random_documents(draw: np.random.Generator) -> list[list[np.ndarray]]:
    """Documents of 0 to 3 sequences of 0 to 9 tokens."""
    return [
        [draw.integers(0, 60_000, draw.integers(0, 10)) for _ in range(draw.integers(0, 4))]
        for _ in range(draw.integers(0, 6))
    ]


def write(prefix: Path, documents: list[list[np.ndarray]], dtype: type) -> None:
    """Document by document; possibly empty."""
    with IndexedCorpusWriter(prefix, dtype, may_be_empty=True) as writer:
        for document in documents:
            writer.add_document(document)


@pytest.mark.parametrize("first_seed", range(0, 1000, 250))
def test_1000_random_corpora(tmp_path: Path, first_seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut into parts, merged, and compared with megatron-core's builder and reader, byte by byte."""
    monkeypatch.setattr(os, "fsync", lambda _: None)  # thousands of them: for speed
    for seed in range(first_seed, first_seed + 250):
        draw = np.random.default_rng(seed)
        dtype = [np.uint16, np.int32][seed % 2]
        parts = [random_documents(draw) for _ in range(draw.integers(1, 5))]
        parts[0].append([np.array([1, 2, seed])])
        prefixes = [tmp_path / f"part{at}" for at in range(len(parts))]
        for prefix, documents in zip(prefixes, parts, strict=True):
            write(prefix, documents, dtype)
        merged = concatenate(prefixes, tmp_path / "ours")
        builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=dtype)
        everything = [document for documents in parts for document in documents]
        for document in everything:
            ids = np.concatenate([np.empty(0, np.int64), *document])
            builder.add_document(ids, [len(sequence) for sequence in document])
        builder.finalize(str(tmp_path / "theirs.idx"))
        hashes = []
        for suffix in ("bin", "idx"):
            ours = (tmp_path / f"ours.{suffix}").read_bytes()
            assert ours == (tmp_path / f"theirs.{suffix}").read_bytes(), seed
            hashes.append(hashlib.sha256(ours).hexdigest())
        assert [merged.bin_sha256, merged.idx_sha256] == hashes
        reader = IndexedDataset(str(tmp_path / "ours"))
        sequences = [sequence for document in everything for sequence in document]
        assert len(reader) == len(sequences)
        for at, sequence in enumerate(sequences):
            np.testing.assert_array_equal(reader[at], sequence)
        assert merged.num_tokens == sum(map(len, sequences))
        assert merged.num_documents == len(everything)


def test_blocks_are_smaller_than_the_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_slm.data.corpus.joined_corpus._BLOCK_BYTES", 7)
    monkeypatch.setattr("megatron_slm.data.corpus.joined_corpus._ENTRIES_PER_BLOCK", 2)
    for name, lengths, first in (
        ("a", [3, 0, 5, 2, 1], 0),
        ("b", [4, 4, 1], 11),
        ("both", [3, 0, 5, 2, 1, 4, 4, 1], 0),
    ):
        make_corpus(tmp_path / name, lengths, first_id=first)
    concatenate([tmp_path / "a", tmp_path / "b"], tmp_path / "c")
    for suffix in ("bin", "idx"):
        assert (tmp_path / f"c.{suffix}").read_bytes() == (tmp_path / f"both.{suffix}").read_bytes()


def test_corpora_that_cannot_be_merged(tmp_path: Path) -> None:
    make_corpus(tmp_path / "a", [3])
    make_corpus(tmp_path / "b", [3], dtype="int32")
    with pytest.raises(CorpusError, match=r"/b: token dtype is 'int32': must be uint16"):
        concatenate([tmp_path / "a", tmp_path / "b"], tmp_path / "c")
    with pytest.raises(CorpusError, match="must not be one of the inputs"):
        concatenate([tmp_path / "a"], tmp_path / "a")
    with pytest.raises(CorpusError, match="--input is missing: required by merging"):
        concatenate([], tmp_path / "c")
    (tmp_path / "a.bin").write_bytes(b"\0" * 5)
    with pytest.raises(CorpusError, match=r"a\.bin: size is 5"):
        concatenate([tmp_path / "a"], tmp_path / "c")
    assert {path.name for path in tmp_path.iterdir()} == {"a.bin", "a.idx", "b.bin", "b.idx"}


def sidecar(**changed) -> Sidecar:
    """Of a corpus of three tokens."""
    values = {
        "tokenizer_fingerprint": "ab",
        "vocab_size": 100,
        "num_documents": 1,
        "num_tokens": 3,
        "max_token_id": 7,
        "eod_id": 2,
        "command": "made",
        "num_empty": 0,
        "num_invalid": 1,
        "longest_document": 3,
    }
    return Sidecar(**{**values, **changed})


def test_sidecars_and_masks_are_merged(tmp_path: Path) -> None:
    for name, length, largest in (("a", 3, 7), ("b", 5, 9)):
        make_corpus(tmp_path / name, [length])
        make_corpus(tmp_path / f"{name}_loss_mask", [length], dtype="uint8", vocab_size=2)
        write_sidecar(
            tmp_path / name,
            sidecar(num_tokens=length, longest_document=length, max_token_id=largest, loss_mask=f"{name}_loss_mask"),
        )
    merge_corpora([tmp_path / "a", tmp_path / "b"], tmp_path / "c", "the command")
    found = read_sidecar(tmp_path / "c")
    assert found is not None
    assert (found.num_documents, found.num_tokens, found.max_token_id, found.longest_document) == (2, 8, 9, 5)
    assert (found.num_invalid, found.num_empty, found.command, found.loss_mask) == (2, 0, "the command", "c_loss_mask")
    assert len(verify_hashes(tmp_path / "c")) == 4
    np.testing.assert_array_equal(
        IndexedCorpus(tmp_path / "c").sequence_lengths, IndexedCorpus(tmp_path / "c_loss_mask").sequence_lengths
    )


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        (
            {"tokenizer_fingerprint": "cd"},
            VocabularyError,
            r"/b: tokenizer is 'cd': must have the token table of .*/a \(ab\)",
        ),
        ({"eod_id": None}, VocabularyError, r"/b: \(BOS, EOD\) ids is \(None, None\): must be those of"),
        ({"num_tokens": 4}, CorpusError, r"b\.meta\.json: num_tokens is 4: must be 3"),
        ({"loss_mask": "b_loss_mask"}, CorpusError, r"/a: loss mask is 'none': must exist, since .*/b has one"),
    ],
)
def test_corpora_that_do_not_go_together(tmp_path: Path, changed: dict, error: type, message: str) -> None:
    make_corpus(tmp_path / "a", [3])
    make_corpus(tmp_path / "b", [3])
    write_sidecar(tmp_path / "a", sidecar())
    write_sidecar(tmp_path / "b", sidecar(**changed))
    with pytest.raises(error, match=message):
        merge_corpora([tmp_path / "a", tmp_path / "b"], tmp_path / "c", "")
    assert not (tmp_path / "c.idx").exists()


def test_a_corpus_of_megatron_among_them(tmp_path: Path) -> None:
    make_corpus(tmp_path / "a", [3])
    make_corpus(tmp_path / "b", [3])
    write_sidecar(tmp_path / "a", sidecar())
    warnings: list[str] = []
    merge_corpora([tmp_path / "a", tmp_path / "b"], tmp_path / "c", "", warnings.append)
    assert "b has no .meta.json" in warnings[0]
    assert not sidecar_path(tmp_path / "c").exists()
    assert IndexedCorpus(tmp_path / "c").num_tokens == 6


def test_members_are_not_kept_open(tmp_path: Path) -> None:
    """They can outnumber the files that a process may open."""
    for at in range(20):
        make_corpus(tmp_path / f"part{at}", [3, 2])
    with JoinedCorpus(tmp_path / "whole") as joined:
        before = len(os.listdir("/proc/self/fd"))
        for at in range(20):
            joined.add(CorpusIndex(tmp_path / f"part{at}"))
        assert len(os.listdir("/proc/self/fd")) == before
        assert joined.finish().num_tokens == 100


def test_a_disk_that_fills_up_leaves_nothing(tmp_path: Path) -> None:
    """Closing the file fails too: it flushes the buffer."""
    make_corpus(tmp_path / "part", [3, 2])
    with JoinedCorpus(tmp_path / "whole") as joined:
        joined._bin.close()
        joined._bin = open("/dev/full", "wb")
        joined.add(CorpusIndex(tmp_path / "part"))
        with pytest.raises(CorpusError, match=r"must be writable \(No space left on device\)"):
            joined.finish()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["part.bin", "part.idx"]


def test_orphaned_temporary_files_are_removed(tmp_path: Path) -> None:
    """Only those of the same corpus and its mask, and none of a live process."""
    make_corpus(tmp_path / "a", [3])
    ended = subprocess.Popen(["true"])
    ended.wait()
    dead, alive = ended.pid, os.getppid()
    gone = [f"c[1].{end}.part-{dead}" for end in ("bin", "idx", "meta.json")] + [f"c[1]_loss_mask.bin.part-{dead}"]
    kept = [f"c[1].bin.part-{alive}", f"c1.bin.part-{dead}", f"c[1]_2.bin.part-{dead}", f"c[1].bin.part-x{dead}"]
    kept += [f"c[1].bin.part-{10**30}", f"c[1].txt.part-{dead}"]
    for name in (*gone, *kept):
        (tmp_path / name).touch()
    concatenate([tmp_path / "a"], tmp_path / "c[1]")
    found = {path.name for path in tmp_path.iterdir()}
    assert found == {"a.bin", "a.idx", "c[1].bin", "c[1].idx", *kept}
