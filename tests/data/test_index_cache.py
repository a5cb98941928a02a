"""The index cache: built once however many start together, never half, never stale."""

from __future__ import annotations

import logging
import multiprocessing
import os
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_slm.data import build_once
from megatron_slm.data.index_cache import IndexCache
from megatron_slm.data.packing import PackedSamples
from tests.data.corpora import make_corpus


def build_logging(log: Path) -> dict[str, Any]:
    with log.open("a") as file:
        file.write(f"{os.getpid()}\n")
    return {"numbers": np.arange(1000), "ends": np.arange(3, dtype=np.int32)}


def take(folder: Path, log: Path, barrier: Any) -> None:
    barrier.wait()
    arrays = IndexCache(folder).arrays("k", "made from this", None, lambda: build_logging(log))
    assert arrays["numbers"].sum() == 499500
    assert isinstance(arrays["numbers"], np.memmap)


def test_ranks_that_start_together_build_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(6)
    ranks = [context.Process(target=take, args=(tmp_path / "cache", tmp_path / "log", barrier)) for _ in range(6)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert [rank.exitcode for rank in ranks] == [0] * 6
    assert len((tmp_path / "log").read_text().splitlines()) == 1
    assert next(p.name for p in (tmp_path / "cache").iterdir() if not p.name.endswith(".lock")).startswith("k-")


def test_nodes_whose_locks_do_not_meet_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where every node builds the first rename wins, and all read the same."""
    monkeypatch.setattr("megatron_slm.data.build_once._take", lambda lock: True)

    def build() -> dict[str, Any]:
        other = IndexCache(tmp_path).arrays("k", "x", None, lambda: {"a": np.arange(5)})  # meanwhile
        assert other["a"].tolist() == [0, 1, 2, 3, 4]
        return {"a": np.arange(5)}

    assert IndexCache(tmp_path).arrays("k", "x", None, build)["a"].tolist() == [0, 1, 2, 3, 4]
    assert len([p for p in tmp_path.iterdir() if p.is_dir()]) == 1, "nothing temporary is left"


@pytest.mark.parametrize("damage", ["cut", "removed", "other dtype", "no description"])
def test_a_damaged_index_is_built_again(tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    def arrays() -> dict[str, Any]:
        return IndexCache(tmp_path).arrays("k", "x", None, lambda: {"a": np.arange(500)})

    arrays()
    place = next(p for p in tmp_path.iterdir() if p.is_dir())
    if damage == "cut":
        (place / "a.npy").write_bytes((place / "a.npy").read_bytes()[:-8])
    elif damage == "removed":
        (place / "a.npy").unlink()
    elif damage == "other dtype":
        np.save(place / "a.npy", np.arange(500, dtype=np.int32))
    else:
        (place / "description.json").write_text("{")
    with caplog.at_level(logging.WARNING):
        assert arrays()["a"].tolist() == list(range(500))
    assert damage == "removed" or "rebuilding the damaged index" in caplog.text
    assert isinstance(arrays()["a"], np.memmap)


def test_a_killed_build_leaves_nothing_that_is_read(tmp_path: Path) -> None:
    def dying() -> dict[str, Any]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        IndexCache(tmp_path).arrays("k", "x", None, dying)
    assert IndexCache(tmp_path).arrays("k", "x", None, lambda: {"a": np.arange(2)})["a"].tolist() == [0, 1]


def test_a_folder_that_cannot_be_written_is_logged_and_skipped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    with caplog.at_level(logging.WARNING):
        found = IndexCache(tmp_path / "file" / "cache").arrays("k", "x", None, lambda: {"a": np.arange(2)})
    assert found["a"].tolist() == [0, 1]
    assert "cannot write the index cache" in caplog.text


def test_a_rewritten_corpus_has_another_index(tmp_path: Path) -> None:
    def order(lengths: list[int]) -> list[list[int]]:
        corpus = make_corpus(tmp_path / "c", lengths)
        samples = PackedSamples(
            corpus, 0, len(lengths), sequence_length=4, num_samples=6, seed=1, cache=IndexCache(tmp_path / "cache")
        )
        plain = PackedSamples(corpus, 0, len(lengths), sequence_length=4, num_samples=6, seed=1)
        found = [samples[i].tokens.tolist() for i in range(6)]
        assert found == [plain[i].tokens.tolist() for i in range(6)]
        assert isinstance(samples.document_index, np.memmap)
        return found

    assert order([5, 9, 3, 20]) != order([20, 9, 3, 5])
    assert order([5, 9, 3, 20]) == order([5, 9, 3, 20])
    assert len([p for p in (tmp_path / "cache").iterdir() if p.is_dir()]) == 2


def build_for_ever(folder: Path, started: Any) -> None:
    def build() -> dict[str, Any]:
        started.set()
        time.sleep(600)
        return {}

    IndexCache(folder).arrays("k", "x", None, build)


@pytest.mark.timeout(60)
def test_a_killed_builder_of_this_host_is_replaced_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_once, "STALE_SECONDS", 3600.0)
    context = multiprocessing.get_context("fork")
    started = context.Event()
    builder = context.Process(target=build_for_ever, args=(tmp_path, started))
    builder.start()
    assert started.wait(20)
    builder.kill()
    builder.join()
    assert [path.name for path in tmp_path.iterdir()], "its lock is still there"
    assert IndexCache(tmp_path).arrays("k", "x", None, lambda: {"a": np.arange(2)})["a"].tolist() == [0, 1]
    assert not list(tmp_path.glob(".*")), "and so is nothing else of it"


def test_a_builder_on_another_host_is_waited_for_while_its_heart_beats(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build_once, "STALE_SECONDS", 0.5)
    monkeypatch.setattr(build_once, "LONGEST_POLL_SECONDS", 0.05)
    lock, built = tmp_path / "lock", threading.Event()
    lock.write_text("another.host 1")

    def other() -> None:
        for beat in range(8):
            time.sleep(0.2)
            os.utime(lock, (beat, beat))
        built.set()
        lock.unlink()

    thread = threading.Thread(target=other)
    thread.start()
    found = build_once.build_once(lock, lambda: "theirs" if built.is_set() else None, lambda: "ours")
    thread.join()
    assert found == "theirs"
    lock.write_text("another.host 1")  # and no heart
    assert build_once.build_once(lock, lambda: None, lambda: "ours") == "ours"
    assert not list(tmp_path.iterdir())


def test_a_heart_beats_while_the_interpreter_is_busy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_once, "HEARTBEAT_SECONDS", 0.05)
    monkeypatch.setattr(build_once, "_heart", build_once._Heart())
    lock, touched = tmp_path / "lock", []

    def build() -> str:
        build_once.build_once(tmp_path / "inner", lambda: None, lambda: "a part, built meanwhile")
        os.utime(lock, (1, 1))
        while not touched or touched[-1] == 1:  # holds the interpreter's lock most of the time
            touched.append(lock.stat().st_mtime)
        return "built"

    assert build_once.build_once(lock, lambda: None, build) == "built"
