"""The folder of shards: one process at a time, and no foreign file is removed."""

from __future__ import annotations

import fcntl
import os
import threading
import time
from pathlib import Path

import pytest

from megatron_slm.data.preprocessing import parts_folder as module
from megatron_slm.data.preprocessing.parts_folder import clear, parts_folder
from megatron_slm.errors import ConfigError, CorpusError

SHARD = "0123456789abcdef" * 2 + ".0.bin"


def test_only_our_files_are_removed(tmp_path: Path) -> None:
    folder = tmp_path / "c.parts"
    with parts_folder(folder):
        for name in (SHARD, "c_text_document.bin.part-17", "theirs.jsonl"):
            (folder / name).touch()
    assert [path.name for path in folder.iterdir()] == ["theirs.jsonl"]


@pytest.mark.parametrize("name", ["theirs.jsonl", "0123.bin", "notes.part-x"])
def test_a_folder_of_other_files_is_rejected(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "c.parts"
    folder.mkdir()
    (folder / name).touch()
    with (
        pytest.raises(
            CorpusError, match=r"--output-prefix is .*c': must leave .*c\.parts free for shards; it holds other files"
        ),
        parts_folder(folder),
    ):
        pass
    assert [path.name for path in folder.iterdir()] == [name]


def test_files_of_a_killed_process(tmp_path: Path) -> None:
    """Also one killed between removing the lock and removing the folder; whole shards stay."""
    folder = tmp_path / "c.parts"
    folder.mkdir()
    (folder / SHARD).touch()
    (folder / f"{SHARD}.part-3").touch()
    with parts_folder(folder):
        assert sorted(path.name for path in folder.iterdir()) == [SHARD, "lock"]
        clear(folder)
        assert [path.name for path in folder.iterdir()] == ["lock"]
    assert not folder.exists()


def test_a_lock_that_was_removed_meanwhile_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Opened by one process, then removed by its holder, and created again by a third."""
    folder, real = tmp_path / "c.parts", fcntl.flock
    calls = 0

    def flock(file, flags: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            (folder / "lock").unlink()
            third = open(folder / "lock", "w")
            real(third, fcntl.LOCK_EX)
            held.append(third)
        real(file, flags)

    held: list = []
    monkeypatch.setattr(module.fcntl, "flock", flock)
    with (
        pytest.raises(ConfigError, match=r"--output-prefix is .*must not be in use by another process"),
        parts_folder(folder),
    ):
        pass
    assert calls == 2
    held.pop().close()


def test_many_in_a_row(tmp_path: Path) -> None:
    """Of several that come and go, one holds the lock at a time; the others fail only with the error to wait."""
    folder, inside, most, failures = tmp_path / "c.parts", 0, 0, []
    end = time.monotonic() + 2

    def come_and_go() -> None:
        nonlocal inside, most
        while time.monotonic() < end:
            try:
                with parts_folder(folder):
                    inside += 1
                    most = max(most, inside)
                    (folder / f"x.part-{os.getpid()}").touch()
                    inside -= 1
            except ConfigError:
                pass
            except BaseException as error:
                failures.append(error)

    threads = [threading.Thread(target=come_and_go) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert most == 1
