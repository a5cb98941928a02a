"""Remote corpora are copied whole, once, and again after a change."""

from __future__ import annotations

from pathlib import Path

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from megatron_slm.data.corpus.indexed import IndexedCorpus
from megatron_slm.data.corpus.staging import staged
from megatron_slm.errors import CorpusError
from tests.data.corpora import make_corpus


@pytest.fixture
def remote(tmp_path: Path) -> MemoryFileSystem:
    system = fsspec.filesystem("memory")
    system.store.clear()
    make_corpus(tmp_path / "made", [3, 4, 5])
    for end in (".bin", ".idx"):
        system.pipe(f"/bucket/web{end}", (tmp_path / f"made{end}").read_bytes())
    return system


def test_a_local_prefix_stays(tmp_path: Path) -> None:
    assert staged("/data/web", tmp_path) == "/data/web"


def test_a_corpus_is_copied_once_and_again_when_it_changes(
    remote: MemoryFileSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gets, real = [], MemoryFileSystem.get_file
    monkeypatch.setattr(MemoryFileSystem, "get_file", lambda self, *a, **k: (gets.append(a[0]), real(self, *a, **k)))
    first = staged("memory://bucket/web", tmp_path)
    assert staged("memory://bucket/web", tmp_path) == first
    assert len(gets) == 2
    assert IndexedCorpus(first).get(1).tolist() == [3, 4, 5, 6]
    assert Path(first).name == "web"
    make_corpus(tmp_path / "made", [5, 4, 3, 1])
    for end in (".bin", ".idx"):
        remote.pipe(f"/bucket/web{end}", (tmp_path / f"made{end}").read_bytes())
    again = staged("memory://bucket/web", tmp_path)
    assert again != first
    assert IndexedCorpus(again).num_sequences == 4


def test_a_loss_mask_comes_along(remote: MemoryFileSystem, tmp_path: Path) -> None:
    make_corpus(tmp_path / "mask", [3, 4, 5], dtype="uint8")
    for end in (".bin", ".idx"):
        remote.pipe(f"/bucket/web_loss_mask{end}", (tmp_path / f"mask{end}").read_bytes())
    assert IndexedCorpus(f"{staged('memory://bucket/web', tmp_path)}_loss_mask").dtype == np.uint8


def test_a_copy_that_is_cut_off_is_never_taken_for_whole(
    remote: MemoryFileSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = MemoryFileSystem.get_file
    monkeypatch.setattr(MemoryFileSystem, "get_file", lambda self, _, target: Path(target).write_bytes(b"half"))
    with pytest.raises(CorpusError, match=r"4 of \d+ bytes arrived"):
        staged("memory://bucket/web", tmp_path)
    monkeypatch.setattr(MemoryFileSystem, "get_file", real)
    assert IndexedCorpus(staged("memory://bucket/web", tmp_path)).num_tokens == 12


@pytest.mark.parametrize("prefix", ["memory://bucket/nothing", "nosuch://bucket/web"])
def test_an_address_that_cannot_be_read(prefix: str, tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=f"corpus prefix is '{prefix}': must be readable through fsspec"):
        staged(prefix, tmp_path)
