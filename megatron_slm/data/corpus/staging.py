"""Copies remote corpora (s3://, gs://, https:// and anything else fsspec opens) to this node, once."""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import fsspec
from filelock import FileLock

from megatron_slm.data.corpus.columns import FILES
from megatron_slm.errors import CorpusError

logger = logging.getLogger(__name__)

_REQUIRED = (".idx", ".bin")
_OPTIONAL = (".meta.json", "_loss_mask.idx", "_loss_mask.bin")


def staged(prefix: str, folder: Path, columns: Sequence[str] = ()) -> str:
    """Return a local prefix unchanged; copy a remote corpus into `folder` and return the prefix of the copy.

    The path of the copy depends on the address and on each file's size, checksum or modification time, so a corpus that
    changes is copied again. Ranks of a node that start together copy once.

    Args:
        columns: names of the corpus's columns to copy too.

    Raises:
        CorpusError: a file is missing, or cannot be copied.
    """
    if "://" not in prefix:
        return prefix
    try:
        system, path = fsspec.core.url_to_fs(prefix)
        required = (*_REQUIRED, *(f"_{name}{end}" for name in columns for end in FILES))
        found = [end for end in (*required, *_OPTIONAL) if system.exists(path + end)]
        marks = {end: f"{system.size(path + end)} {system.checksum(path + end)}" for end in found}
        missing = [end for end in required if end not in found]
        if missing:
            raise FileNotFoundError(f"{prefix}{missing[0]} does not exist")
        key = hashlib.sha256(f"{prefix} {sorted(marks.items())}".encode()).hexdigest()[:16]
        copy = folder / "corpora" / key / path.rpartition("/")[2]
        copy.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(copy.parent / ".lock"):
            for end in found:
                _copy(system, path + end, Path(f"{copy}{end}"))
    except (OSError, ValueError, ImportError) as error:
        raise CorpusError(
            "corpus prefix",
            prefix,
            f"be readable through fsspec ({error})",
            "check the address, the credentials, and that the package for its protocol is installed",
        ) from error
    return str(copy)


def _copy(system: fsspec.AbstractFileSystem, source: str, target: Path) -> None:
    if target.exists():  # renamed into place when whole
        return
    logger.info("copying %s to %s", source, target)
    handle, temporary = tempfile.mkstemp(prefix=f".{target.name}-", dir=target.parent)
    os.close(handle)
    try:
        system.get_file(source, temporary)
        wanted, size = system.size(source), os.stat(temporary).st_size
        if size != wanted:
            raise OSError(f"{source}: {size} of {wanted} bytes arrived")
        os.replace(temporary, target)
    finally:
        Path(temporary).unlink(missing_ok=True)
