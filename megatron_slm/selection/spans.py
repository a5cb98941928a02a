"""Runs of tokens with low scores, which are dropped as a whole (Centrifuge, arXiv 2502.00340: `peaking`)."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_slm.selection.scope import Scope


def low_runs(low_bs: Tensor, anchor_bs: Tensor, length: int, scope: Scope) -> Tensor:
    """Mark the tokens to drop, bool [N]: runs of at least `length` low tokens of one sequence with an anchor.

    In a scope without such long runs the anchors alone are dropped.

    Args:
        low_bs: low tokens, bool [b, s].
        anchor_bs: the lowest of them, bool [b, s].
        length: least length of a run.
    """
    if scope == "sequence":
        return torch.cat([_low_runs(low_bs[i : i + 1], anchor_bs[i : i + 1], length) for i in range(len(low_bs))])
    return _low_runs(low_bs, anchor_bs, length)


def _low_runs(low_bs: Tensor, anchor_bs: Tensor, length: int) -> Tensor:
    before_bs = low_bs.roll(1, dims=1)
    before_bs[:, 0] = False
    low_N, anchor_N = low_bs.flatten(), anchor_bs.flatten()
    run_N = (low_bs & ~before_bs).flatten().cumsum(0)  # number of the run, for tokens in one
    zero_R = torch.zeros(low_N.numel() + 1, dtype=torch.int64, device=low_N.device)
    length_R = zero_R.scatter_add(0, run_N, low_N.long())
    anchors_R = zero_R.scatter_add(0, run_N, (anchor_N & low_N).long())
    long_N = low_N & (length_R[run_N] >= length)
    return torch.where(long_N.any(), long_N & (anchors_R[run_N] > 0), anchor_N)
