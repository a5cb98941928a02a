"""The latest record of every rank, in a key-value store that works while collectives hang."""

from __future__ import annotations

import json
import os
import queue
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, wait
from contextlib import suppress
from datetime import timedelta
from functools import partial
from typing import Any

import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from megatron_slm.errors import PeerError
from megatron_slm.parallel.collectives import broadcast_from_rank_0
from megatron_slm.parallel.meeting import raise_on_all_ranks

_CALL_SECONDS = 5.0
_CONNECT = timedelta(seconds=60)
_LEAVE = timedelta(seconds=15)


class StoreLostError(Exception):
    """Raised when rank 0's process, which hosts the store, is gone."""


class StoreSilentError(Exception):
    """Raised when rank 0's process, which hosts the store, does not respond: stopped, or disconnected."""


class Heartbeats:
    """Key-value store of one run, hosted by rank 0 on a port of its own.

    Collective over the world. Each rank uses it from one thread.

    Raises:
        PeerError: a rank cannot reach rank 0's port.
    """

    def __init__(self, record: Mapping[str, Any]) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self._connection = _Connection()
        host = os.environ["MASTER_ADDR"]
        with raise_on_all_ranks():
            if self.rank == 0:
                self._store = _open(host, 0, is_master=True)
        port = broadcast_from_rank_0(self._store.port if self.rank == 0 else 0)
        with raise_on_all_ranks():
            if self.rank != 0:
                self._store = _open(host, port, is_master=False)
            self.publish(record)
        # from here on the store holds a record of every rank

    def publish(self, record: Mapping[str, Any]) -> None:
        """Replace this rank's record.

        Raises:
            StoreLostError: (as all methods) rank 0 is gone.
            StoreSilentError: (as all methods) rank 0 does not respond.
        """
        self._call("set", f"rank/{self.rank}", json.dumps(record))

    def records(self) -> list[dict[str, Any]]:
        """Return the latest record of every rank, by rank."""
        return [json.loads(text) for text in self._call("multi_get", [f"rank/{r}" for r in range(self.size)])]

    def set_once(self, key: str, value: Mapping[str, Any]) -> None:
        """Set a key, unless a rank has set it already."""
        self._call("compare_set", key, "", json.dumps(value))

    def get(self, key: str) -> dict[str, Any] | None:
        """Return the value of a key, or None if it is not set; does not wait."""
        return json.loads(self._call("get", key)) if self._call("check", [key]) else None

    def leave(self) -> None:
        """Disconnect; rank 0, which hosts the store, first waits a little for the other ranks to leave."""
        with suppress(StoreLostError, StoreSilentError):
            self._call("set", f"left/{self.rank}", "")
        self._connection.close()
        if self.rank == 0:
            with suppress(RuntimeError):  # some ranks did not leave in time
                self._store.wait([f"left/{rank}" for rank in range(self.size)], _LEAVE)

    def _call(self, method: str, *args: Any) -> Any:
        return self._connection.call(getattr(self._store, method), *args)


class _Connection:
    """Makes the store's calls on a daemon thread, with a timeout.

    The store's own calls block as long as the TCP connection exists. An executor's threads would block the process's
    exit in the same way.
    """

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._latest: Future[Any] | None = None
        self._thread = threading.Thread(target=self._run, name="heartbeats", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while (call := self._calls.get()) is not None:
            call()
            del call  # it references the store

    def close(self) -> None:
        """End the thread once it is idle."""
        self._calls.put(None)
        self._thread.join(_CALL_SECONDS)

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """Return the function's result.

        Raises:
            StoreLostError: the function raised.
            StoreSilentError: it did not return in time, or the call before it has still not returned.
        """
        if self._latest is not None and not self._latest.done():
            raise StoreSilentError
        self._latest = result = Future[Any]()
        self._calls.put(partial(_resolve, result, function, *args))
        if not wait([result], _CALL_SECONDS).done:
            raise StoreSilentError
        if (error := result.exception()) is not None:
            raise StoreLostError(str(error)) from error
        return result.result()


def _resolve(result: Future[Any], function: Callable[..., Any], *args: Any) -> None:
    try:
        result.set_result(function(*args))
    except Exception as error:
        result.set_exception(error)


def _open(host: str, port: int, *, is_master: bool) -> TCPStore:
    try:
        return TCPStore(host, port, is_master=is_master, wait_for_workers=False, timeout=_CONNECT)
    except RuntimeError as error:
        raise PeerError(
            "heartbeat store",
            f"{host}:{port}",
            f"be reachable from every rank ({str(error).splitlines()[0]})",
            "open the ports between the nodes, or disable the watchdog with --watchdog-factor 0",
        ) from error
