"""What a rank is doing right now: written by its training thread, read by its watchdog."""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from typing import NamedTuple

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
