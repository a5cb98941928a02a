from __future__ import annotations

from pathlib import Path

import pytest

from megatron_slm.data.corpus import content
from megatron_slm.data.corpus.content import content_sha256
from megatron_slm.data.corpus.indexed import IndexedCorpus
from tests.support.runs import write_corpus


def checksum(prefix: Path) -> str:
    return content_sha256(IndexedCorpus(prefix))


def test_every_byte_of_a_small_corpus_counts(tmp_path: Path) -> None:
    prefix = write_corpus(tmp_path / "corpus", num_documents=4)
    tokens = Path(f"{prefix}.bin").read_bytes()
    assert len(tokens) > 100
    seen = {checksum(prefix)}
    for at in range(len(tokens)):
        Path(f"{prefix}.bin").write_bytes(tokens[:at] + bytes([tokens[at] ^ 1]) + tokens[at + 1 :])
        seen.add(checksum(prefix))
    assert len(seen) == len(tokens) + 1
    Path(f"{prefix}.bin").write_bytes(tokens)
    assert checksum(prefix) == checksum(write_corpus(tmp_path / "again", num_documents=4)), "the path does not count"


def test_a_large_corpus_is_read_in_blocks_from_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prefix = write_corpus(tmp_path / "corpus")
    path = Path(f"{prefix}.bin")
    tokens = path.read_bytes()
    monkeypatch.setattr(content, "WHOLE_UP_TO_BYTES", 32)
    monkeypatch.setattr(content, "_BLOCK_BYTES", 8)
    before, noticed = checksum(prefix), []
    for at in range(0, len(tokens), 2):
        path.write_bytes(tokens[:at] + bytes([tokens[at] ^ 1]) + tokens[at + 1 :])
        if checksum(prefix) != before:
            noticed.append(at)
    assert len(noticed) == 4 * 8 / 2
    assert noticed[0] == 0
    assert noticed[-1] == len(tokens) - 2


def test_the_same_bytes_as_other_token_ids_are_another_corpus(tmp_path: Path) -> None:
    import numpy as np

    from megatron_slm.data.corpus.indexed_writer import IndexedCorpusWriter

    checksums = []
    for dtype, tokens in ((np.uint16, [1, 0, 2, 0]), (np.int32, [1, 2])):
        with IndexedCorpusWriter(tmp_path / "corpus", dtype) as writer:
            writer.add_document(np.array(tokens))
        assert (tmp_path / "corpus.bin").read_bytes() == bytes([1, 0, 0, 0, 2, 0, 0, 0])
        checksums.append(checksum(tmp_path / "corpus"))
    assert checksums[0] != checksums[1]
