"""Pieces of documents: where a cut of the sequences and the ends of documents leave runs of queries."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch

from megatron_slm.types import Pieces


def pieces_of(lengths: Sequence[int], stretches: Sequence[range], num_samples: int, length: int) -> Pieces:
    """Return the pieces of a micro-batch's documents that lie in some stretches of its sequences.

    Args:
        lengths: of the documents, sample by sample.
        stretches: positions of a sequence whose queries are here, rising.
        num_samples, length: shape of the whole micro-batch.
    """
    queries: list[int] = []
    keys: list[tuple[int, int]] = []
    ends, number, start = list(accumulate(lengths)), 0, 0
    for sample in range(num_samples):
        for stretch in stretches:
            row, stop = sample * length + stretch.start, sample * length + stretch.stop
            while row < stop:
                while ends[number] <= row:
                    number, start = number + 1, ends[number]
                end = min(ends[number], stop)
                queries.append(end - row)
                keys.append((start, end - start))
                row = end
    return Pieces(
        tuple(queries),
        tuple(keys),
        torch.cat([torch.arange(first, first + count) for first, count in keys]),
        torch.tensor([0, *accumulate(queries)], dtype=torch.int32),
        torch.tensor([0, *accumulate(count for _, count in keys)], dtype=torch.int32),
    )
