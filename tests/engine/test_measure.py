"""Costs as measured: the slowest rank of a stage counts, and all ranks get the same."""

from __future__ import annotations

from types import SimpleNamespace

import torch
import torch.distributed as dist

from megatron_slm.engine import measure
from megatron_slm.engine.measure import Stopwatch
from megatron_slm.engine.schedule.costs import Costs, Work
from megatron_slm.parallel.groups import init_distributed
from megatron_slm.parallel.topology import Topology
from tests.support.world import run_world

SECONDS = {Work.FORWARD: 0.02, Work.BACKWARD: 0.04, Work.REFERENCE: 0.01}


def measured_costs() -> Costs:
    init_distributed()
    now, stopwatch = 0.0, Stopwatch()
    measure.time = SimpleNamespace(perf_counter=lambda: now)  # type: ignore[assignment]
    slow = 3.0 if dist.get_rank() == 3 else 1.0  # one of the last stage's two ranks
    for attempt in range(3):
        for work, seconds in SECONDS.items():
            with stopwatch.timing(work):
                now += seconds * slow * (50 if attempt == 0 else 1)  # the first is an outlier
    return stopwatch.costs(Topology(pipeline=2, data=2), torch.device("cpu"))


def test_the_slowest_rank_of_a_stage_counts() -> None:
    expected = Costs.scaled([1.0, 3.0], [2.0, 6.0], [0.5, 1.5])
    assert run_world(measured_costs, 4) == [expected] * 4
