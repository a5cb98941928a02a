"""Exact top share of a set of scores, equal on all ranks with equal scores."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from megatron_slm.types import move


def num_kept(num_valid: int, keep_ratio: float) -> int:
    """Return `ceil(keep_ratio * num_valid)`: 0 where no token is valid, else at least 1.

    The product is rounded to 9 decimals first, so that 0.6 of 5 is 3 and not the ceiling of 3.0000000000000004.
    """
    return max(min(num_valid, 1), math.ceil(round(keep_ratio * num_valid, 9)))


@lru_cache(maxsize=64)
def kept_counts(most: int, keep_ratio: float, device: torch.device) -> Tensor:
    """`num_kept` of 0 to `most` valid tokens, int64 [most + 1] on the device, where it is looked up without a wait."""
    products = keep_ratio * np.arange(most + 1)
    counts = np.ceil(products).astype(np.int64)
    counts[1:] = counts[1:].clip(min=1)
    near = np.abs(products - np.rint(products)) < _NEAR
    counts[near] = [num_kept(int(n), keep_ratio) for n in near.nonzero()[0]]
    found = move(torch.from_numpy(counts), device)
    assert found is not None, "a tensor was moved"
    return found


_NEAR = 1e-6
"""Products this near to an integer are rounded by `num_kept` itself; the rounding to 9 decimals moves no other."""


def top_share(score_N: Tensor, valid_N: Tensor, keep_ratio: float, always_N: Tensor | None = None) -> Tensor:
    """Return the positions of the `num_kept` highest valid scores, int64 [K], ascending; see `top_mask`."""
    return top_mask(score_N, valid_N, keep_ratio, always_N).nonzero().squeeze(1)


def top_mask(score_N: Tensor, valid_N: Tensor, keep_ratio: float, always_N: Tensor | None = None) -> Tensor:
    """Mark the `num_kept` highest valid scores; ties go to the lower position. Nothing waits for the device.

    Each score is mapped to an integer ordered by (score, lower position first), so that the number kept is exact and
    all ranks and devices resolve ties alike. `torch.topk` alone breaks ties arbitrarily, and `score >= threshold`
    keeps too many.

    Args:
        score_N: fp32 [N]; NaN is never kept and does not count as valid.
        valid_N: bool [N].
        always_N: bool [N]; valid ones rank first and are all kept, even if they exceed the share.

    Returns:
        bool [N].
    """
    valid_N = valid_N & ~score_N.isnan()
    key_N = _ordered(score_N.float())
    count = kept_counts(score_N.numel(), keep_ratio, score_N.device).take(valid_N.sum())
    if always_N is not None:
        always_N = always_N & valid_N
        key_N = torch.where(always_N, _ABOVE_ALL, key_N)
        count = torch.maximum(count, always_N.sum())
    positions_N = torch.arange(score_N.numel(), device=score_N.device)
    key_N = (key_N << 32) | (score_N.numel() - 1 - positions_N)
    key_N = torch.where(valid_N, key_N, torch.iinfo(torch.int64).min)
    order_N = key_N.argsort(descending=True)
    return torch.zeros_like(valid_N).scatter(0, order_N, positions_N < count)


_ABOVE_ALL = 0x7FFFFFFF
"""Key above that of infinity, 0x7F800000."""


def _ordered(score_N: Tensor) -> Tensor:
    """Map fp32 numbers to int64 keys of the same order (-0 equals +0)."""
    bits_N = (score_N + 0.0).view(torch.int32)
    return torch.where(bits_N < 0, bits_N ^ 0x7FFFFFFF, bits_N).long()
