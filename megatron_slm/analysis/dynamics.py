"""Classes of tokens by how their losses change over a run's checkpoints (Rho-1, arXiv 2404.07965, appendix D.1).

Fits a least-squares line to each token's losses; ΔL is the line's change from the first to the last checkpoint.
ΔL below -0.2 nats is high to low (H->L), above 0.2 low to high (L->H). The other tokens are L->L if their last loss
is at most the mean last loss of all tokens, else H->H.

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
"""Classes in the paper's order."""
HIGH, RISING, FALLING, LOW = range(4)
MIN_CHECKPOINTS = 3
"""Two points always lie on a line, without residuals."""
_BLOCK = 1 << 16
"""Tokens fitted at a time, to bound the memory."""


@dataclass(frozen=True, kw_only=True)
class Dynamics:
    """Class, change and fluctuation of each token's loss."""

    class_N: npt.NDArray[np.int8]
    """Index into `CLASSES`."""
    change_N: npt.NDArray[np.float32]
    """ΔL in nats: the last value of the fitted line minus its first."""
    fluctuation_N: npt.NDArray[np.float32]
    """Population standard deviation of the fit's residuals, in nats."""
    class_mean_4C: npt.NDArray[np.float64]
    """Mean loss of each class at each checkpoint; NaN for a class without tokens."""
    mean_C: npt.NDArray[np.float64]
    """Mean loss of all tokens."""
    threshold_nats: float
    """Smallest |ΔL| that counts as a change."""

    @property
    def shares(self) -> dict[str, float]:
        """Share of the tokens in each class."""
        counts = np.bincount(self.class_N, minlength=len(CLASSES)) / max(1, self.class_N.size)
        return dict(zip(CLASSES, counts.tolist(), strict=True))

    def most_fluctuating(self, count: int) -> list[int]:
        """Return the tokens with the largest fluctuation in descending order, ties to the lower position."""
        order = np.argsort(-self.fluctuation_N, kind="stable")[:count]
        return [int(index) for index in order]

    def to_json(self) -> dict[str, Any]:
        """Return shares, means and quantiles as JSON values."""
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
    """Check that checkpoints are in the order of the run, each once.

    Raises:
        AnalysisError: a position does not exceed the previous one.
    """
    if any(after <= before for before, after in pairwise(positions)):
        raise AnalysisError(
            "steps of the checkpoints", list(positions), "be in ascending order, each once", "sort them, oldest first"
        )


def classify(
    loss_CN: npt.NDArray[np.float32],
    position_C: npt.NDArray[np.float64] | None = None,
    *,
    threshold_nats: float = THRESHOLD_NATS,
) -> Dynamics:
    """Fit a line to each token's losses and classify the token.

    Args:
        loss_CN: losses in nats, oldest checkpoint first.
        position_C: positions of the checkpoints in the run (steps or tokens), ascending; default: evenly spaced.
        threshold_nats: smallest |ΔL| that counts as a change.

    Raises:
        AnalysisError: there are too few checkpoints, or their positions do not ascend.
    """
    num_checkpoints, num_tokens = loss_CN.shape
    if num_checkpoints < MIN_CHECKPOINTS:
        raise AnalysisError(
            "number of checkpoints",
            num_checkpoints,
            f"be at least {MIN_CHECKPOINTS} to show a trend and its fluctuation",
            "name more checkpoints, or train with a smaller --save-interval",
        )
    position_C = np.arange(num_checkpoints, dtype=np.float64) if position_C is None else position_C.astype(np.float64)
    check_order(position_C.tolist())
    centered_C = position_C - position_C.mean()
    distance = position_C[-1] - position_C[0]
    change_N = np.empty(num_tokens, np.float32)
    fluctuation_N = np.empty(num_tokens, np.float32)
    for start in range(0, num_tokens, _BLOCK):
        block = slice(start, start + _BLOCK)
        loss_CB = loss_CN[:, block].astype(np.float64)
        residual_CB = loss_CB - loss_CB.mean(axis=0)
        slope_B = centered_C @ residual_CB / (centered_C @ centered_C)
        residual_CB -= centered_C[:, None] * slope_B
        change_N[block] = slope_B * distance
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
