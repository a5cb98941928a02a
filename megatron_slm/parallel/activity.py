"""Current activity of a rank: written by its training thread, read by its watchdog."""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from typing import NamedTuple

_REMEMBERED = 50
"""Number of latest durations of a state that its median is taken over."""


class LoopState(Enum):
    """States of the training loop."""

    STARTING = "starting"
    STEP = "training"
    EVALUATION = "evaluating"
    PROBE = "probing"
    PROFILE = "writing a profile"
    SAVING = "saving"
    ENDING = "ending"


class Moment(NamedTuple):
    """The loop's current state, since `since` (`time.monotonic`, seconds)."""

    state: LoopState
    step: int
    since: float


class Location(NamedTuple):
    """The instruction of the schedule being executed, since `since` (`time.monotonic`, seconds)."""

    number: int
    """Index in the stage's program, from 0."""
    length: int
    """Number of instructions in the program."""
    name: str
    micro_batch: int
    """Index of the micro-batch; -1 for instructions without one."""
    since: float


class Activity:
    """The loop state, schedule location and awaited channel of this rank.

    Each field is replaced as a whole, so other threads read consistent values without a lock.
    """

    def __init__(self) -> None:
        self.moment = Moment(LoopState.STARTING, 0, time.monotonic())
        self.location: Location | None = None
        """None outside a schedule."""
        self.waiting_for: str | None = None
        """Channel on which this rank waits for another rank."""
        self.durations: dict[LoopState, deque[float]] = defaultdict(lambda: deque(maxlen=_REMEMBERED))

    def enter(self, state: LoopState, step: int) -> None:
        """Record the end of the current state and the start of `state` at (or after) `step`."""
        now = time.monotonic()
        self.durations[self.moment.state].append(now - self.moment.since)
        self.moment, self.location = Moment(state, step, now), None

    def at(self, number: int, length: int, name: str, micro_batch: int) -> None:
        """Record the start of an instruction of the schedule."""
        self.location = Location(number, length, name, micro_batch, time.monotonic())

    @contextmanager
    def waiting(self, channel: str) -> Iterator[None]:
        """Record `channel` as waited for, inside the context."""
        self.waiting_for = channel
        try:
            yield
        finally:
            self.waiting_for = None
