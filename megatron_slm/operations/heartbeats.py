"""What every rank last said of itself, in a store that works while collectives do not."""

from __future__ import annotations

import json
import os
import queue
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from megatron_slm.errors import PeerError
from megatron_slm.parallel.collectives import broadcast_from_rank_0, raise_on_all_ranks

_ANSWER_SECONDS = 5.0
_LEAVE = timedelta(seconds=15)


class StoreLostError(Exception):
    """Rank 0's process, which keeps the store, is gone."""


class StoreSilentError(Exception):
    """Rank 0's process, which keeps the store, does not answer: it is stopped, or the way to it is cut."""


class Heartbeats:
    """A key-value store of this run alone, kept by rank 0; its connection is not the one that groups are made with.

    Collective over the world. One thread of each rank uses it.

    Raises:
        PeerError: a rank does not reach rank 0's port.
    """

    def __init__(self, record: Mapping[str, Any]) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self._line = _Line()
        host = os.environ["MASTER_ADDR"]
        with raise_on_all_ranks():
            if self.rank == 0:
                self._store = _open(host, 0, is_master=True)
        port = broadcast_from_rank_0(self._store.port if self.rank == 0 else 0)
        with raise_on_all_ranks():
            if self.rank != 0:
                self._store = _open(host, port, is_master=False)
            self.say(record)
        # every rank's record is there from here on

    def say(self, record: Mapping[str, Any]) -> None:
        """Replace what this rank said of itself.

        Raises:
            StoreLostError: (as all methods) rank 0 is gone.
            StoreSilentError: (as all methods) rank 0 does not answer.
        """
        self._call("set", f"rank/{self.rank}", json.dumps(record))

    def all(self) -> list[dict[str, Any]]:
        """What each rank last said, by rank."""
        return [json.loads(text) for text in self._call("multi_get", [f"rank/{r}" for r in range(self.size)])]

    def offer(self, key: str, value: Mapping[str, Any]) -> None:
        """Set what nobody has set before."""
        self._call("compare_set", key, "", json.dumps(value))

    def get(self, key: str) -> dict[str, Any] | None:
        """What was set, without waiting for it."""
        return json.loads(self._call("get", key)) if self._call("check", [key]) else None

    def leave(self) -> None:
        """Nothing more is said here. Rank 0, with which the store goes, waits a little for all others to say so."""
        with suppress(StoreLostError, StoreSilentError):
            self._call("set", f"left/{self.rank}", "")
        self._line.close()
        if self.rank == 0:
            with suppress(RuntimeError):  # not all came to leave
                self._store.wait([f"left/{rank}" for rank in range(self.size)], _LEAVE)

    def _call(self, method: str, *args: Any) -> Any:
        return self._line.call(getattr(self._store, method), *args)


class _Line:
    """Calls that are given up after a while: those of the store wait for an answer as long as the connection stands."""

    def __init__(self) -> None:
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._is_free = threading.Event()
        self._is_free.set()
        self._thread = threading.Thread(target=self._run, name="heartbeats", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while (work := self._work.get()) is not None:
            work()
            del work  # it holds the store
            self._is_free.set()

    def close(self) -> None:
        """No call comes any more."""
        self._work.put(None)
        self._thread.join(_ANSWER_SECONDS)

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """What the function returns."""
        if not self._is_free.is_set():
            raise StoreSilentError  # the call before was given up and has not returned
        self._is_free.clear()
        results: list[Any] = []
        errors: list[Exception] = []

        def work() -> None:
            try:
                results.append(function(*args))
            except Exception as error:
                errors.append(error)

        self._work.put(work)
        if not self._is_free.wait(_ANSWER_SECONDS):
            raise StoreSilentError
        if errors:
            raise StoreLostError(str(errors[0])) from errors[0]
        return results[0]


def _open(host: str, port: int, *, is_master: bool) -> TCPStore:
    try:
        return TCPStore(host, port, is_master=is_master, wait_for_workers=False, timeout=timedelta(seconds=60.0))
    except RuntimeError as error:
        raise PeerError(
            "heartbeats",
            f"{host}:{port}",
            f"is a port of rank 0's node that every rank reaches ({str(error).splitlines()[0]})",
            "open the ports between the nodes, or switch the watchdog off with --watchdog-factor 0",
        ) from error
