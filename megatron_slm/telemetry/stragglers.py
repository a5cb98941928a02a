"""Finds ranks that work longer than their peers."""

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
    """Seconds per step of every rank, by rank: means over the steps since the last line of metrics."""

    work_seconds: tuple[float, ...]
    """Data reading and forward passes, under ZeRO-1 also backward passes; includes waits inside tensor-parallel
    collectives. ZeRO-2 and 3 reduce gradients in backward passes, which are left out. ZeRO-3 gathers parameters in
    forward passes, so that one slow rank makes all ranks look slow."""
    step_seconds: tuple[float, ...]
    slowest_rank: int
    """Rank with the highest `slowness`."""
    slowness: float
    """Its work divided by the lower median of its peers, the ranks of the same stage."""

    def metrics(self) -> dict[str, Any]:
        """Return the fields of a line of metrics."""
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
    """Compare each rank with the ranks of its stage, or with all ranks if each stage has one."""
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
    """Gather all ranks' mean times of a step. Collective: one all-gather of two numbers per rank."""
    mine = torch.tensor([work_seconds, step_seconds], device=local_device())
    out = mine.new_empty(2 * dist.get_world_size())
    dist.all_gather_into_tensor(out, mine)
    work, seconds = out.view(-1, 2).t().tolist()
    return rank_times(work, seconds, topology)
