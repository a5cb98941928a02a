"""Ranks without a heartbeat are found, and nobody else."""

from __future__ import annotations

from megatron_slm.operations.hang_report import Record
from megatron_slm.operations.silent_peers import SILENT_SECONDS, SilentPeers


def record(rank: int, beat: int, **changes: object) -> Record:
    values = {"rank": rank, "host": "n", "pid": rank, "beat": beat, "state": "a training step", "step": 5}
    return Record(**{**values, "state_seconds": 1.0, **changes})  # type: ignore[arg-type]


def watch(beats: dict[int, list[int]], **changes: object) -> list[int]:
    """What is found after as many looks as there are beats, each a tenth of the limit after the last."""
    peers, found = SilentPeers(), list[int]()
    for look in range(len(beats[0])):
        now = look * SILENT_SECONDS / 10
        found = peers.found(lambda look=look: [record(r, b[look], **changes) for r, b in beats.items()], now)
    return found


def test_a_rank_that_stopped_is_found_and_no_other() -> None:
    going = list(range(14))
    assert watch({0: going, 1: [3] * 14, 2: going}) == [1]
    assert watch({0: going, 1: [3] * 10 + [4] * 4, 2: going}) == [], "it was only late"
    assert watch({0: going, 1: [*going[:12], 11, 11], 2: going}) == []


def test_ranks_that_ended_or_are_leaving_are_not_lost() -> None:
    assert watch({0: [1] * 14}, ended="RuntimeError: CUDA out of memory") == []
    assert watch({0: [1] * 14}, state="ending") == []


def test_records_are_not_read_at_every_look() -> None:
    peers, reads = SilentPeers(), 0

    def records() -> list[Record]:
        nonlocal reads
        reads += 1
        return []

    for second in range(int(SILENT_SECONDS)):
        peers.found(records, float(second))
    assert reads == 10
