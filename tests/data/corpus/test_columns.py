"""Columns written with a few lines of Python: read back with the samples, and refused where they do not belong."""

from __future__ import annotations

from pathlib import Path

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from megatron_slm.data.best_fit import BestFitSamples
from megatron_slm.data.corpus.columns import ColumnWriter, check_columns, open_column
from megatron_slm.data.corpus.indexed import IndexedCorpus
from megatron_slm.data.corpus.staging import staged
from megatron_slm.data.loader import MicroBatchSource
from megatron_slm.data.packing import PackedSamples
from megatron_slm.errors import CorpusError
from tests.data.corpora import make_corpus

LENGTHS = [3, 9, 1, 4, 7]


def write(prefix: Path, name: str = "quality", factor: float = 0.25) -> IndexedCorpus:
    """A corpus whose tokens count up, and a column with each token times a factor."""
    corpus = make_corpus(prefix, LENGTHS)
    with ColumnWriter(prefix, name) as writer:
        for sequence in range(corpus.num_sequences):
            writer.add(corpus.get(sequence) * factor)
    return corpus


@pytest.mark.parametrize("kind", [PackedSamples, BestFitSamples])
def test_numbers_come_with_their_labels(kind: type, tmp_path: Path) -> None:
    corpus = write(tmp_path / "c")
    columns = {"quality": open_column(corpus, "quality")}
    samples = kind(corpus, 0, 5, sequence_length=5, num_samples=8, seed=3, columns=columns)
    source = MicroBatchSource(
        samples, micro_batch_size=3, data_parallel_rank=0, data_parallel_size=1, vocab_size=100, pads_at_end=True
    )
    for start in range(0, len(samples), 3):
        batch = source.micro_batch(start, 0)
        real = batch.sample_b < len(samples)
        expected = batch.labels_bs * 0.25 * real[:, None]
        assert np.array_equal(batch.columns["quality"], expected)
    assert PackedSamples(corpus, 0, 5, sequence_length=5, num_samples=8, seed=3)[0].columns == {}


def test_a_column_is_whole_or_absent(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path / "c", LENGTHS)
    with (
        pytest.raises(CorpusError, match=r"sequences is 1: must be those of .*, 5"),
        ColumnWriter(tmp_path / "c", "q") as writer,
    ):
        writer.add([1.0, 2.0, 3.0])
    with pytest.raises(ZeroDivisionError), ColumnWriter(tmp_path / "c", "q") as writer:
        writer.add([1.0 / 0.0])
    with (
        pytest.raises(CorpusError, match=r"sequence 0: shape is \(2,\): must be \(3,\)"),
        ColumnWriter(tmp_path / "c", "q") as writer,
    ):
        writer.add([1.0, 2.0])
    with (
        pytest.raises(CorpusError, match=r"number 1 is inf: must be finite"),
        ColumnWriter(tmp_path / "c", "q") as writer,
    ):
        writer.add([1.0, np.inf, 0.0])
    assert not list(tmp_path.glob("c_q*"))
    with pytest.raises(CorpusError, match=r"column q of .* is '.*c_q\.idx': must be a file"):
        open_column(corpus, "q")


def test_columns_of_other_corpora(tmp_path: Path) -> None:
    write(tmp_path / "c")
    check_columns(IndexedCorpus(tmp_path / "c"), ["quality"])
    corpus = make_corpus(tmp_path / "c", LENGTHS, first_id=1)  # of the same lengths
    open_column(corpus, "quality")
    with pytest.raises(CorpusError, match=r"corpus_sha256 is .*the column is of another corpus"):
        check_columns(corpus, ["quality"])
    with pytest.raises(CorpusError, match=r"must hold one float16 for every token"):
        open_column(make_corpus(tmp_path / "c", [24]), "quality")
    (tmp_path / "c_quality.meta.json").unlink()
    with pytest.raises(CorpusError, match=r"column sidecar is .*must be complete"):
        open_column(corpus, "quality")
    with pytest.raises(CorpusError, match=r"must be a file \(beside the corpus: c_quality\.idx\)"):
        open_column(corpus, "qualty")


def test_columns_of_a_remote_corpus_are_copied(tmp_path: Path) -> None:
    write(tmp_path / "made")
    system = fsspec.filesystem("memory")
    MemoryFileSystem.store.clear()
    for path in tmp_path.glob("made*"):
        system.pipe(f"/bucket/{path.name}", path.read_bytes())
    copy = IndexedCorpus(staged("memory://bucket/made", tmp_path / "cache", ["quality"]))
    open_column(copy, "quality")
    check_columns(copy, ["quality"])
    with pytest.raises(CorpusError, match=r"made_other\.idx does not exist"):
        staged("memory://bucket/made", tmp_path / "cache", ["other"])
