"""The sidecar file: written and read back, optional, and refused when it is not one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_slm.data.indexed import sidecar_path
from megatron_slm.data.sidecar import Sidecar, read_sidecar, write_sidecar
from megatron_slm.errors import CorpusError

SIDECAR = Sidecar(
    tokenizer_fingerprint="ab" * 32,
    vocab_size=100,
    num_documents=3,
    num_tokens=50,
    max_token_id=99,
    eod_id=None,
    command="preprocess_data.py --input a.jsonl",
)


def test_reads_what_was_written(tmp_path: Path) -> None:
    write_sidecar(tmp_path / "c", SIDECAR)
    assert read_sidecar(tmp_path / "c") == SIDECAR
    assert [path.name for path in tmp_path.iterdir()] == ["c.meta.json"]


def test_a_corpus_made_by_megatron_has_none(tmp_path: Path) -> None:
    assert read_sidecar(tmp_path / "c") is None


def test_fields_of_a_later_version_are_ignored(tmp_path: Path) -> None:
    write_sidecar(tmp_path / "c", SIDECAR)
    path = sidecar_path(tmp_path / "c")
    path.write_text(json.dumps({**json.loads(path.read_text()), "later": 1}))
    assert read_sidecar(tmp_path / "c") == SIDECAR


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"vocab_size": 3}', "3"])
def test_not_a_sidecar(tmp_path: Path, content: str) -> None:
    sidecar_path(tmp_path / "c").write_text(content)
    with pytest.raises(CorpusError, match=r"corpus sidecar = .*must be a JSON object with the fields"):
        read_sidecar(tmp_path / "c")
