"""Memory of a run and, with `--timing-log-level`, the times of a step's parts."""

from __future__ import annotations

import math
import resource
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import psutil
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from megatron_slm.device import local_device, on_gpu


def resources(seconds: Mapping[str, float], names: Sequence[str], num_steps: int) -> dict[str, Any]:
    """Return the memory of the rank that uses most, and the times of the fastest and slowest rank. Collective.

    Args:
        seconds: total time of each timer that ran on this rank.
        names: timers to report, the same on all ranks.
        num_steps: number of steps the times cover.

    Returns:
        fields of a line of metrics; `timers_ms` only if `names` is not empty.
    """
    accelerator = get_accelerator()
    peak_mib = accelerator.max_memory_allocated() / 2**20
    memory = {
        "memory_allocated_mib": accelerator.memory_allocated() / 2**20,
        "memory_peak_mib": peak_mib if on_gpu() else max(peak_mib, host_peak_mib()),
        "memory_host_mib": psutil.Process().memory_info().rss / 2**20,
        "memory_host_peak_mib": host_peak_mib(),
    }
    found: dict[str, Any] = dict(zip(memory, _reduce(list(memory.values()), dist.ReduceOp.MAX), strict=True))
    if names:
        found["timers_ms"] = _timer_range({name: 1e3 * x / num_steps for name, x in seconds.items()}, names)
    return found


def host_peak_mib() -> float:
    """Largest resident memory of this process so far; DeepSpeed samples that of the CPU, and misses peaks."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def _timer_range(times: Mapping[str, float], names: Sequence[str]) -> dict[str, dict[str, float]]:
    """Return each timer's minimum and maximum over the ranks it ran on; timers that ran on no rank are left out."""
    fastest = _reduce([times.get(name, math.inf) for name in names], dist.ReduceOp.MIN)
    slowest = _reduce([times.get(name, -math.inf) for name in names], dist.ReduceOp.MAX)
    return {
        name: {"min": low, "max": high}
        for name, low, high in zip(names, fastest, slowest, strict=True)
        if math.isfinite(high)
    }


def _reduce(values: Sequence[float], op: Any) -> list[float]:
    reduced = torch.tensor(values, dtype=torch.float64, device=local_device())
    dist.all_reduce(reduced, op=op)
    return reduced.tolist()
