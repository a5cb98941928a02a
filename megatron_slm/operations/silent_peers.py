"""Detects ranks whose heartbeat stopped, where no communication library would report them.

Gloo raises in every rank whose connection to a dead one closes. NCCL does not: inside a node no connection exists that
could close, its kernels wait on the device until its own time-out, and then its thread ends the process by a signal.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from megatron_slm.operations.hang_report import Record
from megatron_slm.parallel.activity import LoopState

SILENT_SECONDS = 60.0
"""Time without a heartbeat after which a rank is lost. A rank that computes, waits or saves still has one; a call that
holds the interpreter's lock for longer has not."""
_LOOKS = 10
"""Times that all records are read in `SILENT_SECONDS`."""


class SilentPeers:
    """Remembers when each rank's heartbeat was last seen to advance; used by the rank that hosts the heartbeats."""

    def __init__(self) -> None:
        self._heard: dict[int, tuple[int, float]] = {}
        self._read_at = float("-inf")

    def found(self, records: Callable[[], Sequence[Record]], now: float) -> list[int]:
        """Return the ranks that are silent for `SILENT_SECONDS`; reads the records only every tenth of that.

        Args:
            records: reads every rank's latest record.
            now: time in seconds, of a clock that never goes back.
        """
        if now - self._read_at < SILENT_SECONDS / _LOOKS:
            return []
        self._read_at = now
        silent = []
        for record in records():
            beat, since = self._heard.get(record.rank, (-1, now))
            if record.beat != beat:
                self._heard[record.rank] = record.beat, now
            elif now - since > SILENT_SECONDS and record.ended is None and record.state != LoopState.ENDING.value:
                silent.append(record.rank)
        return silent
