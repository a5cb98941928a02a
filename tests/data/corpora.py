"""Small corpora for the tests of this folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megatron_slm.data.corpus.indexed import IndexedCorpus, sidecar_path
from megatron_slm.data.corpus.indexed_writer import IndexedCorpusWriter
from megatron_slm.data.corpus.sidecar import Sidecar, sidecar_text


def make_corpus(
    prefix: Path,
    lengths: Sequence[int],
    *,
    dtype: str = "uint16",
    first_id: int = 0,
    vocab_size: int = 50_000,
) -> IndexedCorpus:
    """Write a corpus of one sequence per document, of these lengths; the token ids count up from `first_id`."""
    ids = np.fmod(np.arange(sum(lengths)) + first_id, vocab_size)
    with IndexedCorpusWriter(prefix, dtype) as writer:
        for document in np.split(ids, np.cumsum(lengths)[:-1]):
            writer.add_document(document)
    return IndexedCorpus(prefix)


def write_sidecar(prefix: str | Path, sidecar: Sidecar) -> None:
    """Write a sidecar beside a corpus."""
    sidecar_path(prefix).write_text(sidecar_text(sidecar), encoding="utf-8")
