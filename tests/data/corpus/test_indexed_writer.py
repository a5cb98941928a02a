"""The corpus writer: Megatron's bytes, and no corpus that reads as whole before it is complete."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_slm.data.corpus.indexed import IndexedCorpus, bin_path, idx_path, sidecar_path
from megatron_slm.data.corpus.indexed_writer import IndexedCorpusWriter
from megatron_slm.errors import CorpusError, VocabularyError
from tests.data.corpora import make_corpus
from tests.data.megatron_oracle import IndexedDataset, IndexedDatasetBuilder

DOCUMENTS = ([[1, 2, 3], [4]], [], [[70, 60, 50]], [[5]])


def write(prefix: Path, dtype: str = "uint16") -> None:
    """The documents above, through our writer."""
    with IndexedCorpusWriter(prefix, dtype) as writer:
        for document in DOCUMENTS:
            writer.add_document(document)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.uint8, np.int64])
def test_same_bytes_as_megatrons_builder(tmp_path: Path, dtype: type) -> None:
    write(tmp_path / "ours", np.dtype(dtype).name)
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=dtype)
    for document in DOCUMENTS:
        ids = [token for sequence in document for token in sequence]
        builder.add_document(np.array(ids, dtype=np.int64), [len(sequence) for sequence in document])
    builder.finalize(str(tmp_path / "theirs.idx"))
    for suffix in ("bin", "idx"):
        assert (tmp_path / f"ours.{suffix}").read_bytes() == (tmp_path / f"theirs.{suffix}").read_bytes()


def test_megatron_reads_ours_and_we_read_megatrons(tmp_path: Path) -> None:
    write(tmp_path / "ours")
    theirs, ours = IndexedDataset(str(tmp_path / "ours")), IndexedCorpus(tmp_path / "ours")
    assert len(theirs) == ours.num_sequences == 4
    for index in range(4):
        np.testing.assert_array_equal(theirs[index], ours.get(index))
    np.testing.assert_array_equal(theirs.get(2, offset=1, length=2), ours.get(2, 1, 2))
    np.testing.assert_array_equal(theirs.document_indices, ours.document_indices)
    assert ours.document_indices.tolist() == [0, 2, 2, 3, 4]


def test_one_array_and_a_flat_list_are_one_sequence(tmp_path: Path) -> None:
    with IndexedCorpusWriter(tmp_path / "c", np.uint16) as writer:
        writer.add_document(np.array([1, 2]))
        writer.add_document([3, 4, 5])
        writer.add_document([np.array([6]), np.array([7, 8])])
        assert (writer.num_documents, writer.num_tokens, writer.longest_document) == (3, 8, 3)
        assert writer.max_token_id == 8
    assert IndexedCorpus(tmp_path / "c").sequence_lengths.tolist() == [2, 3, 1, 2]


@pytest.mark.parametrize(("ids", "value"), [([1, 65_536], 65_536), ([-1, 3], -1)])
def test_ids_that_do_not_fit_the_dtype(tmp_path: Path, ids: list[int], value: int) -> None:
    with (
        pytest.raises(VocabularyError, match=f"token id to write is {value}: must fit uint16"),
        IndexedCorpusWriter(tmp_path / "c", np.uint16) as writer,
    ):
        writer.add_document(ids)
    assert list(tmp_path.iterdir()) == []


def test_dtype_outside_the_format(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="corpus dtype is 'uint32': must be an integer dtype of the format"):
        IndexedCorpusWriter(tmp_path / "c", np.uint32)


def test_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CorpusError, match=r"--output-prefix is .*must be writable \(File exists"):
        IndexedCorpusWriter(tmp_path / "file" / "c", np.uint16)


def test_corpus_without_a_token_is_rejected_and_leaves_nothing(tmp_path: Path) -> None:
    with (
        pytest.raises(CorpusError, match="number of tokens to write is 0: must be at least 1"),
        IndexedCorpusWriter(tmp_path / "c", np.uint16) as writer,
    ):
        writer.add_document([])
    assert list(tmp_path.iterdir()) == []


def test_an_error_leaves_the_older_corpus(tmp_path: Path) -> None:
    write(tmp_path / "c")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ZeroDivisionError), IndexedCorpusWriter(tmp_path / "c", np.uint16) as writer:
        writer.add_document([9, 9, 1 // 0])
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_closing_twice_changes_nothing(tmp_path: Path) -> None:
    writer = IndexedCorpusWriter(tmp_path / "c", np.uint16)
    writer.add_document([1])
    writer.close()
    writer.close()
    assert IndexedCorpus(tmp_path / "c").num_tokens == 1


def test_a_killed_writer_leaves_no_corpus(tmp_path: Path) -> None:
    program = (
        "import os, sys\n"
        "from megatron_slm.data.corpus.indexed_writer import IndexedCorpusWriter\n"
        "writer = IndexedCorpusWriter(sys.argv[1], 'uint16')\n"
        "writer.add_document(list(range(100)))\n"
        "os._exit(9)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path / "c")], env=environment, check=False)
    assert done.returncode == 9
    with pytest.raises(CorpusError, match=r"c\.idx is missing"):
        IndexedCorpus(tmp_path / "c")


class Killed(BaseException):
    """Simulates the end of the process."""


@pytest.mark.parametrize("survived_calls", range(4))
def test_killed_at_any_step_of_the_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, survived_calls: int) -> None:
    """The older corpus or none or the new one, never new tokens under the old index (here of equal size)."""
    make_corpus(tmp_path / "c", [2, 4])
    sidecar_path(tmp_path / "c").write_text("{}")
    writer = IndexedCorpusWriter(tmp_path / "c", np.uint16)
    writer.add_document([9, 9, 9, 9])
    writer.add_document([8, 8])
    calls = 0

    def counted(function):
        def call(*args, **kwargs):
            nonlocal calls
            if calls == survived_calls:
                raise Killed
            calls += 1
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(os, "replace", counted(os.replace))
    monkeypatch.setattr(Path, "unlink", counted(Path.unlink))
    with pytest.raises(Killed):
        writer.close()
    monkeypatch.undo()
    if survived_calls == 0:
        assert IndexedCorpus(tmp_path / "c").get(0).tolist() == [0, 1]
        return
    assert not idx_path(tmp_path / "c").exists()
    with pytest.raises(CorpusError, match=r"c\.idx is missing"):
        IndexedCorpus(tmp_path / "c")
    assert sidecar_path(tmp_path / "c").exists() == (survived_calls < 2)
    assert bin_path(tmp_path / "c").exists()


def test_a_new_corpus_takes_an_older_ones_sidecar_away(tmp_path: Path) -> None:
    sidecar_path(tmp_path / "c").write_text("{}")
    write(tmp_path / "c")
    assert not sidecar_path(tmp_path / "c").exists()
