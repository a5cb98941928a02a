"""Caches sample indices on disk, so that a node builds each once and its ranks share the memory.

    CACHE/KEY/description.json, NAME.npy ...

A folder is written under a temporary name and renamed when whole; its name is a checksum of everything the content is
made from. So ranks and nodes need not agree on who builds: equal keys mean equal content, on a shared file system or
not. One process of each file system builds (`build_once`).
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_slm.data.build_once import build_once
from megatron_slm.data.corpus.indexed import IndexedCorpus, bin_path

logger = logging.getLogger(__name__)

_FORMAT = 1
_DESCRIPTION = "description.json"
Arrays = dict[str, npt.NDArray[Any]]


class IndexCache:
    """Arrays, by the checksum of their inputs.

    Args:
        folder: folder of the cache, created on first use; None disables the cache.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    def arrays(self, kind: str, made_from: str, corpus: IndexedCorpus | None, build: Callable[[], Arrays]) -> Arrays:
        """Return the arrays of one index, mapped from disk; in memory if the folder is disabled or not writable.

        Args:
            kind: name of the kind of index, part of the key.
            made_from: fingerprint of everything that the arrays depend on.
            corpus: the indexed corpus, whose size becomes part of the key too.
            build: builds the arrays.
        """
        if self.folder is None:
            return build()
        size = bin_path(corpus.prefix).stat().st_size if corpus else 0
        key = hashlib.sha256(f"{_FORMAT} {kind} {made_from} {size}".encode()).hexdigest()[:32]
        place = self.folder / f"{kind}-{key}"
        found = _load(place)
        if found is not None:
            return found
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            return build_once(
                self.folder / f".{place.name}.lock",
                lambda: _load(place),
                lambda: self._store(place, build(), {"kind": kind, "made_from": made_from}),
            )
        except OSError as error:
            logger.warning(
                "cannot write the index cache %s (%s): every rank keeps the index in memory",
                self.folder,
                error.strerror or error,
            )
            return build()

    def _store(self, place: Path, arrays: Arrays, description: dict[str, Any]) -> Arrays:
        temporary = Path(tempfile.mkdtemp(prefix=f".{place.name}-", dir=place.parent))
        try:
            for name, array in arrays.items():
                with (temporary / f"{name}.npy").open("wb") as file:
                    np.save(file, array, allow_pickle=False)
                    file.flush()
                    os.fsync(file.fileno())
            shapes = {name: [array.dtype.str, list(array.shape)] for name, array in arrays.items()}
            (temporary / _DESCRIPTION).write_text(json.dumps({**description, "arrays": shapes}, indent=1))
            temporary.chmod(0o755)  # mkdtemp makes it private to this user
            if place.exists():
                found = _load(place)
                if found is not None:  # without a lock another node may have been first, and its ranks map these files
                    return found
                shutil.rmtree(place, ignore_errors=True)  # damaged
            with suppress(OSError):  # another node was first; its content is the same
                temporary.rename(place)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return _load(place) or arrays


def _load(place: Path) -> Arrays | None:
    """Load the arrays of a folder; None if it is missing or damaged."""
    try:
        described = json.loads((place / _DESCRIPTION).read_text())["arrays"]
        arrays: Arrays = {}
        for name, (dtype, shape) in described.items():
            arrays[name] = np.load(place / f"{name}.npy", mmap_mode="r", allow_pickle=False)
            if arrays[name].dtype.str != dtype or list(arrays[name].shape) != shape:
                raise ValueError(f"{name} is {arrays[name].dtype.str} {arrays[name].shape}")
        return arrays
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("rebuilding the damaged index in %s (%s)", place, error)
        return None
