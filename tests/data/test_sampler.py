"""The sampler: Megatron's order, and the same global batch for any layout."""

from __future__ import annotations

import pytest

from megatron_slm.data.sampler import sample_indices


def test_by_hand() -> None:
    layout = {"micro_batch_size": 2, "data_parallel_rank": 1, "data_parallel_size": 3}
    assert list(sample_indices(12, 0, **layout)) == [14, 15]
    assert list(sample_indices(12, 2, **layout)) == [26, 27]


@pytest.mark.parametrize(("micro_batch_size", "size"), [(1, 1), (2, 1), (1, 4), (2, 3), (4, 2)])
def test_a_global_batch_is_consecutive_at_any_layout(micro_batch_size: int, size: int) -> None:
    taken = [
        index
        for micro_step in range(5)
        for rank in range(size)
        for index in sample_indices(
            48,
            micro_step,
            micro_batch_size=micro_batch_size,
            data_parallel_rank=rank,
            data_parallel_size=size,
        )
    ]
    assert taken == list(range(48, 48 + 5 * size * micro_batch_size))


@pytest.mark.parametrize(
    ("consumed", "micro_step", "size", "rank", "message"),
    [
        (0, 0, 1, 2, r"data-parallel rank 2 must be within \[0, 2\)"),
        (0, 0, 1, -1, "data-parallel rank -1"),
        (-1, 0, 1, 0, "consumed_samples -1"),
        (0, -1, 1, 0, "micro_step -1"),
        (0, 0, 0, 0, "micro_batch_size 0"),
    ],
)
def test_numbers_out_of_range(consumed: int, micro_step: int, size: int, rank: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sample_indices(consumed, micro_step, micro_batch_size=size, data_parallel_rank=rank, data_parallel_size=2)
