"""Has all ranks meet after work that may take one of them far longer than the others, and raise its errors."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist
from torch.distributed import distributed_c10d

from megatron_slm.device import select_device
from megatron_slm.errors import SlmError
from megatron_slm.parallel.collectives import all_gather_objects

_T = TypeVar("_T")

_ROUNDS_PER_TIME_OUT = 4
_LEAST_CPU_SECONDS = 1e-4
"""Used in a round by a rank that works; a rank that waits for another one's lock uses this much to look at it."""


_rounds_waited = 0


class _Still(Enum):
    WORKING = "working"


class Meeting:
    """Gathers one value of every rank once all of them have done their work, however long it takes. For one use.

    A collective fails on all ranks where one of them comes later than the time-out. So while a rank works, a thread of
    its process joins the collective, several times within the time-out, with the news that the rank is still working,
    and all gather again. Where no rank works that long, it is one collective. A rank that was killed is noticed as in
    any collective; for a rank that uses no CPU time (it hangs) the thread does not join, and the time-out ends the
    others.
    """

    def __init__(self) -> None:
        timeout = distributed_c10d._get_default_timeout(dist.Backend(dist.get_backend()))
        self._round_seconds = timeout.total_seconds() / _ROUNDS_PER_TIME_OUT
        self._is_done = threading.Event()
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._join_meanwhile, name="meeting", daemon=True)

    @contextmanager
    def working(self) -> Iterator[None]:
        """Do this rank's work inside the context, without communication.

        Raises:
            RuntimeError: another rank was lost meanwhile.
        """
        if dist.get_world_size() > 1:
            self._thread.start()
        try:
            yield
        finally:
            self._is_done.set()
        if self._thread.is_alive():
            self._thread.join()
        if self._error is not None:
            raise self._error

    def gather(self, value: _T) -> list[_T]:
        """Return every rank's value, by rank. Collective over the world, after `working`."""
        global _rounds_waited
        values = all_gather_objects(value)
        while any(one is _Still.WORKING for one in values):
            _rounds_waited += 1
            values = all_gather_objects(value)
        return values

    def _join_meanwhile(self) -> None:
        used = _cpu_seconds()
        while not self._is_done.wait(self._round_seconds):
            if abs(_cpu_seconds() - used) < _LEAST_CPU_SECONDS:  # a thread that has ended no longer counts
                continue
            try:
                select_device()  # a thread has its own
                all_gather_objects(_Still.WORKING)
            except Exception as error:  # raised when the work is done
                self._error = error
                return
            used = _cpu_seconds()


def rounds_waited() -> int:
    """Count how often, in all its meetings, this process has learnt that another one still works."""
    return _rounds_waited


_BEATING = ("watchdog", "heartbeats", "reach")
"""Threads that use some time while their rank hangs (`operations`)."""


def _cpu_seconds() -> float:
    """CPU time of Python's threads but the calling one and those that beat; where the system does not tell it, of the
    whole process.

    Threads of the communication library use some while others only wait for this rank.
    """
    own = threading.current_thread()
    others = (t.native_id for t in threading.enumerate() if t is not own and t.name not in _BEATING)
    try:
        return sum(int(Path(f"/proc/self/task/{tid}/schedstat").read_text().split()[0]) for tid in others) / 1e9
    except OSError:
        return time.process_time()


@contextmanager
def raise_on_all_ranks() -> Iterator[None]:
    """Raise on every rank the `SlmError` of the first rank that raises one inside the context.

    So no rank waits for a dead one, all end with one exit code, and one of them prints the error (`raised_by`).
    Collective over the world on exit; nothing inside may communicate. One rank may take longer inside than the time-out
    of a collective (`Meeting`). Without a process group (a dry run) only the own error is raised.
    """
    if not dist.is_initialized():
        yield
        return
    own: SlmError | None = None
    meeting = Meeting()
    with meeting.working():
        try:
            yield
        except SlmError as error:
            own = error
    for rank, raised in enumerate(meeting.gather(own)):
        if raised is None:
            continue
        if rank == dist.get_rank():
            assert own is not None, "it was just gathered"
            raise own
        raised.raised_by = rank
        raise raised from own
