"""Which ranks work longer than others: their own work a step, gathered now and then."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median, median_low
from typing import Any

import torch
import torch.distributed as dist

from megatron_slm.device import local_device
from megatron_slm.parallel.topology import Topology


@dataclass(frozen=True, kw_only=True)
class RankTimes:
    """Seconds a step of every rank, by rank: means over the steps since the last gathering."""

    work_seconds: tuple[float, ...]
    """Reading, forward and (ZeRO-1) backward passes, with what tensor-parallel ranks wait for each other inside. Under
    ZeRO-2 and 3 backward passes reduce gradients and are no part of it; forward passes of ZeRO-3 gather parameters, so
    there a slow rank makes all look slow."""
    step_seconds: tuple[float, ...]
    slowest_rank: int
    """The one with the highest `slowness`."""
    slowness: float
    """Its work over that of its peers: the (lower) median of the ranks that hold the same stage, who do as much."""

    def metrics(self) -> dict[str, Any]:
        """What a metrics line says of it."""
        waits = [max(0.0, step - work) for step, work in zip(self.step_seconds, self.work_seconds, strict=True)]
        return {
            "slowest_rank": self.slowest_rank,
            "slowness": round(self.slowness, 4),
            "work_seconds_median": round(median(self.work_seconds), 6),
            "work_seconds_max": round(max(self.work_seconds), 6),
            "work_seconds": [round(x, 6) for x in self.work_seconds],
            "wait_seconds": [round(x, 6) for x in waits],
        }


def rank_times(work: Sequence[float], steps: Sequence[float], topology: Topology) -> RankTimes:
    """Compare ranks with those of their stage; with one rank a stage, with all."""
    stages: dict[int, list[int]] = {}
    for rank in range(len(work)):
        stages.setdefault(topology.coordinate(rank).pipeline, []).append(rank)
    peers = list(stages.values()) if len(work) > len(stages) else [list(range(len(work)))]
    slowness = {}
    for ranks in peers:
        usual = median_low([work[rank] for rank in ranks])
        slowness.update({rank: work[rank] / usual if usual > 0 else 1.0 for rank in ranks})
    slowest = max(slowness, key=lambda rank: slowness[rank])
    return RankTimes(
        work_seconds=tuple(work), step_seconds=tuple(steps), slowest_rank=slowest, slowness=slowness[slowest]
    )


def gather_times(work_seconds: float, step_seconds: float, topology: Topology) -> RankTimes:
    """Everyone's times from this rank's: means of a step. Collective: one all-gather of two numbers a rank."""
    mine = torch.tensor([work_seconds, step_seconds], device=local_device())
    out = mine.new_empty(2 * dist.get_world_size())
    dist.all_gather_into_tensor(out, mine)
    work, seconds = out.view(-1, 2).t().tolist()
    return rank_times(work, seconds, topology)
