"""Has one of many processes build something on a file system that they share, however long it takes.

The builder creates a lock file and a heartbeat touches it; all others wait while it lives. A lock that has not been
touched for a minute, or whose process is gone from this host, is a killed builder's: another process takes its place.
The file system's own locks are not used: not every shared one has them. Two processes may still build at once (a heart
that stopped beating for a minute), so what is built must be renamed into place.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

HEARTBEAT_SECONDS = 5.0
STALE_SECONDS = 60.0
LONGEST_POLL_SECONDS = 5.0
"""A thousand waiting ranks look at the lock this often."""

_HEART = """
import os, select, sys
parent, seconds, idle_seconds = int(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3])
locks, idle = set(), 0.0
while os.getppid() == parent and idle < idle_seconds:
    if select.select([0], [], [], seconds)[0]:
        received = os.read(0, 65536)
        if not received:
            break
        for message in received.decode().split(chr(0))[:-1]:
            (locks.add if message[0] == "+" else locks.discard)(message[1:])
        continue
    idle = 0.0 if locks else idle + seconds
    for lock in locks:
        try:
            os.utime(lock)
        except OSError:
            pass
"""
"""A process of its own, since a long operation of numpy would hold up a thread. It reads paths of locks to touch (+) or
not to touch anymore (-), each ended by a NUL, and ends with its parent or when it has not been needed for a while."""
_IDLE_SECONDS = 60.0


def build_once(lock: Path, load: Callable[[], T | None], build: Callable[[], T]) -> T:
    """Return what `load` finds, or what `build` builds here, or else what another process has built meanwhile.

    Args:
        lock: path of the lock file; its folder exists.
        load: returns None where nothing was built yet.

    Raises:
        OSError: the lock file cannot be created.
    """
    while not _take(lock):
        _wait(lock)
        found = load()
        if found is not None:
            return found
    with _beating(lock):
        found = load()  # another process may have been done just before this one took the lock
        return build() if found is None else found


def _take(lock: Path) -> bool:
    try:
        handle = os.open(lock, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    except FileExistsError:
        return False
    with os.fdopen(handle, "w") as file:
        file.write(f"{socket.gethostname()} {os.getpid()}")
    return True


class _Heart:
    """This process's heart, which beats for all that it builds: there may be an index for each of many corpora."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._pid = 0

    def begin(self, lock: Path) -> None:
        """Touch a lock from now on."""
        while self._process is None or self._pid != os.getpid() or not self._tell(f"+{lock}"):
            self._pid = os.getpid()
            arguments = [str(self._pid), str(HEARTBEAT_SECONDS), str(_IDLE_SECONDS)]
            command = [sys.executable, "-S", "-c", _HEART, *arguments]
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0)

    def end(self, lock: Path) -> None:
        """Touch a lock no more."""
        self._tell(f"-{lock}")

    def _tell(self, message: str) -> bool:
        assert self._process is not None
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(f"{message}\0".encode())
        except BrokenPipeError:  # it was idle, or was killed
            self._process.wait()
            return False
        return True


_heart = _Heart()


@contextmanager
def _beating(lock: Path) -> Iterator[None]:
    _heart.begin(lock)
    try:
        yield
    finally:
        _heart.end(lock)
        lock.unlink(missing_ok=True)


def _wait(lock: Path) -> None:
    """Wait until the lock is gone; remove it if its holder is."""
    poll_seconds = 0.05
    touched, changed_at = None, time.monotonic()
    while True:
        try:
            with lock.open() as file:  # opening a file renews what a network file system has cached of it
                now, holder = os.fstat(file.fileno()).st_mtime_ns, file.read()
        except FileNotFoundError:
            return
        if now != touched:
            touched, changed_at = now, time.monotonic()
        if _is_gone(holder) or time.monotonic() - changed_at > STALE_SECONDS:
            aside = lock.with_name(f"{lock.name}-{uuid.uuid4().hex}")
            with suppress(FileNotFoundError):  # another waiter was first
                lock.rename(aside)
                aside.unlink()
            return
        time.sleep(poll_seconds)
        poll_seconds = min(2 * poll_seconds, LONGEST_POLL_SECONDS)


def _is_gone(holder: str) -> bool:
    """Return True if the holder's process ran on this host and does not anymore."""
    host, _, process = holder.rpartition(" ")
    if host != socket.gethostname() or not process.isdigit():
        return False
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # of another user
        return False
    return False
