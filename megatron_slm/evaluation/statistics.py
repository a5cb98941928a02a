"""Confidence intervals: Wilson's of shares, bootstrap ones of means."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

RESAMPLES = 10_000
LEVEL = 0.95
_BLOCK = 1 << 22
"""Indices drawn at a time, to bound the memory."""


class Interval(NamedTuple):
    """A mean and its 95 % interval."""

    mean: float
    low: float
    high: float


def share(successes: int, total: int) -> Interval:
    """Return the share of successes with its Wilson interval (JASA 22, 1927), which holds for small samples too.

    A bootstrap of 3 wrong answers would give 0 % to 0 %; this one gives 0 % to 56 %.
    """
    mean, z = successes / total, NormalDist().inv_cdf((1 + LEVEL) / 2)
    center = (mean + z**2 / (2 * total)) / (1 + z**2 / total)
    half = z / (1 + z**2 / total) * math.sqrt(mean * (1 - mean) / total + (z / (2 * total)) ** 2)
    return Interval(mean, max(0.0, center - half), min(1.0, center + half))


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
