"""Costs as measured: the slowest rank of a stage counts, and all ranks get the same."""

from __future__ import annotations

from types import SimpleNamespace

import torch
import torch.distributed as dist

from megatron_slm.engine import timers
from megatron_slm.engine.measure import TIMER_OF, measured_costs
from megatron_slm.engine.schedule.costs import Costs, Work
from megatron_slm.engine.timers import Timers
from megatron_slm.parallel.groups import init_distributed
from megatron_slm.parallel.topology import Topology
from tests.support.world import run_world

SECONDS = {Work.FORWARD: 0.02, Work.BACKWARD: 0.04, Work.REFERENCE: 0.01}


def costs_of_three_steps() -> Costs:
    init_distributed()
    now, running = 0.0, Timers()
    timers.time = SimpleNamespace(perf_counter=lambda: now)  # type: ignore[assignment]
    with running.timing("forward-compute"):
        now += 1e6  # before the measuring starts
    running.keep_intervals()
    slow = 3.0 if dist.get_rank() == 3 else 1.0  # one of the last stage's two ranks
    for attempt in range(3):
        for work, seconds in SECONDS.items():
            with running.timing(TIMER_OF[work]):
                now += seconds * slow * (50 if attempt == 0 else 1)  # the first is an outlier
        running.read()  # a line of metrics in between takes nothing away
    with running.paused(), running.timing("forward-compute"):
        now += 1e6  # an evaluation
    return measured_costs(running.take_intervals(), Topology(pipeline=2, data=2), torch.device("cpu"))


def test_the_slowest_rank_of_a_stage_counts() -> None:
    expected = Costs.scaled([1.0, 3.0], [2.0, 6.0], [0.5, 1.5])
    assert run_world(costs_of_three_steps, 4) == [expected] * 4
