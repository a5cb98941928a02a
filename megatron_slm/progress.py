"""Progress of long work in tools: a bar with rate and time left on a terminal, plain lines elsewhere.

The bar has no thread of its own: workers that are forked under one would inherit a half-held lock, and the system ends
workers with the thread that made them.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from rich.progress import Progress as Bar
    from rich.progress import TaskID

logger = logging.getLogger(__name__)

T = TypeVar("T")
Clock = Callable[[], float]
LINE_SECONDS, BAR_SECONDS = 10.0, 0.1
"""Least time between two plain lines, and between two pictures of the bar."""


def time_left(seconds: float) -> str:
    """Format a duration, such as `0:01:05` or `2 days, 3:00:00`."""
    return str(timedelta(seconds=round(seconds)))


class Progress:
    """Counts the work that is done, and shows it from time to time.

    Args:
        title: begins each line.
        total: size of the work in `unit`; None if unknown.
        unit: what is counted, in the plural; `B` for bytes, shown as MB.
        clock: returns seconds.
    """

    def __init__(self, title: str, total: float | None, unit: str, *, clock: Clock = time.monotonic) -> None:
        self.title, self.total, self.unit, self.done = title, total, unit, 0.0
        self._clock, self._started = clock, clock()
        self._shown_at, self._interval = self._started, LINE_SECONDS
        self._bar: Bar | None = None
        self._task: TaskID | None = None
        self._printed = False

    def advance(self, count: float = 1) -> None:
        """Count further work as done."""
        self.update(self.done + count)

    def update(self, done: float, total: float | None = None, *, text: str | None = None) -> None:
        """Set how much work is done.

        Args:
            total: the size of the work, where it became known or changed.
            text: replaces the counts, rate and time left.
        """
        self.done, self.total = done, self.total if total is None else total
        now = self._clock()
        if now - self._shown_at >= self._interval:
            self._shown_at = now
            self._show(text or self.text(now))

    def text(self, now: float) -> str:
        """Return counts, rate and time left, such as `12 of 40 files, 3.1 files/s, 0:00:09 left`."""
        seconds = max(now - self._started, 1e-9)
        rate = self.done / seconds
        scale, unit = (1e6, "MB") if self.unit == "B" else (1.0, self.unit)
        counted = _number(self.done / scale)
        if self.total is not None:
            counted += f" of {_number(self.total / scale)}"
        parts = [f"{counted} {unit}", f"{_number(rate / scale)} {unit}/s"]
        if self.total is not None and 0 < self.done < self.total:
            parts.append(f"{time_left((self.total - self.done) / rate)} left")
        return ", ".join(parts)

    def _show(self, text: str) -> None:
        if self._bar is None:
            self._printed = True
            logger.info("%s: %s", self.title, text)
        else:
            assert self._task is not None, "set with the bar"
            self._bar.update(self._task, completed=self.done, total=self.total, text=text, refresh=True)

    def _finish(self) -> None:
        if self._printed or self._bar is not None:
            self._show(self.text(self._clock()))


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.2g}"


@contextmanager
def show_progress(
    title: str, total: float | None = None, unit: str = "", *, shown: bool = True, clock: Clock = time.monotonic
) -> Iterator[Progress]:
    """Show how far the work inside the context is: on standard error, where work takes longer than ten seconds.

    Args:
        title, total, unit, clock: see `Progress`.
        shown: False shows nothing (on other ranks than 0).
    """
    progress = Progress(title, total, unit, clock=clock)
    if not shown:
        progress._interval = float("inf")
        yield progress
        return
    if not sys.stderr.isatty():
        yield progress
        progress._finish()
        return
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.fields[text]}", markup=False),
    )
    with Bar(*columns, console=Console(stderr=True), auto_refresh=False) as bar:
        progress._bar, progress._task, progress._interval = bar, bar.add_task(title, total=total, text=""), BAR_SECONDS
        yield progress
        progress._finish()


def track(items: Iterable[T], title: str, unit: str, *, shown: bool = True) -> Iterator[T]:
    """Yield the items and show how many of them are done; the arguments are those of `show_progress`."""
    total = len(items) if isinstance(items, Sized) else None
    with show_progress(title, total, unit, shown=shown) as progress:
        for item in items:
            yield item
            progress.advance()
