"""Exact top share of a set of scores, equal on all ranks with equal scores."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def num_kept(num_valid: int, keep_ratio: float) -> int:
    """Return `ceil(keep_ratio * num_valid)`: 0 where no token is valid, else at least 1.

    The product is rounded to 9 decimals first, so that 0.6 of 5 is 3 and not the ceiling of 3.0000000000000004.
    """
    return max(min(num_valid, 1), math.ceil(round(keep_ratio * num_valid, 9)))


def top_share(score_N: Tensor, valid_N: Tensor, keep_ratio: float, always_N: Tensor | None = None) -> Tensor:
    """Return the positions of the `num_kept` highest valid scores, ascending; ties go to the lower position.

    Each score is mapped to an integer ordered by (score, lower position first), so that the number kept is exact and
    all ranks and devices resolve ties alike. `torch.topk` alone breaks ties arbitrarily, and `score >= threshold`
    keeps too many.

    Args:
        score_N: fp32 [N]; NaN is never kept and does not count as valid.
        valid_N: bool [N].
        always_N: bool [N]; valid ones rank first and are all kept, even if they exceed the share.

    Returns:
        int64 [K].
    """
    valid_N = valid_N & ~score_N.isnan()
    key_N = _ordered(score_N.float())
    counts = [valid_N.sum()]
    if always_N is not None:
        always_N = always_N & valid_N
        key_N = torch.where(always_N, _ABOVE_ALL, key_N)
        counts.append(always_N.sum())
    num_valid, *num_always = torch.stack(counts).tolist()  # one transfer from the device
    count = max(num_kept(num_valid, keep_ratio), *num_always, 0)
    positions_N = torch.arange(score_N.numel(), device=score_N.device)
    key_N = (key_N << 32) | (score_N.numel() - 1 - positions_N)
    key_N = torch.where(valid_N, key_N, torch.iinfo(torch.int64).min)
    return torch.topk(key_N, count, sorted=False).indices.sort().values


_ABOVE_ALL = 0x7FFFFFFF
"""Key above that of infinity, 0x7F800000."""


def _ordered(score_N: Tensor) -> Tensor:
    """Map fp32 numbers to int64 keys of the same order (-0 equals +0)."""
    bits_N = (score_N + 0.0).view(torch.int32)
    return torch.where(bits_N < 0, bits_N ^ 0x7FFFFFFF, bits_N).long()
