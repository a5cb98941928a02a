"""Keeps few of a process's files open, however many it reads: those used last.

A blend may have thousands of corpora, and each has several files. A file that was closed is opened again when it is
used again; what is still held of it stays valid until then.
"""

from __future__ import annotations

import os
import resource
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Generic, TypeVar

from megatron_slm.errors import CorpusError

T = TypeVar("T")

MOST_OPEN = 8192
"""Files that are kept open where the process may open many. A process may have 65,530 maps."""
_SHARE_OF_LIMIT = 4
"""One in this many of the files that the process may open; the others are for libraries, workers and sockets."""

# Its operations are atomic, so threads need no lock; two may open one file at once, and one of the two is closed.
_opened: OrderedDict[int, Any] = OrderedDict()


class OpenFile(Generic[T]):
    """A file of many.

    Args:
        path: the file.
        open_file: opens it: a map, or a handle that closes itself when nobody holds it anymore.
    """

    def __init__(self, path: Path, open_file: Callable[[], T]) -> None:
        self.path, self._open_file = path, open_file
        self._seen: tuple[int, int] | None = None

    def use(self) -> T:
        """Return the open file.

        Raises:
            CorpusError: it was changed after it was first opened.
            OSError: it cannot be opened, unless `open_file` raises another error for that.
        """
        key = id(self)
        with suppress(KeyError):
            _opened.move_to_end(key)
            found: T = _opened[key]
            return found
        opened = self._open_file()
        self._check_unchanged()
        _opened[key] = opened
        most = _most_open()
        while len(_opened) > most:
            with suppress(KeyError):  # another thread closed it
                _opened.popitem(last=False)
        return opened

    def forget(self) -> None:
        """Close the file after an error; the next use takes whatever is at its path."""
        self._seen = None
        _opened.pop(id(self), None)

    def __del__(self) -> None:
        _opened.pop(id(self), None)

    def _check_unchanged(self) -> None:
        found = os.stat(self.path)
        now = (found.st_size, found.st_mtime_ns)
        if self._seen not in (None, now):
            raise CorpusError(
                "file", str(self.path), "stay as it is while it is read", "write another file instead, and start again"
            )
        self._seen = now


def _most_open() -> int:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MOST_OPEN if soft == resource.RLIM_INFINITY else max(1, min(MOST_OPEN, soft // _SHARE_OF_LIMIT))
