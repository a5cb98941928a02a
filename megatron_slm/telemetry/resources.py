"""What a run uses: memory, and with `--timing-log-level` the time of a step's parts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import psutil
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from megatron_slm.device import local_device


def resources(seconds: Mapping[str, float], names: Sequence[str], num_steps: int) -> dict[str, Any]:
    """Memory of the rank that has most of it, and the times of the fastest and the slowest rank. Collective.

    Args:
        seconds: of the timers that ran here.
        names: timers that are asked for.
        num_steps: that they ran in.

    Returns:
        values of a line of metrics; `timers_ms` only where something is timed.
    """
    accelerator = get_accelerator()
    memory = {
        "memory_allocated_mib": accelerator.memory_allocated() / 2**20,
        "memory_peak_mib": accelerator.max_memory_allocated() / 2**20,
        "memory_host_mib": psutil.Process().memory_info().rss / 2**20,
    }
    times = [seconds.get(name, -math.inf) * 1e3 / num_steps for name in names]
    fastest = [-x if x >= 0 else -math.inf for x in times]
    values = torch.tensor([*memory.values(), *times, *fastest], dtype=torch.float64, device=local_device())
    dist.all_reduce(values, op=dist.ReduceOp.MAX)
    most = values.tolist()
    found: dict[str, Any] = dict(zip(memory, most[: len(memory)], strict=True))
    if names:
        slowest, fastest = most[len(memory) : -len(times)], most[-len(times) :]
        found["timers_ms"] = _spans(dict(zip(names, zip(fastest, slowest, strict=True), strict=True)))
    return found


def _spans(times: Mapping[str, tuple[float, float]]) -> dict[str, dict[str, float]]:
    """By timer, without those that ran nowhere."""
    return {name: {"min": -low, "max": high} for name, (low, high) in times.items() if math.isfinite(high)}
