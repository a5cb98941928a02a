"""Intervals by the bootstrap: what the mean could have been with other questions of the same kind."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

RESAMPLES = 10_000
LEVEL = 0.95
_BLOCK = 1 << 22
"""Drawn indices at a time: memory does not grow with the number of questions."""


class Interval(NamedTuple):
    """A mean and the bounds of its percentile interval."""

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
    """Mean of `values` with its 95 % interval; with weights, `sum(values) / sum(weights)` of whole pairs.

    Args:
        values: one number a question, or the loss sum of a window.
        weights: what each number is divided by, such as the tokens of a window.
    """
    value_Q = np.asarray(values, np.float64)
    weight_Q = np.ones_like(value_Q) if weights is None else np.asarray(weights, np.float64)
    generator = np.random.default_rng(seed)
    means = []
    at_once = max(1, _BLOCK // max(1, value_Q.size))
    for start in range(0, resamples, at_once):
        count = min(at_once, resamples - start)
        drawn = generator.integers(0, value_Q.size, (count, value_Q.size))
        means.append(value_Q[drawn].sum(axis=1) / weight_Q[drawn].sum(axis=1))
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(np.concatenate(means), [tail, 1 - tail])
    return Interval(float(value_Q.sum() / weight_Q.sum()), float(low), float(high))
