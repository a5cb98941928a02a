"""Thresholds, quantiles and soft weights of scores: pure functions of flat tensors."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from megatron_slm.selection.select import kept_counts
from megatron_slm.types import move

SCORE_LEVELS = (0.05, 0.25, 0.5, 0.75, 0.95)
"""Levels of the logged quantiles."""

THRESHOLD_STEP = 2.0**-16
"""Grid of measured thresholds (1.5e-5 nats). Their sums are exact in fp64 in any order, so that a running threshold
does not depend on the distribution of micro-batches over ranks."""


def standardize(score_N: Tensor, ranked_N: Tensor) -> Tensor:
    """Return (score - mean) / standard deviation over the ranked tokens, fp32 [N]; 0 where all are equal.

    Computed in fp64 with the population's deviation; sums of fp32 numbers that are equal are exact there. Values of
    unranked tokens are meaningless. Nothing waits for the device.
    """
    score_N, count = score_N.double(), ranked_N.sum()
    centered_N = score_N - score_N.masked_fill(~ranked_N, 0.0).sum() / count
    deviation = (centered_N.masked_fill(~ranked_N, 0.0).square().sum() / count).sqrt()
    return torch.where(deviation > 0, centered_N / deviation, 0.0).float()


def soft_weights(score_N: Tensor, ranked_N: Tensor, temperature: float, floor: float) -> Tensor:
    """Return `floor + (1 - floor) n softmax(score / temperature)` over the n ranked tokens, fp32 [N]; 0 elsewhere.

    The mean over the ranked tokens is 1, so that the number of trained tokens stays n; none is below `floor`.
    """
    score_N = (score_N.double() / temperature).masked_fill(~ranked_N, -torch.inf)
    softmax_N = torch.softmax(score_N, 0).nan_to_num(0.0)  # no ranked token: 0
    weight_N = floor + (1.0 - floor) * ranked_N.sum() * softmax_N
    return weight_N.masked_fill(~ranked_N, 0.0).float()


def share_threshold(score_N: Tensor, ranked_N: Tensor, keep_ratio: float) -> Tensor:
    """Return the lowest score of the top share, fp32 []; infinity where no token is ranked.

    `score >= threshold` keeps `num_kept` tokens, and more only if several have the lowest score.
    """
    descending_N = score_N.masked_fill(~ranked_N, -torch.inf).sort(descending=True).values
    count = kept_counts(score_N.numel(), keep_ratio, score_N.device).take(ranked_N.sum())
    return torch.where(count > 0, descending_N.take((count - 1).clamp(min=0)), torch.inf)


def measured_threshold(score_N: Tensor, ranked_N: Tensor, keep_ratio: float) -> Tensor:
    """Return `share_threshold` on a grid of `THRESHOLD_STEP`, fp64 []; 0 where no token is ranked."""
    threshold = share_threshold(score_N, ranked_N, keep_ratio).double()
    return torch.where(threshold.isfinite(), (threshold / THRESHOLD_STEP).round() * THRESHOLD_STEP, 0.0)


def running_threshold(before: float | None, measured_sum: float, num_ranked: float, decay: float) -> float | None:
    """Return the threshold of the next step: `decay * before + (1 - decay) * measured_sum / num_ranked`.

    Args:
        before: the threshold of this step; None in the first step.
        measured_sum: each micro-batch's threshold times its number of ranked tokens, summed over all micro-batches
            and ranks.
    """
    if num_ranked == 0:
        return before
    measured = measured_sum / num_ranked
    return measured if before is None else decay * before + (1.0 - decay) * measured


def score_quantiles(score_N: Tensor, ranked_N: Tensor) -> Tensor:
    """Return the quantiles at `SCORE_LEVELS` over ranked tokens, interpolated linearly, fp64 [5]; 0 without tokens."""
    ascending_N = score_N.masked_fill(~ranked_N, torch.inf).double().sort().values
    last = ranked_N.sum() - 1
    place = _levels(score_N.device) * last
    low = place.floor().long().clamp(min=0)
    high = torch.minimum(low + 1, last.clamp(min=0))
    return torch.where(last >= 0, torch.lerp(ascending_N[low], ascending_N[high], place - low), 0.0)


@lru_cache(maxsize=8)
def _levels(device: torch.device) -> Tensor:
    levels = move(torch.tensor(SCORE_LEVELS, dtype=torch.float64, device="cpu"), device)
    assert levels is not None, "a tensor was moved"
    return levels
