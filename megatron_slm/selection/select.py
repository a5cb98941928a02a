"""The exact top share of a set of scores, the same on every rank that holds the same scores."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def num_kept(num_valid: int, keep_ratio: float) -> int:
    """`ceil(keep_ratio * num_valid)`: 0 where nothing is valid, else at least 1.

    The product is rounded to 9 decimals first, so that 0.6 of 5 is 3 and not the ceiling of 3.0000000000000004.
    """
    return max(min(num_valid, 1), math.ceil(round(keep_ratio * num_valid, 9)))


def top_share(score_N: Tensor, valid_N: Tensor, keep_ratio: float) -> Tensor:
    """Positions of the `num_kept` highest valid scores, ascending; ties go to the lower position.

    Every score becomes one integer whose order is that of (score, then lower position first), so the number
    kept is exact and equal scores cannot be resolved differently by different ranks or devices.
    `torch.topk` alone breaks ties arbitrarily, and `score >= threshold` keeps too many.

    Args:
        score_N: fp32 [N]; a NaN ranks above everything (its gradient then marks the step as not finite).
        valid_N: bool [N].

    Returns:
        int64 [K].
    """
    count = num_kept(int(valid_N.sum()), keep_ratio)
    positions = torch.arange(score_N.numel(), device=score_N.device)
    key = (_ordered(score_N.float()) << 32) | (score_N.numel() - 1 - positions)
    key = torch.where(valid_N, key, torch.iinfo(torch.int64).min)
    return torch.topk(key, count, sorted=False).indices.sort().values


def _ordered(score_N: Tensor) -> Tensor:
    """int64 images of fp32 numbers in the same order (-0 equals +0; NaN of either sign above infinity)."""
    bits = torch.where(score_N.isnan(), torch.nan, score_N + 0.0).view(torch.int32)
    return torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()
