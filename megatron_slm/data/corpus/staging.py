"""Corpora that lie elsewhere (s3://, gs://, https:// and whatever else fsspec opens), copied to this node once."""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
from pathlib import Path

import fsspec
from filelock import FileLock

from megatron_slm.errors import CorpusError

logger = logging.getLogger(__name__)

_REQUIRED = (".idx", ".bin")
_OPTIONAL = (".meta.json", "_loss_mask.idx", "_loss_mask.bin")


def staged(prefix: str, folder: Path) -> str:
    """The prefix itself where it is a local path; else that of a whole copy in `folder`.

    The copy's place is made from the address and from what the file system says of each file (size, checksum or time
    of change), so a corpus that is rewritten there is copied again. Ranks of a node that start together copy once.

    Raises:
        CorpusError: a file is not there, or cannot be copied.
    """
    if "://" not in prefix:
        return prefix
    try:
        system, path = fsspec.core.url_to_fs(prefix)
        found = [end for end in (*_REQUIRED, *_OPTIONAL) if system.exists(path + end)]
        marks = {end: f"{system.size(path + end)} {system.checksum(path + end)}" for end in found}
        missing = [end for end in _REQUIRED if end not in found]
        if missing:
            raise FileNotFoundError(f"{prefix}{missing[0]} does not exist")
        key = hashlib.sha256(f"{prefix} {sorted(marks.items())}".encode()).hexdigest()[:16]
        place = folder / "corpora" / key / path.rpartition("/")[2]
        place.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(place.parent / ".lock"):
            for end in found:
                _copy(system, path + end, Path(f"{place}{end}"))
    except (OSError, ValueError, ImportError) as error:
        raise CorpusError(
            "corpus prefix",
            prefix,
            f"can be read through fsspec ({error})",
            "check the address and the credentials, and that the package for its protocol is installed",
        ) from error
    return str(place)


def _copy(system: fsspec.AbstractFileSystem, source: str, target: Path) -> None:
    if target.exists():  # renamed into place when it was whole
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
