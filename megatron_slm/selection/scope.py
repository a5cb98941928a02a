"""Ranking of tokens within a scope."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from megatron_slm.selection.select import top_mask

Scope = Literal["sequence", "micro-batch", "data-parallel"]
"""Set of tokens ranked against each other. `data-parallel` equals `micro-batch` here: callers first concatenate the
ranks' tokens, by rank."""


def select_in_scope(
    score_bs: Tensor, valid_bs: Tensor, keep_ratio: float, scope: Scope, always_bs: Tensor | None = None
) -> Tensor:
    """Mark the kept positions of the flattened [b, s], bool [N]; see `top_mask`.

    `sequence` ranks each of the b sequences separately (the N of Rho-1's equation 4).
    """
    if scope != "sequence":
        always_N = None if always_bs is None else always_bs.flatten()
        return top_mask(score_bs.flatten(), valid_bs.flatten(), keep_ratio, always_N)
    kept = []
    for i, (score_s, valid_s) in enumerate(zip(score_bs, valid_bs, strict=True)):
        always_s = None if always_bs is None else always_bs[i]
        kept.append(top_mask(score_s, valid_s, keep_ratio, always_s))
    return torch.cat(kept)


def in_scope(function: Callable[[Tensor, Tensor], Tensor], x_bs: Tensor, ranked_bs: Tensor, scope: Scope) -> Tensor:
    """Apply `function(values, ranked)` to each scope separately, [b, s] to [b, s].

    Args:
        function: maps flat values and a mask of the same length to as many values.
    """
    if scope == "sequence":
        return torch.stack([function(x_s, ranked_s) for x_s, ranked_s in zip(x_bs, ranked_bs, strict=True)])
    return function(x_bs.flatten(), ranked_bs.flatten()).view_as(x_bs)
