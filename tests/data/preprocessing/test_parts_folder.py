"""The folder of the parts: one process at a time, and nothing of anybody else's goes with it."""

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


def test_it_goes_with_all_that_is_ours(tmp_path: Path) -> None:
    folder = tmp_path / "c.parts"
    with parts_folder(folder):
        for name in (SHARD, "c_text_document.bin.part-17", "theirs.jsonl"):
            (folder / name).touch()
    assert [path.name for path in folder.iterdir()] == ["theirs.jsonl"]


@pytest.mark.parametrize("name", ["theirs.jsonl", "0123.bin", "notes.part-x"])
def test_a_folder_of_somebody_else_is_refused(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "c.parts"
    folder.mkdir()
    (folder / name).touch()
    with (
        pytest.raises(CorpusError, match=r"c': must be free for parts: .*c\.parts holds other files"),
        parts_folder(folder),
    ):
        pass
    assert [path.name for path in folder.iterdir()] == [name]


def test_what_a_killed_process_left(tmp_path: Path) -> None:
    """Even one that was killed between the removal of the lock and that of the folder; whole shards stay."""
    folder = tmp_path / "c.parts"
    folder.mkdir()
    (folder / SHARD).touch()
    (folder / f"{SHARD}.part-3").touch()
    with parts_folder(folder):
        assert sorted(path.name for path in folder.iterdir()) == [SHARD, "lock"]
        clear(folder)
        assert [path.name for path in folder.iterdir()] == ["lock"]
    assert not folder.exists()


def test_a_lock_that_was_removed_meanwhile_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Opened by one process, then removed by the one that held it, and made anew by a third."""
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
    with pytest.raises(ConfigError, match="is being written to by another process"), parts_folder(folder):
        pass
    assert calls == 2
    held.pop().close()


def test_many_in_a_row(tmp_path: Path) -> None:
    """Several come and go at once: one holds it at a time, and no one fails in another way than by being told to wait."""
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
