"""The rank that works longer than its peers."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from megatron_slm.data.loader import MicroBatchSource
from megatron_slm.loss.objective import Objective
from megatron_slm.parallel.topology import Topology
from megatron_slm.telemetry.stragglers import rank_times
from tests.support.runs import run_flags, write_corpus, zero_config
from tests.support.training import train_and_report
from tests.support.world import run_world


def test_a_stage_with_more_work_is_no_straggler() -> None:
    """Four stages of two ranks; the last stage does twice the work, rank 3 is slower than its one peer."""
    work = [1.0, 1.0, 1.0, 1.5, 1.0, 1.0, 2.0, 2.1]
    times = rank_times(work, [3.0] * 8, Topology(pipeline=4, data=2))
    assert (times.slowest_rank, times.slowness) == (3, 1.5)
    metrics = times.metrics()
    assert metrics["work_seconds"] == work
    assert metrics["wait_seconds"][:4] == [2.0, 2.0, 2.0, 1.5]
    assert (metrics["work_seconds_median"], metrics["work_seconds_max"]) == (1.0, 2.1)


def test_with_one_rank_a_stage_all_are_compared() -> None:
    times = rank_times([1.0, 4.0, 1.0], [4.0] * 3, Topology(pipeline=3))
    assert (times.slowest_rank, times.slowness) == (1, 4.0)


def test_nothing_measured_is_no_straggler() -> None:
    assert rank_times([0.0, 0.0], [0.0, 0.0], Topology(data=2)).slowness == 1.0


def train_with_a_slow_rank(values: dict[str, Any], slow: int) -> None:
    if int(os.environ["RANK"]) == slow:
        real = Objective.loss

        def loss(*args: Any) -> Any:
            time.sleep(0.2)
            return real(*args)

        Objective.loss = loss  # type: ignore[method-assign]
    train_and_report(values)


@pytest.mark.parametrize("zero", [1, 2])
def test_a_slow_rank_is_found_in_the_metrics(zero: int, tmp_path: Path) -> None:
    layout = {"pipeline_model_parallel_size": 2} if zero == 1 else {"deepspeed_config": zero_config(2)}
    values = run_flags(write_corpus(tmp_path / "corpus"), tmp_path / "run", train_iters=4, log_interval=2, **layout)
    slow, world_size = (3, 4) if zero == 1 else (1, 2)
    run_world(train_with_a_slow_rank, world_size, values, slow)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4]
    for line in lines:
        ranks = line["ranks"]
        assert ranks["slowest_rank"] == slow
        assert ranks["slowness"] > 1.2
        assert len(ranks["work_seconds"]) == world_size
        # two micro-batches of a step, each 0.2 s longer
        assert ranks["work_seconds"][slow] > 0.4
        peer = slow - 1
        assert ranks["wait_seconds"][peer] > ranks["wait_seconds"][slow]


def train_with_a_slow_disk(values: dict[str, Any], slow: int) -> None:
    if int(os.environ["RANK"]) == slow:
        real = MicroBatchSource.micro_batch

        def micro_batch(*args: Any) -> Any:
            time.sleep(0.4)
            return real(*args)

        MicroBatchSource.micro_batch = micro_batch  # type: ignore[method-assign]
    train_and_report(values)


def test_a_rank_that_reads_slowly_is_found_too(tmp_path: Path) -> None:
    """It reads ahead, and what is not there in time is waited for between the steps."""
    values = run_flags(
        write_corpus(tmp_path / "corpus"), tmp_path / "run", train_iters=4, log_interval=2, num_workers=1,
        pipeline_model_parallel_size=2,
    )  # fmt: skip
    run_world(train_with_a_slow_disk, 4, values, 1)
    for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines():
        assert json.loads(line)["ranks"]["slowest_rank"] == 1
        assert json.loads(line)["ranks"]["work_seconds"][1] > 0.2
