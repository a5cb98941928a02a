"""Splits a step's samples over data-parallel ranks and micro-batches, and their positions over other ranks."""

from __future__ import annotations

from megatron_slm.arithmetic import ceil_div
from megatron_slm.config.batch_sizes import SCHEDULE, BatchSizes
from megatron_slm.config.run import RunConfig
from megatron_slm.errors import LayoutError
from megatron_slm.parallel.topology import Topology


def samples_together(config: RunConfig, topology: Topology) -> int:
    """Count the samples of one micro-step over all data-parallel ranks."""
    return config.training.micro_batch_size * topology.data


def divided_batch_sizes(config: RunConfig, topology: Topology) -> BatchSizes:
    """Return a run's batch sizes, each of which divides into whole micro-steps.

    Raises:
        LayoutError: one is not a multiple of micro-batch size x data-parallel size.
    """
    sizes = config.batch_sizes(default=samples_together(config, topology))
    scheduled = config.training.step_batch_size_schedule is not None
    for size in sizes.sizes:
        _check(SCHEDULE if scheduled else "--global-batch-size", size, config, topology)
    return sizes


def evaluation_batch_size(config: RunConfig, topology: Topology) -> int:
    """Return the samples of a global batch of an evaluation: --eval-global-batch-size, or the largest of training.

    Raises:
        LayoutError: it is not a multiple of micro-batch size x data-parallel size.
    """
    given = config.logging.eval_global_batch_size
    if given is None:
        return divided_batch_sizes(config, topology).largest
    _check("--eval-global-batch-size", given, config, topology)
    return given


def _check(flag: str, size: int, config: RunConfig, topology: Topology) -> None:
    together = samples_together(config, topology)
    if size % together:
        raise LayoutError(
            flag,
            size,
            f"be a multiple of --micro-batch-size ({config.training.micro_batch_size}) x data-parallel size "
            f"({topology.data})",
            f"use {ceil_div(size, together) * together}, or change --micro-batch-size",
        )


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
