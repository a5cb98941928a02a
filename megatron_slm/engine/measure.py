"""Costs as measured: how long each stage's computations really take."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median

import torch
import torch.distributed as dist

from megatron_slm.device import synchronize
from megatron_slm.engine.schedule.costs import Costs, Work
from megatron_slm.parallel.topology import Topology


class Stopwatch:
    """Times this rank's computations, without the waits for messages between them.

    On a GPU every computation is waited for, so steps that are timed are slower than others.
    """

    def __init__(self) -> None:
        self._seconds: dict[Work, list[float]] = {work: [] for work in Work}

    @contextmanager
    def timing(self, work: Work) -> Iterator[None]:
        """Time what happens inside."""
        synchronize()
        started = time.perf_counter()
        yield
        synchronize()
        self._seconds[work].append(time.perf_counter() - started)

    def costs(self, topology: Topology, device: torch.device) -> Costs:
        """Every stage's median durations, of its slowest rank. Collective over the world, equal on all ranks."""
        mine = [median(self._seconds[work]) for work in Work]
        seconds = torch.zeros(topology.world_size, len(mine), dtype=torch.float64, device=device)
        seconds[dist.get_rank()] = torch.tensor(mine, dtype=torch.float64, device=device)
        dist.all_reduce(seconds)
        slowest = seconds.view(topology.pipeline, -1, len(mine)).amax(dim=1).t().tolist()
        by_work = dict(zip(Work, slowest, strict=True))
        return Costs.scaled(by_work[Work.FORWARD], by_work[Work.BACKWARD], by_work[Work.REFERENCE])
