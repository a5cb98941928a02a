"""Who holds a run up: what ranks say of themselves, read together. Pure, but for reading the own stack."""

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
    """What a rank says of itself; times are seconds."""

    rank: int
    host: str
    pid: int
    beat: int
    """Counts up as long as the rank's process runs."""
    phase: str
    step: int
    phase_seconds: float
    instruction: str | None = None
    """What it runs of its schedule; None outside of one."""
    micro_batch: int = -1
    number: int = 0
    length: int = 1
    instruction_seconds: float = 0.0
    waiting_for: str | None = None
    """The other rank and the channel, or that it is in a collective; None where it waits for no other rank."""
    ended: str | None = None
    """Why it is about to end."""
    stack: str = ""

    @property
    def progress(self) -> tuple[int, float]:
        """The step, and how far through its schedule."""
        return self.step, self.number / self.length if self.instruction else 0.0

    @property
    def name(self) -> str:
        """The rank and where to find it."""
        return f"rank {self.rank} (host {self.host}, pid {self.pid})"

    @property
    def doing(self) -> str:
        """Phase, step and place in the schedule."""
        text = f"{self.phase} of step {self.step}"
        if self.instruction is None:
            return f"{text}, for {self.phase_seconds:.0f} s"
        of_batch = f" of micro-batch {self.micro_batch}" if self.micro_batch >= 0 else ""
        place = f"instruction {self.number + 1} of {self.length}"
        return f"{text}, {self.instruction}{of_batch} ({place}), for {self.instruction_seconds:.0f} s"

    def to_dict(self) -> dict[str, Any]:
        """For the store."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Which ranks hold the run up, and why that is thought of them."""

    ranks: tuple[int, ...]
    text: str


def verdict(before: Sequence[Record], now: Sequence[Record]) -> Verdict:
    """Read two rounds of records, taken long enough apart for each rank's `beat` to have gone on.

    In this order: ranks without a sign of life; of those that wait for no other rank the one that is least far;
    where all wait for each other the one that is least far.
    """
    silent = [r for r in now if r.beat == before[r.rank].beat and r.ended is None]
    if silent:
        text = "; ".join(f"{r.name} gives no sign of life, last seen in {r.doing}" for r in silent)
        return Verdict(ranks=tuple(r.rank for r in silent), text=text)
    failed = [r for r in now if r.ended is not None and not r.ended.startswith("PeerError")]
    if failed:
        text = "; ".join(f"{r.name} ended with {r.ended}" for r in failed)
        return Verdict(ranks=tuple(r.rank for r in failed), text=text)
    busy = [r for r in now if r.waiting_for is None and r.ended is None]
    first = min(busy or now, key=lambda r: r.progress)
    if busy:
        return Verdict(ranks=(first.rank,), text=f"{first.name} waits for no other rank and is in {first.doing}")
    waits = f", {first.waiting_for}" if first.waiting_for else ""
    return Verdict(ranks=(first.rank,), text=f"all ranks wait; the least far is {first.name}, in {first.doing}{waits}")


def table(now: Sequence[Record], found: Verdict) -> str:
    """A line for each rank, and the stacks of those that are named."""
    lines = [f"{r.name}: {r.doing}; {r.waiting_for or r.ended or 'waits for no other rank'}" for r in now]
    for rank in found.ranks:
        if now[rank].stack:
            lines += ["", f"stack of rank {rank} (the innermost call last):", now[rank].stack]
    return "\n".join(lines)


def is_in_collective() -> bool:
    """Whether a thread of this process, other than the calling one, is in a collective operation.

    Backward passes on a GPU run in threads of their own, which is why all are looked at.
    """
    for thread, frame in sys._current_frames().items():
        if thread == threading.get_ident():
            continue
        for inner, _ in traceback.walk_stack(frame):
            if inner.f_code.co_filename.endswith(_COLLECTIVES):
                return True
    return False


def main_stack() -> str:
    """The main thread's innermost calls."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    return "".join(traceback.format_stack(frame)[-_FRAMES_SHOWN:]) if frame is not None else ""
