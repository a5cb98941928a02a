"""Splits a step's samples over data-parallel ranks and micro-batches, and their positions over other ranks."""

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


def check_lengths(config: RunConfig, topology: Topology) -> None:
    """Check that the positions of a sequence can be split over the ranks that share it.

    Raises:
        LayoutError: context or sequence parallelism does not divide them.
    """
    length, context = config.data.seq_length, topology.context
    if context > 1 and length % (2 * context):
        raise LayoutError(
            "--seq-length",
            length,
            f"be divisible by 2 x --context-parallel-size ({2 * context}), the stretches that sequences are cut into",
            "change one of them",
        )
    if config.parallel.sequence_parallel and length // context % topology.tensor:
        held = f" / --context-parallel-size ({context})" if context > 1 else ""
        raise LayoutError(
            f"--seq-length{held}",
            length // context,
            f"be divisible by --tensor-model-parallel-size ({topology.tensor}) with --sequence-parallel",
            "change one of them",
        )
