"""Bootstrap confidence intervals of means."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

RESAMPLES = 10_000
LEVEL = 0.95
_BLOCK = 1 << 22
"""Indices drawn at a time, to bound the memory."""


class Interval(NamedTuple):
    """A mean and its percentile interval."""

    mean: float
    low: float
    high: float


def bootstrap(
    values: Sequence[float] | npt.NDArray[np.float64],
    weights: Sequence[float] | npt.NDArray[np.float64] | None = None,
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Interval:
    """Estimate the mean of `values`, or `sum(values) / sum(weights)`, with its 95 % interval over resampled pairs.

    Args:
        values: one number per question, or the loss sum of each span.
        weights: denominators, such as the number of tokens of each span.
    """
    value_Q = np.asarray(values, np.float64)
    weight_Q = np.ones_like(value_Q) if weights is None else np.asarray(weights, np.float64)
    generator = np.random.default_rng(seed)
    means = []
    block_size = max(1, _BLOCK // max(1, value_Q.size))
    for start in range(0, resamples, block_size):
        count = min(block_size, resamples - start)
        drawn = generator.integers(0, value_Q.size, (count, value_Q.size))
        means.append(value_Q[drawn].sum(axis=1) / weight_Q[drawn].sum(axis=1))
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(np.concatenate(means), [tail, 1 - tail])
    return Interval(float(value_Q.sum() / weight_Q.sum()), float(low), float(high))
