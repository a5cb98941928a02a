"""Durable writes, checksums and JSON output: files are complete or absent."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import resource
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from megatron_slm.errors import ConfigError, os_errors_as


def file_sha256(
    path: Path, num_bytes: int | None = None, *, on_bytes: Callable[[int], None] = lambda count: None
) -> str:
    """Return the hexadecimal SHA-256 of a file, or of its first `num_bytes` bytes.

    Args:
        on_bytes: called with the size of each block read, to show progress.
    """
    with path.open("rb") as file:
        digest = hashlib.sha256()
        if num_bytes is not None:
            digest.update(file.read(num_bytes))
            return digest.hexdigest()
        while block := file.read(2**20):
            digest.update(block)
            on_bytes(len(block))
    return digest.hexdigest()


def write_durably(path: Path, content: bytes) -> None:
    """Write a small file atomically and flush it to disk before returning."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Flush a folder to disk, so that renames inside it are durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: str, values: Any, *, flag: str = "--json") -> None:
    """Write `values` as JSON to the file named by `flag`; `-` writes to standard output.

    Raises:
        ConfigError: the file cannot be written.
    """
    text = json.dumps(values, indent=1, allow_nan=False) + "\n"
    if path == "-":
        sys.stdout.write(text)
        sys.stdout.flush()
        return
    with os_errors_as(ConfigError, flag, path, "be a writable file", "choose another path"):
        Path(path).write_text(text)


def check_writable(folder: Path) -> None:
    """Check that files can be made in a folder, which need not exist yet; writes nothing.

    Raises:
        OSError: a part of the path is a file, or the nearest existing folder cannot be written.
    """
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(existing))
    if not os.access(existing, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(existing))


def raise_open_file_limit() -> None:
    """Raise this process's limit of open files to the most that it may have: every corpus of a blend needs some."""
    with suppress(OSError, ValueError):  # some systems report a hard limit that they do not grant
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
