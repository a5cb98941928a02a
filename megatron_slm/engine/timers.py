"""Timers of the parts of a step, by Megatron's names. They do not wait for the device while a step runs."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import takewhile
from typing import Any

from megatron_slm.device import timing_event

TIMERS: dict[str, int] = {
    "batch-generator": 1,
    "all-grads-sync": 1,
    "optimizer": 1,
    "forward-compute": 2,
    "loss-head": 2,
    "backward-compute": 2,
    "reference-forward-compute": 2,
    "forward-recv": 2,
    "backward-recv": 2,
    "reference-recv": 2,
    "send": 2,
}
"""Every timer, and the lowest `--timing-log-level` that runs it."""

WORK = ("batch-generator", "forward-compute", "backward-compute", "reference-forward-compute")
"""Timers of a rank's own work, which run at any level: they tell slow ranks from those that wait for them."""

_MOST_PENDING = 1024
"""Intervals of a GPU that are kept; beyond these, those that are over are added up."""


class Timers:
    """Sums of intervals by name, on this rank.

    On a GPU an interval lies between two events of the stream, so that nothing is waited for until `read`; the time the
    host takes meanwhile does not count. On the CPU it is wall-clock time.

    Args:
        level: 0 times work alone, 1 a few intervals a step, 2 some for every micro-batch.
        work: the timers that hold no wait for other ranks.
    """

    def __init__(self, level: int = 0, *, work: Sequence[str] = WORK) -> None:
        self.names = tuple(name for name, least in TIMERS.items() if least <= level)
        """Timers of the level."""
        self.work = work
        self._running = {*self.names, *work}
        self._seconds: dict[str, float] = defaultdict(float)
        self._intervals: dict[str, list[float]] | None = None
        self._pending: list[tuple[str, Any, Any]] = []
        self._off = nullcontext()

    def timing(self, name: str) -> AbstractContextManager[None]:
        """Time the code inside, if the timer is work or of the level."""
        return self._timing(name) if name in self._running else self._off

    @contextmanager
    def _timing(self, name: str) -> Iterator[None]:
        begin, end = timing_event(), timing_event()
        if begin is None or end is None:
            started = time.perf_counter()
            yield
            self._add(name, time.perf_counter() - started)
            return
        begin.record()
        yield
        end.record()
        self._pending.append((name, begin, end))
        if len(self._pending) > _MOST_PENDING:
            self._settle([*takewhile(lambda interval: interval[2].query(), self._pending)])

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time nothing inside: work beside training steps is no part of them."""
        running, self._running = self._running, set()
        try:
            yield
        finally:
            self._running = running

    def keep_intervals(self) -> None:
        """Keep the length of every interval from now on, beside the sums."""
        self._settle_all()
        self._intervals = defaultdict(list)

    def take_intervals(self) -> dict[str, list[float]]:
        """Return the seconds of every interval since `keep_intervals`, by timer, and stop keeping them.

        Waits for the device.
        """
        self._settle_all()
        assert self._intervals is not None, "intervals were not kept"
        intervals, self._intervals = dict(self._intervals), None
        return intervals

    def read(self) -> dict[str, float]:
        """Return the seconds of each timer that ran since the last reading. Waits for the device."""
        self._settle_all()
        seconds, self._seconds = dict(self._seconds), defaultdict(float)
        return seconds

    def _add(self, name: str, seconds: float) -> None:
        self._seconds[name] += seconds
        if self._intervals is not None:
            self._intervals[name].append(seconds)

    def _settle(self, over: Sequence[tuple[str, Any, Any]]) -> None:
        """Add up the first pending intervals, which the device has passed."""
        for name, begin, end in over:
            self._add(name, begin.elapsed_time(end) / 1e3)
        del self._pending[: len(over)]

    def _settle_all(self) -> None:
        if self._pending:
            self._pending[-1][2].synchronize()
        self._settle(self._pending[:])
