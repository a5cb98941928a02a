"""The folder in which parts of a corpus wait for the others, one process' alone."""

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
"""Shards (see `Shard`), and files on their way (see `part_path`): nothing else is ever removed."""


@contextlib.contextmanager
def parts_folder(folder: Path) -> Iterator[None]:
    """Hold the folder; it goes when all is done, and when nothing in it is worth keeping.

    Raises:
        ConfigError: another process holds it.
        CorpusError: it cannot be made, or holds files of somebody else.
    """
    with os_errors_as(CorpusError, "output prefix", str(folder.with_suffix("")), "must be writable", "give another"):
        lock = _lock(folder)
    with lock:
        for path in folder.glob("*.part-*"):  # of a killed run: the lock says that nobody writes them
            path.unlink()
        try:
            yield
        except BaseException:
            done = len(list(folder.glob("*.json")))
            if done:
                logger.warning("%d finished parts stay in %s: the same command goes on from there", done, folder)
            else:
                _remove(folder)
            raise
        _remove(folder)


def clear(folder: Path) -> None:
    """Remove all parts from a folder that is held."""
    for path in folder.iterdir():
        if _PART.fullmatch(path.name):
            path.unlink()


def _lock(folder: Path) -> IO[str]:
    path = folder / _LOCK
    while True:
        with contextlib.suppress(FileExistsError):
            folder.mkdir(parents=True)
        with contextlib.suppress(FileNotFoundError):  # whoever held it removed it just now
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
                    "output_prefix", prefix, "is being written to by another process", "wait, or give another"
                ) from error
            lock.close()


def _require_ours(folder: Path) -> None:
    names = os.listdir(folder)
    if _LOCK not in names and not all(map(_PART.fullmatch, names)):
        raise CorpusError(
            "output prefix",
            str(folder.with_suffix("")),
            f"must be free for parts: {folder} holds other files",
            "give another prefix, or move the folder",
        )


def _remove(folder: Path) -> None:
    """Whoever comes in between makes a new lock, and the folder stays."""
    clear(folder)
    (folder / _LOCK).unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        folder.rmdir()
