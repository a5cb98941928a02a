"""Caches sample indices on disk, so that a node builds each once and its ranks share the memory.

    CACHE/KEY/description.json, NAME.npy ...

A folder is written under a temporary name and renamed when whole; its name is a checksum of everything the content is
made from. So ranks and nodes need not agree on who builds: equal keys mean equal content, on a shared file system or
not. One process of each file system builds (`build_once`).
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from megatron_slm.data.build_once import build_once
from megatron_slm.data.corpus.indexed import IndexedCorpus, bin_path
from megatron_slm.data.corpus.open_files import OpenFile

logger = logging.getLogger(__name__)

_FORMAT = 1
_DESCRIPTION = "description.json"
Arrays = Mapping[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class Blocks:
    """An array that is built block by block, so that it is never in memory as a whole if it goes to disk."""

    dtype: npt.DTypeLike
    length: int
    blocks: Iterable[npt.NDArray[Any]]
    """Read once. Arrays after this one, in their order, may be complete only when the last block was read."""

    def whole(self) -> npt.NDArray[Any]:
        """Return the array in memory."""
        array, filled = np.empty(self.length, self.dtype), 0
        for block in self.blocks:
            array[filled : filled + len(block)] = block
            filled += len(block)
        return array

    def write(self, file: BinaryIO) -> None:
        """Write the array in numpy's format."""
        header = {"descr": np.dtype(self.dtype).str, "fortran_order": False, "shape": (self.length,)}
        np.lib.format.write_array_header_1_0(file, header)
        for block in self.blocks:
            file.write(np.ascontiguousarray(block, self.dtype).data)


Built = Mapping[str, npt.NDArray[Any] | Blocks]


class StoredArrays(Arrays):
    """The arrays of a folder, each mapped while it is in use."""

    def __init__(self, files: dict[str, OpenFile[npt.NDArray[Any]]]) -> None:
        self._files = files

    def __getitem__(self, name: str, /) -> npt.NDArray[Any]:
        return self._files[name].use()

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


class IndexCache:
    """Arrays, by the checksum of their inputs.

    Args:
        folder: folder of the cache, created on first use; None disables the cache.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    def arrays(self, kind: str, made_from: str, corpus: IndexedCorpus | None, build: Callable[[], Built]) -> Arrays:
        """Return the arrays of one index, mapped from disk; in memory if the folder is disabled or not writable.

        Args:
            kind: name of the kind of index, part of the key.
            made_from: fingerprint of everything that the arrays depend on.
            corpus: the indexed corpus, whose size becomes part of the key too.
            build: builds the arrays.
        """
        if self.folder is None:
            return _in_memory(build())
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
            return _in_memory(build())

    def _store(self, place: Path, built: Built, description: dict[str, Any]) -> Arrays:
        temporary = Path(tempfile.mkdtemp(prefix=f".{place.name}-", dir=place.parent))
        try:
            shapes = {}
            for name, array in built.items():
                with (temporary / f"{name}.npy").open("wb") as file:
                    if isinstance(array, Blocks):
                        array.write(file)
                        shapes[name] = [np.dtype(array.dtype).str, [array.length]]
                    else:
                        np.save(file, array, allow_pickle=False)
                        shapes[name] = [array.dtype.str, list(array.shape)]
                    file.flush()
                    os.fsync(file.fileno())
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
        stored = _load(place)
        if stored is None:
            raise OSError(errno.EIO, "an index that was just written cannot be read", str(place))
        return stored


def _in_memory(built: Built) -> Arrays:
    return {name: array.whole() if isinstance(array, Blocks) else array for name, array in built.items()}


def _load(place: Path) -> Arrays | None:
    """Load the arrays of a folder; None if it is missing or damaged."""
    try:
        described = json.loads((place / _DESCRIPTION).read_text())["arrays"]
        files = {}
        for name, (dtype, shape) in described.items():
            path = place / f"{name}.npy"
            files[name] = OpenFile(path, partial(np.load, path, mmap_mode="r", allow_pickle=False))
            array = files[name].use()
            if array.dtype.str != dtype or list(array.shape) != shape:
                raise ValueError(f"{name} is {array.dtype.str} {array.shape}")
        return StoredArrays(files)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("rebuilding the damaged index in %s (%s)", place, error)
        return None
