"""The rank that holds a run up, from the records of all."""

from __future__ import annotations

import threading
from typing import Any

import torch.distributed as dist

from megatron_slm.operations.hang_report import Record, diagnose, is_in_collective, main_stack, table
from megatron_slm.parallel.groups import init_distributed
from tests.support.world import run_world


def record(rank: int, **values: Any) -> Record:
    common = {
        "rank": rank, "host": f"node{rank // 2}", "pid": 100 + rank, "beat": 2, "state": "training", "step": 7,
        "state_seconds": 90.0, "instruction": "ForwardPass", "micro_batch": 3, "number": 9, "length": 40,
        "instruction_seconds": 80.0,
    }  # fmt: skip
    return Record(**{**common, **values})


def judged(*now: Record, silent: tuple[int, ...] = ()) -> tuple[tuple[int, ...], str]:
    before = [Record(**{**r.to_dict(), "beat": r.beat - (r.rank not in silent)}) for r in now]
    found = diagnose(before, now)
    return found.ranks, found.text


def test_a_rank_that_does_not_respond_comes_first() -> None:
    ranks, text = judged(
        record(0, waiting_for="in a collective operation"), record(1), record(2, micro_batch=5), silent=(2,)
    )
    assert ranks == (2,)
    assert text == (
        "rank 2 (host node1, pid 102) does not respond, last seen training at step 7, ForwardPass of micro-batch 5 "
        "(instruction 10 of 40) for 80 s"
    )


def test_then_one_that_failed_by_itself_and_not_those_that_missed_it() -> None:
    ranks, text = judged(
        record(0, ended="PeerError: receiving"), record(1, ended="RuntimeError: out of memory"), record(2)
    )
    assert ranks == (1,)
    assert "rank 1 (host node0, pid 101) failed with RuntimeError: out of memory" in text


def test_a_rank_that_recorded_its_error_is_not_silent() -> None:
    assert judged(record(0), record(1, ended="PeerError: x"), silent=(1,))[0] == (0,)


def test_then_the_one_that_waits_for_no_other() -> None:
    waits = {"waiting_for": "receiving from rank 1, forward lane", "number": 2}
    ranks, text = judged(record(0, **waits), record(1), record(2, **waits))
    assert ranks == (1,)
    assert "waits for no other rank" in text


def test_of_several_the_one_with_the_least_progress() -> None:
    """Where the device is waited for, the host does not see which messages it waits for."""
    assert judged(record(0, number=39), record(1, number=4), record(2, number=12))[0] == (1,)
    assert judged(record(0, number=4, length=5), record(1, number=4, length=50))[0] == (1,), "by the share of the list"
    assert judged(record(0, number=4), record(1, step=6, number=39))[0] == (1,)
    assert judged(record(0), record(1, instruction=None))[0] == (1,)


def test_a_circle() -> None:
    waits = "receiving from rank 0, forward lane"
    ranks, text = judged(record(0, number=9, waiting_for="x"), record(1, number=8, waiting_for=waits))
    assert ranks == (1,)
    assert text.startswith(
        "all ranks wait; rank 1 (host node0, pid 101) has made the least progress: training at step 7"
    )
    assert text.endswith(waits)


def test_the_table_has_every_rank_and_the_stack_of_the_one_named() -> None:
    now = [record(0, waiting_for="in a collective operation", stack="elsewhere"), record(1, stack="sleep(1000)")]
    text = table(now, diagnose([record(0, beat=1), record(1, beat=1)], now))
    assert "rank 0 (host node0, pid 100): training at step 7" in text
    assert "in a collective operation" in text
    assert "stack of rank 1" in text
    assert "sleep(1000)" in text
    assert "elsewhere" not in text


def seen_from_a_thread() -> tuple[bool, bool]:
    init_distributed()
    seen = []
    watcher = threading.Thread(target=lambda: (seen.append(is_in_collective()), started.wait(), seen.append(watch())))
    started = threading.Event()

    def watch() -> bool:
        for _ in range(100):
            if is_in_collective():
                return True
            threading.Event().wait(0.01)
        return False

    watcher.start()
    while not seen:
        threading.Event().wait(0.01)
    started.set()
    if dist.get_rank() == 0:
        dist.barrier()  # waits for the other
    else:
        watcher.join()
        dist.barrier()
    watcher.join()
    return seen[0], seen[1]


def test_a_collective_is_seen_from_outside() -> None:
    (before, during), (_, not_in_one) = run_world(seen_from_a_thread, 2)
    assert (before, during, not_in_one) == (False, True, False)


def test_the_main_stack() -> None:
    assert "test_the_main_stack" in main_stack()
