"""What a rank is doing right now, and how long it computed: written by its training thread, read by its watchdog."""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from typing import Any, NamedTuple

from deepspeed.accelerator import get_accelerator

from megatron_slm.device import on_gpu

_REMEMBERED = 50
"""Durations of a phase that its median is taken over."""


class Phase(Enum):
    """What the training loop is at."""

    STARTING = "starting"
    STEP = "a training step"
    EVALUATION = "a batch of an evaluation"
    PROBE = "a probe"
    PROFILE = "writing a profile"
    SAVING = "saving"
    ENDING = "ending"


class Moment(NamedTuple):
    """A phase of the loop; times are of `time.monotonic`."""

    phase: Phase
    step: int
    since: float


class Place(NamedTuple):
    """An instruction of the schedule that is being run."""

    number: int
    """In the stage's program, from 0."""
    length: int
    """Of the program."""
    name: str
    micro_batch: int
    """-1 where it has no meaning."""
    since: float


class Activity:
    """Where this rank is.

    Each field is replaced as a whole, so another thread reads a consistent one without a lock.
    """

    def __init__(self) -> None:
        self.moment = Moment(Phase.STARTING, 0, time.monotonic())
        self.place: Place | None = None
        """None outside of a schedule."""
        self.waiting_for: str | None = None
        """The channel that is waited for."""
        self.durations: dict[Phase, deque[float]] = defaultdict(lambda: deque(maxlen=_REMEMBERED))
        self._host_seconds = 0.0
        self._device_events: list[tuple[Any, Any]] = []

    def enter(self, phase: Phase, step: int) -> None:
        """The loop is through with the phase before, and starts this one of (after) `step`."""
        now = time.monotonic()
        self.durations[self.moment.phase].append(now - self.moment.since)
        self.moment, self.place = Moment(phase, step, now), None

    def at(self, number: int, length: int, name: str, micro_batch: int) -> None:
        """An instruction of the schedule starts."""
        self.place = Place(number, length, name, micro_batch, time.monotonic())

    @contextmanager
    def waiting(self, channel: str) -> Iterator[None]:
        """Inside, another rank is waited for."""
        self.waiting_for = channel
        try:
            yield
        finally:
            self.waiting_for = None

    @contextmanager
    def working(self, *, on_device: bool = True) -> Iterator[None]:
        """Count what happens inside as this rank's own work, where it is a training step's.

        On a GPU what it is told to do there is timed by events in its own stream, which nothing waits for here.
        """
        if self.moment.phase is not Phase.STEP:
            yield
        elif on_device and on_gpu():
            start, end = (get_accelerator().Event(enable_timing=True) for _ in range(2))
            start.record()
            yield
            end.record()
            self._device_events.append((start, end))
        else:
            started = time.perf_counter()
            yield
            self._host_seconds += time.perf_counter() - started

    def take_work_seconds(self) -> float:
        """How long this rank worked since this was last asked; the device has finished it by now."""
        seconds = self._host_seconds + sum(start.elapsed_time(end) / 1e3 for start, end in self._device_events)
        self._host_seconds, self._device_events = 0.0, []
        return seconds
