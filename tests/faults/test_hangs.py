"""A rank that hangs is reported and named, and the run ends; one that resumes is only reported."""

from __future__ import annotations

import ctypes
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_slm.cli.pretrain import main
from megatron_slm.flags.load import parse
from megatron_slm.loss.objective import Objective
from megatron_slm.operations import watchdog
from megatron_slm.training.pretrain import pretrain
from tests.support.runs import flags, run_flags, write_corpus
from tests.support.world import WorldError, run_world


def sleep() -> None:
    time.sleep(600)


def sleep_a_while() -> None:
    time.sleep(6)


def sleep_with_the_interpreters_lock() -> None:
    ctypes.PyDLL(None).sleep(600)


def stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def fail() -> None:
    raise RuntimeError("out of memory, say")


def command_held_up(argv: list[str], victim: int, strike: Callable[[], None], where: str, moment: int) -> int:
    """The command, in which rank `victim` is struck when it does `where` for the `moment`th time."""
    watchdog._LAST_RESORT_SECONDS = 12.0
    real, count = getattr(Objective, where), 0

    def held_up(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        if count == moment:
            strike()
        return real(*args, **kwargs)

    if int(os.environ["RANK"]) == victim:
        setattr(Objective, where, held_up)
    code = main(argv)
    if code:
        raise SystemExit(code)
    return code


def run(
    tmp_path: Path, victim: int, strike: Callable[[], None], *, where: str = "loss", moment: int = 11, **changes: Any
) -> tuple[list[int | None], list[str]]:
    """Exit codes and outputs of a run whose last stage are ranks 2 and 3, where steps have 2 micro-batches a rank."""
    values = run_flags(
        write_corpus(tmp_path / "corpus"), tmp_path / "run",
        **{
            "pipeline_model_parallel_size": 2, "train_iters": 8, "watchdog_min_seconds": 3.0, "watchdog_factor": 3.0,
            **changes,
        },
    )  # fmt: skip
    try:
        run_world(command_held_up, 4, flags(values), victim, strike, where, moment, grace_seconds=30.0)
    except WorldError as failed:
        return failed.codes, failed.outputs
    return [0] * 4, []


def reports(tmp_path: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in (tmp_path / "run" / "hang").glob("*")}


def errors(output: str) -> list[str]:
    return [line for line in output.splitlines() if line.startswith("error: ")]


def test_a_rank_that_sleeps_is_named_and_the_run_ends(tmp_path: Path) -> None:
    codes, outputs = run(tmp_path, 3, sleep)
    assert codes == [watchdog.EXIT_CODE] * 4
    for rank, output in enumerate(outputs):
        (error,) = errors(output)
        assert error.startswith(f"error: rank {rank}: training at step 6 is 'held up; rank 3 (host ")
        assert "waits for no other rank: training at step 6, ForwardPass of micro-batch 0 (instruction " in error
        assert "': must finish within --watchdog-exit-factor times its limit of 3 s. Fix: read " in error
    found = reports(tmp_path)
    assert sorted(found) == ["rank-000.txt", "rank-001.txt", "rank-002.txt", "rank-003.txt", "summary.txt"]
    assert "in sleep" in found["rank-003.txt"]
    assert "ForwardPass of micro-batch 0 (instruction " in found["rank-003.txt"]
    # its neighbour waits on the channel, the other pipeline in a collective
    assert "from rank 3, backward lane" in found["rank-001.txt"]
    assert "in a collective operation" in found["rank-000.txt"]
    assert found["summary.txt"].count("most likely cause: rank 3 ") == 2, "once reported, once at the end"
    assert "time.sleep(600)" in found["summary.txt"]


def threads_left(values: dict[str, Any]) -> list[str]:
    pretrain(parse(flags(values))[0])
    return [thread.name for thread in threading.enumerate() if thread.name in ("watchdog", "heartbeats", "reach")]


def test_no_thread_outlives_a_run(tmp_path: Path) -> None:
    values = run_flags(write_corpus(tmp_path / "corpus"), tmp_path / "run", train_iters=1)
    assert run_world(threads_left, 2, values) == [[], []]


@pytest.mark.slow
def test_one_that_resumes_is_only_reported(tmp_path: Path) -> None:
    codes, _ = run(tmp_path, 2, sleep_a_while, watchdog_exit_factor=20.0)
    assert codes == [0] * 4
    assert reports(tmp_path)["summary.txt"].count("most likely cause: rank 2 ") == 1


@pytest.mark.slow
def test_nothing_is_written_where_nothing_hangs(tmp_path: Path) -> None:
    codes, _ = run(tmp_path, 2, sleep, moment=10_000)
    assert codes == [0] * 4
    assert reports(tmp_path) == {}


@pytest.mark.slow
@pytest.mark.parametrize("strike", [stop, sleep_with_the_interpreters_lock])
def test_a_process_that_does_not_run_is_named(strike: Callable[[], None], tmp_path: Path) -> None:
    codes, outputs = run(tmp_path, 3, strike)
    assert codes[:3] == [watchdog.EXIT_CODE] * 3
    assert all(
        "rank 3 (host " in errors(outputs[r])[0] and "does not respond" in errors(outputs[r])[0] for r in range(3)
    )
    if strike is not stop:  # it ends by itself, and shows where it is, without its interpreter
        assert codes[3] == 1
        assert "in sleep_with_the_interpreters_lock" in outputs[3]


@pytest.mark.slow
def test_rank_0_that_hosts_the_heartbeats(tmp_path: Path) -> None:
    codes, outputs = run(tmp_path, 0, stop, moment=6, pipeline_model_parallel_size=1)
    assert codes[1:] == [watchdog.EXIT_CODE] * 3
    assert all("rank 0, which hosts the heartbeats, does not answer" in errors(outputs[r])[0] for r in (1, 2, 3))
    assert "in a collective operation" in reports(tmp_path)["rank-001.txt"]


@pytest.mark.slow
def test_a_hang_in_an_evaluation(tmp_path: Path) -> None:
    write_corpus(tmp_path / "held_out", seed=1)
    codes, outputs = run(
        tmp_path, 2, sleep, where="statistics", moment=9, eval_interval=4,
        valid_data_path=f"clean={tmp_path / 'held_out'}",
    )  # fmt: skip
    assert codes == [watchdog.EXIT_CODE] * 4
    assert "evaluating at step 4" in errors(outputs[0])[0]
    assert "rank 2 (host " in errors(outputs[0])[0]


def test_an_error_of_one_rank_alone_is_in_the_others_errors(tmp_path: Path) -> None:
    codes, outputs = run(tmp_path, 3, fail)
    assert codes == [1] * 4
    assert "RuntimeError: out of memory, say" in outputs[3]
    assert "Traceback" in outputs[3]
    for rank in (0, 1, 2):
        (error,) = errors(outputs[rank])
        assert "rank 3 (host " in error
        assert "failed with RuntimeError: out of memory, say" in error


@pytest.mark.slow
def test_without_a_watchdog_time_outs_remain(tmp_path: Path) -> None:
    codes, outputs = run(tmp_path, 3, sleep, watchdog_factor=0, distributed_timeout_minutes=0.1)
    assert codes[:3] == [1] * 3
    assert reports(tmp_path) == {}
    assert all("carry an answer within --distributed-timeout-minutes" in errors(outputs[r])[0] for r in range(3))
