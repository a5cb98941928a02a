"""The set of tokens that is ranked together."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from megatron_slm.selection.select import top_share

Scope = Literal["sequence", "micro-batch"]


def select_in_scope(score_bs: Tensor, valid_bs: Tensor, keep_ratio: float, scope: Scope) -> Tensor:
    """Kept positions of a micro-batch, as ascending indices into the flattened [b, s], int64 [K].

    `micro-batch` ranks all of it together; `sequence` ranks each of the b sequences by itself (the N of
    Rho-1's equation 4).
    """
    if scope == "micro-batch":
        return top_share(score_bs.flatten(), valid_bs.flatten(), keep_ratio)
    length = score_bs.shape[1]
    rows = [top_share(score, valid, keep_ratio) for score, valid in zip(score_bs, valid_bs, strict=True)]
    return torch.cat([kept + i * length for i, kept in enumerate(rows)])
