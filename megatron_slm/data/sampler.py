"""Assigns samples to data-parallel ranks: Megatron's sequential sampler as a pure function."""

from __future__ import annotations


def sample_indices(
    consumed_samples: int,
    micro_step: int,
    *,
    micro_batch_size: int,
    data_parallel_rank: int,
    data_parallel_size: int,
) -> range:
    """Return the positions in the sample order of one micro-batch on one data-parallel rank.

    A step that starts at `consumed_samples` takes micro_batch_size * data_parallel_size consecutive samples per
    micro-step, rank by rank, so that the samples of a global batch are the same for any layout.

    Args:
        consumed_samples: samples of the whole run (all ranks) before this step.
        micro_step: number of the micro-batch in the step, from 0.
        micro_batch_size: samples of a micro-batch on one rank, `b`.
        data_parallel_rank: the rank.
        data_parallel_size: number of ranks.

    Returns:
        `b` consecutive positions.

    Raises:
        ValueError: the rank or another number is out of range.
    """
    if not 0 <= data_parallel_rank < data_parallel_size:
        raise ValueError(f"data-parallel rank {data_parallel_rank} must be within [0, {data_parallel_size})")
    if consumed_samples < 0 or micro_step < 0 or micro_batch_size < 1:
        raise ValueError(
            f"consumed_samples {consumed_samples} and micro_step {micro_step} must be >= 0, "
            f"micro_batch_size {micro_batch_size} >= 1"
        )
    start = consumed_samples + (micro_step * data_parallel_size + data_parallel_rank) * micro_batch_size
    return range(start, start + micro_batch_size)
