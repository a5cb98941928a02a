"""Costs of a schedule as measured: medians of each stage's computations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median

import torch
import torch.distributed as dist

from megatron_slm.engine.schedule.costs import Costs, Work
from megatron_slm.parallel.topology import Topology

TIMER_OF = {
    Work.FORWARD: "forward-compute",
    Work.BACKWARD: "backward-compute",
    Work.REFERENCE: "reference-forward-compute",
}
"""Timer of each computation, without the waits for messages between them."""


def measured_costs(seconds: Mapping[str, Sequence[float]], topology: Topology, device: torch.device) -> Costs:
    """Return every stage's median durations, of its slowest rank. Collective over the world, equal on all ranks.

    Args:
        seconds: this rank's computations one by one, by timer (`Timers.take_intervals`).
    """
    mine = [median(seconds[TIMER_OF[work]]) for work in Work]
    table = torch.zeros(topology.world_size, len(mine), dtype=torch.float64, device=device)
    table[dist.get_rank()] = torch.tensor(mine, dtype=torch.float64, device=device)
    dist.all_reduce(table)
    slowest = table.view(topology.pipeline, -1, len(mine)).amax(dim=1).t().tolist()
    by_work = dict(zip(Work, slowest, strict=True))
    return Costs.scaled(by_work[Work.FORWARD], by_work[Work.BACKWARD], by_work[Work.REFERENCE])
