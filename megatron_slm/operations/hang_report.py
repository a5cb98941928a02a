"""Finds the rank that holds a run up from one record per rank. Pure, except for reading this process's stacks."""

from __future__ import annotations

import sys
import threading
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

_COLLECTIVES = ("distributed_c10d.py", "_functional_collectives.py", "deepspeed/comm/comm.py")
_FRAMES_SHOWN = 14


@dataclass(frozen=True, kw_only=True)
class Record:
    """State of one rank; times in seconds."""

    rank: int
    host: str
    pid: int
    beat: int
    """Counter that increases as long as the process runs."""
    state: str
    """State of the training loop."""
    step: int
    state_seconds: float
    instruction: str | None = None
    """Schedule instruction in execution; None outside a schedule."""
    micro_batch: int = -1
    number: int = 0
    length: int = 1
    instruction_seconds: float = 0.0
    waiting_for: str | None = None
    """Rank and channel it waits for, or a collective; None when it waits for no other rank."""
    ended: str | None = None
    """Error that ended it; None while it runs."""
    stack: str = ""

    @property
    def progress(self) -> tuple[int, float]:
        """Step, and fraction of its schedule completed."""
        return self.step, self.number / self.length if self.instruction else 0.0

    @property
    def name(self) -> str:
        """Rank, host and process id."""
        return f"rank {self.rank} (host {self.host}, pid {self.pid})"

    @property
    def doing(self) -> str:
        """State, step and position in the schedule."""
        text = f"{self.state} at step {self.step}"
        if self.instruction is None:
            return f"{text} for {self.state_seconds:.0f} s"
        of_batch = f" of micro-batch {self.micro_batch}" if self.micro_batch >= 0 else ""
        position = f"instruction {self.number + 1} of {self.length}"
        return f"{text}, {self.instruction}{of_batch} ({position}) for {self.instruction_seconds:.0f} s"

    @property
    def waits(self) -> str:
        """Rank or collective it waits for, or the error that ended it."""
        return self.waiting_for or self.ended or "waiting for no other rank"

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON-compatible values."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """The ranks that most likely hold the run up, and the evidence."""

    ranks: tuple[int, ...]
    text: str


def diagnose(before: Sequence[Record], now: Sequence[Record]) -> Diagnosis:
    """Find the ranks that hold the run up, by the first rule that applies.

    1. Ranks whose `beat` did not increase: dead, stopped or disconnected.
    2. Ranks that failed with an error of their own.
    3. Of the ranks that wait for no other rank, the one with the least progress.
    4. If all ranks wait, the one with the least progress.

    Args:
        before: records of all ranks, by rank.
        now: the same, later by more than one beat of every rank.
    """
    silent = [r for r in now if r.beat == before[r.rank].beat and r.ended is None]
    if silent:
        text = "; ".join(f"{r.name} does not respond, last seen {r.doing}" for r in silent)
        return Diagnosis(ranks=tuple(r.rank for r in silent), text=text)
    failed = [r for r in now if r.ended is not None and not r.ended.startswith("PeerError")]
    if failed:
        text = "; ".join(f"{r.name} failed with {r.ended}" for r in failed)
        return Diagnosis(ranks=tuple(r.rank for r in failed), text=text)
    busy = [r for r in now if r.waiting_for is None and r.ended is None]
    if busy:
        slowest = min(busy, key=lambda r: r.progress)
        return Diagnosis(ranks=(slowest.rank,), text=f"{slowest.name} waits for no other rank: {slowest.doing}")
    slowest = min(now, key=lambda r: r.progress)
    waits = f", {slowest.waiting_for}" if slowest.waiting_for else ""
    text = f"all ranks wait; {slowest.name} has made the least progress: {slowest.doing}{waits}"
    return Diagnosis(ranks=(slowest.rank,), text=text)


def table(now: Sequence[Record], found: Diagnosis) -> str:
    """Format one line per rank, then the stacks of the ranks in the diagnosis."""
    lines = [f"{r.name}: {r.doing}; {r.waits}" for r in now]
    for rank in found.ranks:
        if now[rank].stack:
            lines += ["", f"stack of rank {rank} (innermost call last):", now[rank].stack]
    return "\n".join(lines)


def is_in_collective() -> bool:
    """Return True if any thread of this process but the calling one is in a collective operation.

    All threads are examined, because backward passes on a GPU run in threads of their own.
    """
    for thread, frame in sys._current_frames().items():
        if thread == threading.get_ident():
            continue
        for inner, _ in traceback.walk_stack(frame):
            if inner.f_code.co_filename.endswith(_COLLECTIVES):
                return True
    return False


def main_stack() -> str:
    """Return the main thread's innermost calls as text."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    return "".join(traceback.format_stack(frame)[-_FRAMES_SHOWN:]) if frame is not None else ""
