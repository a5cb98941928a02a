"""Splits a step's samples over data-parallel ranks and micro-batches."""

from __future__ import annotations

from megatron_slm.arithmetic import ceil_div
from megatron_slm.config.run import RunConfig
from megatron_slm.errors import LayoutError
from megatron_slm.parallel.topology import Topology


def batch_arithmetic(config: RunConfig, topology: Topology) -> tuple[int, int]:
    """Return (global batch size, micro-batches per step of one data-parallel rank).

    Raises:
        LayoutError: the global batch is not a multiple of micro-batch size x data-parallel size.
    """
    samples_per_micro_step = config.training.micro_batch_size * topology.data
    total = config.training.global_batch_size or samples_per_micro_step
    if total % samples_per_micro_step:
        raise LayoutError(
            "--global-batch-size",
            total,
            f"be a multiple of --micro-batch-size ({config.training.micro_batch_size}) x data-parallel size "
            f"({topology.data})",
            f"use {ceil_div(total, samples_per_micro_step) * samples_per_micro_step}, or change --micro-batch-size",
        )
    return total, total // samples_per_micro_step
