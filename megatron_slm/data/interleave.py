"""Assigns a corpus to each sample of a blend: Megatron's greedy rule, for many samples at once.

Sample k is from the corpus with the largest `weight * max(k, 1) - drawn`, the first of equals, in fp64. Many samples
are left to `greedy_order.c`. For few, and without a compiler: each choice depends on the previous ones, so the chain is
cut into blocks that are computed side by side from guessed starts; a block whose start differs from the end of the
previous block is computed again, until none is left. Either result equals that of the plain loop, to the last tie.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_slm.data.greedy_order import GreedyOrder, compiled_order
from megatron_slm.data.index_cache import Arrays, Blocks, Built, IndexCache
from megatron_slm.errors import ConfigError

_BLOCK = 1024
COUNTED_EVERY = 64 * _BLOCK
"""Samples between two counts that an index holds, so that it stays small with thousands of corpora."""
MOST_CORPORA = 1 << 16
_COMPILED_FROM = 2 * 10**7
"""Number of comparisons of the plain loop that are worth a compilation."""


def normalized(weights: Sequence[float]) -> tuple[float, ...]:
    """Divide weights by their sum, in Megatron's arithmetic."""
    values = np.array(weights, dtype=np.float64)
    return tuple((values / np.sum(values)).tolist())


class Interleave:
    """The order in which samples are drawn from several corpora.

    Args:
        weights: weights of the corpora, adding up to 1.
        size: number of samples.
        cache: cache of the index; None keeps the index in memory.
    """

    def __init__(self, weights: Sequence[float], size: int, cache: IndexCache | None = None) -> None:
        if len(weights) > MOST_CORPORA:
            rule = f"name at most {MOST_CORPORA:,} corpora"
            raise ConfigError("--data-path", f"{len(weights):,} corpora", rule, "join some with tools/merge_corpora.py")
        self.weights, self.size, self._cache = tuple(weights), size, cache or IndexCache(None)

    def __getitem__(self, index: int, /) -> tuple[int, int]:
        """Return the corpus of sample `index`, and the number of earlier samples from that corpus."""
        choice, counts = self._indices["choice"], self._indices["counts"]
        block = index // COUNTED_EVERY
        source = int(choice[index])
        before = int(np.count_nonzero(choice[block * COUNTED_EVERY : index] == source))
        return source, int(counts[block, source]) + before

    def drawn(self, num_samples: int) -> list[int]:
        """Count the first `num_samples` samples by corpus."""
        if len(self.weights) == 1:
            return [num_samples]
        choice, counts = self._indices["choice"], self._indices["counts"]
        block = num_samples // COUNTED_EVERY
        inside = np.bincount(choice[block * COUNTED_EVERY : num_samples], minlength=len(self.weights))
        return (counts[block] + inside).tolist()

    @cached_property
    def _indices(self) -> Arrays:
        made_from = f"{self.weights!r} {self.size} {COUNTED_EVERY}"
        return self._cache.arrays("blend", made_from, None, lambda: greedy_choices(np.array(self.weights), self.size))


def greedy_choices(weights: npt.NDArray[np.float64], size: int) -> Built:
    """Apply the greedy rule.

    Args:
        weights: fp64 [m].
        size: number of samples.

    Returns:
        `choice`, the corpus of every sample, uint8 or uint16 [size], and `counts`, the number of samples of each corpus
        before every block of `COUNTED_EVERY` samples, int64 [size / COUNTED_EVERY + 1, m].
    """
    if len(weights) * size >= _COMPILED_FROM and (weights > 0).all():
        order = compiled_order(weights)
        if order is not None:
            counts = np.zeros((size // COUNTED_EVERY + 1, len(weights)), dtype=np.int64)
            dtype = np.uint8 if len(weights) <= 256 else np.uint16
            return {"choice": Blocks(dtype, size, _counted_blocks(order, size, counts)), "counts": counts}
    choice, counts = _side_by_side(weights, size)
    return {"choice": choice, "counts": counts}


def _counted_blocks(order: GreedyOrder, size: int, counts: npt.NDArray[np.int64]) -> Iterator[npt.NDArray[np.uint16]]:
    """Yield the corpora of the samples block by block, and fill the counts before every block."""
    for block in range(len(counts)):
        counts[block] = order.drawn()
        yield order.draw(min(COUNTED_EVERY, size - block * COUNTED_EVERY))


def _side_by_side(weights: npt.NDArray[np.float64], size: int) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64]]:
    """Compute blocks side by side: `choice` and `counts` of `greedy_choices`."""
    num_sources, num_blocks = len(weights), size // _BLOCK + 1
    starts = np.arange(num_blocks + 1, dtype=np.int64) * _BLOCK
    counts_mB = _guess(weights, starts)
    choice_Bk = np.empty((num_blocks, _BLOCK), dtype=np.uint8 if num_sources <= 256 else np.uint16)
    todo = np.arange(num_blocks)
    while todo.size:
        choice_Bk[todo], ends_mB = _run_blocks(weights, starts[todo], counts_mB[:, todo])
        changed = (counts_mB[:, todo + 1] != ends_mB).any(axis=0)
        counts_mB[:, todo + 1] = ends_mB
        todo = todo[changed] + 1
        todo = todo[todo < num_blocks]
    return choice_Bk.reshape(-1)[:size], np.ascontiguousarray(counts_mB[:, : -1 : COUNTED_EVERY // _BLOCK].T)


def _guess(weights: npt.NDArray[np.float64], starts: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Guess counts in proportion to the weights that add up to the starts, int64 [m, B]; exact for start 0."""
    exact_mB = weights[:, None] * starts
    counts_mB = np.floor(exact_mB).astype(np.int64)
    missing_B = starts - counts_mB.sum(axis=0)
    rank_mB = np.argsort(np.argsort(counts_mB - exact_mB, axis=0, kind="stable"), axis=0)
    return counts_mB + (rank_mB < missing_B)


def _run_blocks(
    weights: npt.NDArray[np.float64], starts: npt.NDArray[np.int64], counts_mB: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64]]:
    """Run the plain loop for many blocks side by side: choices [B, _BLOCK], and counts at their ends [m, B]."""
    drawn_mB = counts_mB.astype(np.float64)
    choice_kB = np.empty((_BLOCK, len(starts)), dtype=np.uint8 if len(weights) <= 256 else np.uint16)
    blocks = np.arange(len(starts))
    for k in range(_BLOCK):
        position_B = np.maximum(starts + k, 1).astype(np.float64)
        best_B = weights[0] * position_B - drawn_mB[0]
        chosen_B = np.zeros(len(starts), dtype=np.int64)
        for source in range(1, len(weights)):
            error_B = weights[source] * position_B - drawn_mB[source]
            better_B = error_B > best_B
            chosen_B[better_B] = source
            best_B = np.maximum(best_B, error_B)
        choice_kB[k] = chosen_B
        drawn_mB[chosen_B, blocks] += 1.0
    return choice_kB.T, drawn_mB.astype(np.int64)
