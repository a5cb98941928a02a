"""What a run says of the corpora it is given: prefixes, weights, end-of-document tokens."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_slm.config.batch_sizes import BatchSizes
from megatron_slm.data.corpus.indexed import IndexedCorpus
from megatron_slm.data.corpus.sidecar import Sidecar
from megatron_slm.data.packing import _numbers
from megatron_slm.data.tokenizers.registry import build_tokenizer
from megatron_slm.errors import ConfigError, CorpusError
from megatron_slm.flags.load import parse
from megatron_slm.run.corpora import RunData, boundaries, open_data
from megatron_slm.run.data_paths import read_paths
from megatron_slm.run.opened_corpora import CorpusOpener
from tests.data.corpora import make_corpus, write_sidecar
from tests.support.runs import flags, run_flags


def test_a_prefix_without_its_suffix_gets_a_suggestion(tmp_path: Path) -> None:
    make_corpus(tmp_path / "web_text_document", [5])
    with pytest.raises(CorpusError, match=r"Fix: pass '.*/web_text_document'"):
        IndexedCorpus(tmp_path / "web")
    with pytest.raises(CorpusError, match="Fix: check the prefix"):
        IndexedCorpus(tmp_path / "books")


def test_a_weight_that_is_also_a_corpus_is_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("2024", "7"):
        make_corpus(Path(name), [5])
    config, _ = parse(flags(run_flags(Path("x"), tmp_path / "run", data_path=["2024", "7"])))
    assert [corpus.prefix for corpus in read_paths(config.data).train.corpora] == ["7"]
    assert "2024 was read as a weight, and a corpus of that name exists" in caplog.text
    caplog.clear()
    config, _ = parse(flags(run_flags(Path("x"), tmp_path / "run", data_path=["./2024", "./7"])))
    assert len(read_paths(config.data).train.corpora) == 2
    assert "weight" not in caplog.text


def test_numbers_of_sequences_beyond_int32_do_not_wrap_around() -> None:
    last = 2**31 - 1
    assert _numbers(last - 1, last + 1).tolist() == [last - 1, last]
    assert _numbers(last - 1, last + 1).dtype == np.int32
    assert _numbers(last - 1, last + 3).tolist() == [last - 1, last, last + 1, last + 2]
    assert _numbers(2**33, 2**33 + 2).tolist() == [2**33, 2**33 + 1]


def test_ranks_read_the_token_ids_of_a_corpus_once_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prefixes = [str(tmp_path / name) for name in "abcde"]
    for prefix in prefixes:
        make_corpus(Path(prefix), [5])
    read: list[list[str]] = []
    monkeypatch.setattr(IndexedCorpus, "check_vocabulary", lambda self, vocab_size: read[-1].append(str(self.prefix)))
    tokenizer = build_tokenizer("NullTokenizer", None, 60)
    for rank in range(3):
        read.append([])
        opener = CorpusOpener(tokenizer=tokenizer, num_tokens=61, eod_id=None, cache=tmp_path, share=(rank, 3))
        for prefix in [*prefixes, *prefixes]:
            opener.open(prefix)
    assert sorted(prefix for mine in read for prefix in mine) == prefixes
    assert max(map(len, read)) == 2


def opened(folder: Path, **changes: Any) -> tuple[RunData, Any]:
    config, _ = parse(flags(run_flags(folder / "c", folder / "run", vocab_size=60, seq_length=8, **changes)))
    tokenizer = build_tokenizer("NullTokenizer", None, 60)
    return open_data(config, tokenizer, 61, 4, batch_sizes=BatchSizes.constant(2)), boundaries(config, tokenizer)


def test_documents_end_where_the_corpus_was_told(tmp_path: Path) -> None:
    make_corpus(tmp_path / "c", [20, 20], vocab_size=50)
    tokenizer = build_tokenizer("NullTokenizer", None, 60)
    sidecar = Sidecar(
        tokenizer_fingerprint=tokenizer.fingerprint(), vocab_size=61, num_documents=2, num_tokens=40,
        max_token_id=49, eod_id=7, command="test",
    )  # fmt: skip
    write_sidecar(tmp_path / "c", sidecar)
    opened(tmp_path)  # nothing depends on the end of a document
    with pytest.raises(
        ConfigError, match=r"--eod-token is '60': must be '7', which ends the documents of .*--eod-token 7"
    ):
        opened(tmp_path, eod_mask_loss=True)
    _, ends = opened(tmp_path, eod_mask_loss=True, eod_token="7")
    assert ends.eod_id == 7
    with pytest.raises(ConfigError, match="--eod-token is 'x': must be a token of the tokenizer"):
        opened(tmp_path, eod_token="x")
    write_sidecar(tmp_path / "c", dataclasses.replace(sidecar, eod_id=60))
    assert opened(tmp_path, eod_mask_loss=True)[1].eod_id == 60
    shutil.rmtree(tmp_path / "run", ignore_errors=True)
