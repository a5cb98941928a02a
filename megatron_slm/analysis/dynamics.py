"""How single tokens are learnt over a run's checkpoints: Rho-1's four classes (arXiv 2404.07965, appendix D.1).

A least-squares line is fitted to each token's losses over the checkpoints; its fall or rise from the first to the
last one is ΔL. Below -0.2 nats the token goes from high to low (H->L), above 0.2 from low to high (L->H). The others
stay where their last loss is: at most the mean last loss of all tokens (L->L), or above it (H->H).

Shapes: C checkpoints, N tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_slm.errors import AnalysisError

THRESHOLD_NATS = 0.2
CLASSES = ("H->H", "L->H", "H->L", "L->L")
"""In the paper's order."""
HIGH, RISING, FALLING, LOW = range(4)
LEAST_CHECKPOINTS = 3
"""Two points are always on a line: nothing could be said of its residuals."""
_BLOCK = 1 << 16
"""Tokens that are fitted at a time: the fit's memory does not grow with the sample."""


@dataclass(frozen=True, kw_only=True)
class Dynamics:
    """What became of each token."""

    class_N: npt.NDArray[np.int8]
    """Index into `CLASSES`."""
    change_N: npt.NDArray[np.float32]
    """ΔL in nats: the line's end minus its start."""
    fluctuation_N: npt.NDArray[np.float32]
    """Standard deviation of the fit's residuals, in nats (the population's: divided by C)."""
    class_mean_4C: npt.NDArray[np.float64]
    """Mean loss of each class at each checkpoint; NaN of a class without tokens."""
    mean_C: npt.NDArray[np.float64]
    """Mean loss of all tokens."""
    threshold_nats: float
    """How far a line rises or falls that is not flat."""

    @property
    def shares(self) -> dict[str, float]:
        """The share of each class; they add up to 1."""
        counts = np.bincount(self.class_N, minlength=len(CLASSES)) / max(1, self.class_N.size)
        return dict(zip(CLASSES, counts.tolist(), strict=True))

    def most_fluctuating(self, count: int) -> list[int]:
        """Tokens with the highest deviation from their line, the highest first; ties to the lower position."""
        order = np.argsort(-self.fluctuation_N, kind="stable")[:count]
        return [int(index) for index in order]

    def to_json(self) -> dict[str, Any]:
        """The figures that a plot needs."""
        means = [[None if np.isnan(v) else float(v) for v in row] for row in self.class_mean_4C]
        quantiles = np.quantile(self.fluctuation_N, [0.5, 0.9, 0.99]).tolist()
        return {
            "tokens": int(self.class_N.size),
            "shares": self.shares,
            "mean_loss": self.mean_C.tolist(),
            "class_mean_loss": dict(zip(CLASSES, means, strict=True)),
            "fluctuation_p50_p90_p99": quantiles,
        }


def check_order(positions: Sequence[float]) -> None:
    """Refuse checkpoints that do not follow one another.

    Raises:
        AnalysisError: they do not.
    """
    if any(after <= before for before, after in pairwise(positions)):
        raise AnalysisError("checkpoints", list(positions), "are in the order of the run, each once", "sort them")


def classify(
    loss_CN: npt.NDArray[np.float32],
    position_C: npt.NDArray[np.float64] | None = None,
    *,
    threshold_nats: float = THRESHOLD_NATS,
) -> Dynamics:
    """Fit each token's line and put the token into its class.

    Args:
        loss_CN: losses in nats, oldest checkpoint first.
        position_C: where the checkpoints are in the run (steps or tokens), rising; default: evenly apart.
        threshold_nats: how far a line must rise or fall.

    Raises:
        AnalysisError: too few checkpoints, or positions that do not rise.
    """
    num_checkpoints, num_tokens = loss_CN.shape
    if num_checkpoints < LEAST_CHECKPOINTS:
        raise AnalysisError(
            "checkpoints",
            num_checkpoints,
            f"are {LEAST_CHECKPOINTS} or more: a trend and its fluctuation need that many",
            "give more of --load, or train with a smaller --save-interval",
        )
    position_C = np.arange(num_checkpoints, dtype=np.float64) if position_C is None else position_C.astype(np.float64)
    check_order(position_C.tolist())
    centred_C = position_C - position_C.mean()
    span = position_C[-1] - position_C[0]
    change_N = np.empty(num_tokens, np.float32)
    fluctuation_N = np.empty(num_tokens, np.float32)
    for start in range(0, num_tokens, _BLOCK):
        block = slice(start, start + _BLOCK)
        loss_CB = loss_CN[:, block].astype(np.float64)
        residual_CB = loss_CB - loss_CB.mean(axis=0)
        slope_B = centred_C @ residual_CB / (centred_C @ centred_C)
        residual_CB -= centred_C[:, None] * slope_B
        change_N[block] = slope_B * span
        fluctuation_N[block] = residual_CB.std(axis=0)
    mean_C = loss_CN.mean(axis=1, dtype=np.float64)
    class_N = np.where(loss_CN[-1] <= mean_C[-1], LOW, HIGH).astype(np.int8)
    class_N[change_N < -threshold_nats] = FALLING
    class_N[change_N > threshold_nats] = RISING
    return Dynamics(
        class_N=class_N,
        change_N=change_N,
        fluctuation_N=fluctuation_N,
        class_mean_4C=_class_means(loss_CN, class_N),
        mean_C=mean_C,
        threshold_nats=threshold_nats,
    )


def _class_means(loss_CN: npt.NDArray[np.float32], class_N: npt.NDArray[np.int8]) -> npt.NDArray[np.float64]:
    counts = np.bincount(class_N, minlength=len(CLASSES)).astype(np.float64)
    sums = np.stack([np.bincount(class_N, weights=row, minlength=len(CLASSES)) for row in loss_CN], axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return sums / counts[:, None]
