"""Columns of merged corpora are those of the corpus written at once."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from megatron_slm.cli.merge_corpora import prefixes
from megatron_slm.data.corpus.columns import ColumnWriter, check_columns, open_column, read_column_sidecar
from megatron_slm.data.corpus.indexed import IndexedCorpus, sidecar_path
from megatron_slm.data.corpus.merging import merge_corpora
from megatron_slm.errors import CorpusError
from tests.data.corpora import make_corpus

COLUMNS = {"quality": 0.25, "weight": -1.0}


def corpus_with(prefix: Path, lengths: list[int], columns: dict[str, float], *, first_id: int = 0) -> IndexedCorpus:
    """A corpus whose tokens count up, and columns of each token times a factor."""
    corpus = make_corpus(prefix, lengths, first_id=first_id)
    for name, factor in columns.items():
        with ColumnWriter(prefix, name) as writer:
            for sequence in range(corpus.num_sequences):
                writer.add(corpus.get(sequence) * factor)
    return corpus


def test_columns_are_merged(tmp_path: Path) -> None:
    corpus_with(tmp_path / "a", [3, 0, 5], COLUMNS)
    corpus_with(tmp_path / "b", [4, 1], COLUMNS, first_id=8)
    corpus_with(tmp_path / "whole", [3, 0, 5, 4, 1], COLUMNS)
    merge_corpora([tmp_path / "a", tmp_path / "b"], tmp_path / "c", "")
    merged = IndexedCorpus(tmp_path / "c")
    check_columns(merged, list(COLUMNS))
    for name in COLUMNS:
        open_column(merged, name)
        for suffix in ("bin", "idx", "meta.json"):
            of_both, at_once = tmp_path / f"c_{name}.{suffix}", tmp_path / f"whole_{name}.{suffix}"
            assert of_both.read_bytes() == at_once.read_bytes(), (name, suffix)
    assert read_column_sidecar(merged, "weight").minimum == -12.0


def test_a_folder_of_corpora_has_no_columns_in_it(tmp_path: Path) -> None:
    corpus_with(tmp_path / "a", [3], COLUMNS)
    corpus_with(tmp_path / "a_b", [4], COLUMNS, first_id=3)  # a corpus, not a column of the other
    assert prefixes([str(tmp_path)]) == [str(tmp_path / "a"), str(tmp_path / "a_b")]
    merge_corpora(prefixes([str(tmp_path)]), tmp_path / "out" / "c", "", drop=["weight"])
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {"c.bin", "c.idx", *(f"c_quality.{suffix}" for suffix in ("bin", "idx", "meta.json"))}


def test_columns_that_cannot_be_merged(tmp_path: Path) -> None:
    corpus_with(tmp_path / "a", [3], COLUMNS)
    corpus_with(tmp_path / "b", [4], {"quality": 0.5})
    both = [tmp_path / "a", tmp_path / "b"]
    with pytest.raises(CorpusError, match=r"/b: column weight is 'none': must exist, since .*/a has one"):
        merge_corpora(both, tmp_path / "c", "")
    with pytest.raises(CorpusError, match=r"--drop is 'wait': must be a column .*\(these have: quality, weight\)"):
        merge_corpora(both, tmp_path / "c", "", drop=["wait"])
    with pytest.raises(CorpusError, match="must not be one of the inputs"):
        merge_corpora(both, tmp_path / "a", "", drop=["weight"])
    assert sidecar_path(tmp_path / "a_quality").exists()
    values = json.loads((sidecar := sidecar_path(tmp_path / "b_quality")).read_text())
    sidecar.write_text(json.dumps({**values, "corpus_sha256": "0" * 64}))
    with pytest.raises(CorpusError, match="the column is of another corpus"):
        merge_corpora(both, tmp_path / "c", "", drop=["weight"])
    sidecar.unlink()
    with pytest.raises(CorpusError, match=r"column sidecar is .*b_quality\.meta\.json.*must be complete"):
        merge_corpora(both, tmp_path / "c", "", drop=["weight"])
    assert not list(tmp_path.glob("c.*"))
    assert not list(tmp_path.glob("c_*"))
    merge_corpora(both, tmp_path / "c", "", drop=["weight", "quality"])
    assert np.array_equal(IndexedCorpus(tmp_path / "c").sequence_lengths, [3, 4])
