"""Damaged corpora: every truncation is rejected on opening, every flipped bit on opening or by the hashes."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest

from megatron_slm.data.corpus.indexed import HEADER, IndexedCorpus
from megatron_slm.data.corpus.sidecar import read_sidecar, sidecar_path, verify_hashes
from megatron_slm.data.preprocessing.preprocess import PreprocessConfig, preprocess
from megatron_slm.data.tokenizers.registry import NullTokenizer
from megatron_slm.errors import CorpusError
from tests.data.corpora import make_corpus, write_sidecar
from tests.data.texts import write_json_lines


@pytest.fixture
def prefix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small corpus with documents of no, one and two sequences, and its hashes."""
    monkeypatch.setattr(os, "fsync", lambda _: None)
    source = write_json_lines(tmp_path / "in.jsonl", ["1 2 3", "", ["4 5", "6"], "7"])
    preprocess(PreprocessConfig(input=(str(source),), output_prefix=str(tmp_path / "c")), NullTokenizer(100))
    return tmp_path / "c_text_document"


@pytest.mark.parametrize("suffix", ["bin", "idx"])
def test_every_flipped_bit(prefix: Path, suffix: str) -> None:
    path = Path(f"{prefix}.{suffix}")
    content = path.read_bytes()
    found: Counter[str] = Counter()
    for bit in range(8 * len(content)):
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            IndexedCorpus(prefix)
        except CorpusError:
            found["at opening"] += 1
            continue
        assert suffix == "bin" or bit // 8 >= HEADER.size + 12 * 4, "only document boundaries look alike"
        with pytest.raises(CorpusError, match=rf"\.{suffix}: SHA-256 is "):
            verify_hashes(prefix)
        found["by the hashes"] += 1
    path.write_bytes(content)
    assert len(verify_hashes(prefix)) == 2
    assert found["at opening"] > 0.97 * 8 * len(content) if suffix == "idx" else found["by the hashes"] > 0


@pytest.mark.parametrize("suffix", ["bin", "idx"])
def test_every_cut_and_every_addition(prefix: Path, suffix: str) -> None:
    path = Path(f"{prefix}.{suffix}")
    content = path.read_bytes()
    for size in range(len(content)):
        path.write_bytes(content[:size])
        with pytest.raises(CorpusError, match=rf"c_text_document\.{suffix}"):
            IndexedCorpus(prefix)
    path.write_bytes(content + b"\0")
    with pytest.raises(CorpusError, match=rf"\.{suffix}: size is "):
        IndexedCorpus(prefix)


def test_nothing_to_compare_with(tmp_path: Path) -> None:
    make_corpus(tmp_path / "c", [3])
    with pytest.raises(CorpusError, match="must exist and hold hashes to compare with"):
        verify_hashes(tmp_path / "c")


def test_a_missing_file(prefix: Path) -> None:
    Path(f"{prefix}.bin").unlink()
    with pytest.raises(CorpusError, match=r"corpus file is .*c_text_document.bin': must be readable \(No such file"):
        verify_hashes(prefix)


def test_a_sidecar_of_an_older_version(prefix: Path) -> None:
    sidecar = read_sidecar(prefix)
    assert sidecar is not None
    write_sidecar(prefix, sidecar)
    content = sidecar_path(prefix).read_text()
    sidecar_path(prefix).write_text(content.replace('"bin_sha256"', '"something else"'))
    with pytest.raises(CorpusError, match="must exist and hold hashes to compare with"):
        verify_hashes(prefix)
