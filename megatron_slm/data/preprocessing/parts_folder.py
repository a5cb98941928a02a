"""The folder of a corpus's finished shards, locked by one process."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from megatron_slm.errors import ConfigError, CorpusError, os_errors_as

logger = logging.getLogger(__name__)

_LOCK = "lock"
_PART = re.compile(r"[0-9a-f]{32}\..+|.+\.part-\d+")
"""Files of shards (see `Shard`) and temporary files (see `temporary_path`); no other file is ever removed."""


@contextlib.contextmanager
def parts_folder(folder: Path) -> Iterator[None]:
    """Lock the folder; remove it on success, and on an error that leaves no finished shard.

    Raises:
        ConfigError: another process holds the lock.
        CorpusError: the folder cannot be created, or holds other files.
    """
    with os_errors_as(
        CorpusError, "--output-prefix", str(folder.with_suffix("")), "be writable", "choose another prefix"
    ):
        lock = _lock(folder)
    with lock:
        for path in folder.glob("*.part-*"):  # left by a killed run: under the lock nobody writes them
            path.unlink()
        try:
            yield
        except BaseException:
            done = len(list(folder.glob("*.json")))
            if done:
                logger.warning("%d finished shards are kept in %s: run the same command to resume", done, folder)
            else:
                _remove(folder)
            raise
        _remove(folder)


def clear(folder: Path) -> None:
    """Remove all shards and temporary files from a locked folder."""
    for path in folder.iterdir():
        if _PART.fullmatch(path.name):
            path.unlink()


def _lock(folder: Path) -> IO[str]:
    path = folder / _LOCK
    while True:
        with contextlib.suppress(FileExistsError):
            folder.mkdir(parents=True)
        with contextlib.suppress(FileNotFoundError):  # its last holder has just removed it
            _require_ours(folder)
            lock = open(path, "w")
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.path.samestat(os.fstat(lock.fileno()), path.stat()):
                    return lock
            except BlockingIOError as error:
                lock.close()
                prefix = str(folder.with_suffix(""))
                raise ConfigError(
                    "--output-prefix", prefix, "not be in use by another process", "wait, or choose another prefix"
                ) from error
            lock.close()


def _require_ours(folder: Path) -> None:
    names = os.listdir(folder)
    if _LOCK not in names and not all(map(_PART.fullmatch, names)):
        raise CorpusError(
            "--output-prefix",
            str(folder.with_suffix("")),
            f"leave {folder} free for shards; it holds other files",
            "choose another prefix, or move the folder",
        )


def _remove(folder: Path) -> None:
    """Remove the folder, unless another process has locked it meanwhile."""
    clear(folder)
    (folder / _LOCK).unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        folder.rmdir()
