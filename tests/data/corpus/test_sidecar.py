"""The sidecar file: written, read back, optional, rejected when malformed."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_slm.data.corpus.indexed import IndexedCorpus, idx_path, sidecar_path
from megatron_slm.data.corpus.inspection import loss_mask_of
from megatron_slm.data.corpus.sidecar import Sidecar, find_loss_mask, loss_mask_prefix, read_sidecar, read_sidecar_of
from megatron_slm.errors import CorpusError
from tests.data.corpora import make_corpus, write_sidecar

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
    with pytest.raises(CorpusError, match=r"corpus sidecar is .*must be a JSON object with the fields"):
        read_sidecar(tmp_path / "c")


@pytest.mark.parametrize(
    ("name", "value", "kind"),
    [
        ("num_tokens", "x", "int"),
        ("num_tokens", True, "int"),
        ("max_token_id", 9.5, "int"),
        ("eod_id", "2", "int | None"),
        ("tokenizer_fingerprint", None, "str"),
        ("bin_sha256", 3, "str | None"),
    ],
)
def test_a_field_of_another_type(tmp_path: Path, name: str, value: object, kind: str) -> None:
    write_sidecar(tmp_path / "c", replace(SIDECAR, **{name: value}))
    with pytest.raises(CorpusError, match=re.escape(f"{name} is {value!r}, not {kind})")):
        read_sidecar(tmp_path / "c")


@pytest.mark.parametrize(("name", "value"), [("num_documents", 2), ("num_tokens", 5)])
def test_a_sidecar_of_an_earlier_corpus(tmp_path: Path, name: str, value: int) -> None:
    corpus = make_corpus(tmp_path / "c", [20, 0, 30])
    assert read_sidecar_of(corpus) is None
    write_sidecar(tmp_path / "c", SIDECAR)
    assert read_sidecar_of(corpus) == SIDECAR
    write_sidecar(tmp_path / "c", replace(SIDECAR, **{name: value}))
    here = getattr(corpus, name)
    with pytest.raises(CorpusError, match=rf"c\.meta\.json: {name} is {value}: must be {here}, .*move the stale"):
        read_sidecar_of(corpus)


def test_the_mask_of_an_earlier_corpus_is_not_looked_for(tmp_path: Path) -> None:
    make_corpus(tmp_path / "c", [3])
    write_sidecar(tmp_path / "c", replace(SIDECAR, loss_mask="gone"))
    with pytest.raises(CorpusError, match="the sidecar is of another corpus"):
        loss_mask_of(IndexedCorpus(tmp_path / "c"))


def test_which_loss_mask_belongs_to_a_corpus(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    prefix = tmp_path / "c"
    make_corpus(loss_mask_prefix(prefix), [3])
    assert find_loss_mask(prefix) == loss_mask_prefix(prefix), "one beside a corpus of Megatron's"
    write_sidecar(prefix, SIDECAR)
    assert find_loss_mask(prefix) is None, "left there by an earlier corpus"
    assert "ignoring the loss mask" in caplog.text
    write_sidecar(prefix, replace(SIDECAR, loss_mask="c_loss_mask"))
    assert find_loss_mask(prefix) == loss_mask_prefix(prefix)
    idx_path(loss_mask_prefix(prefix)).unlink()
    with pytest.raises(
        CorpusError,
        match=r"loss_mask is 'c_loss_mask': must be a loss mask in the same folder; .*c_loss_mask\.idx does not exist",
    ):
        find_loss_mask(prefix)
