"""How a step's samples are cut over data-parallel ranks and micro-batches."""

from __future__ import annotations

from megatron_slm.config.run import RunConfig
from megatron_slm.errors import LayoutError
from megatron_slm.parallel.topology import Topology


def batch_arithmetic(config: RunConfig, topology: Topology) -> tuple[int, int]:
    """(global batch size, micro-batches of a step on one data-parallel rank).

    Raises:
        LayoutError: the global batch is not a multiple of micro-batch size x data-parallel size.
    """
    together = config.training.micro_batch_size * topology.data
    total = config.training.global_batch_size or together
    if total % together:
        raise LayoutError(
            "--global-batch-size",
            total,
            f"is a multiple of --micro-batch-size ({config.training.micro_batch_size}) x data-parallel size "
            f"({topology.data})",
            f"use {-(-total // together) * together}, or change the micro-batch size",
        )
    return total, total // together
