"""Cross-entropy by vocabulary blocks, in plain PyTorch.

Pass 1 walks over the vocabulary in blocks with an online log-sum-exp and keeps three numbers a row. Pass 2
recomputes the logits of the rows that are asked for, block by block, and turns them into gradients; the
gradient of a block of the weight is written once, because the vocabulary is the outer loop.

Shapes: N rows (tokens), K kept rows, d hidden, V vocabulary rows held here, B rows of one block.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_slm.types import TokenStatistics

BLOCK_SIZE = 2048
"""Vocabulary rows per block. It decides the order of summation, so it is fixed, not tuned per run."""


class RowStatistics(NamedTuple):
    """What pass 1 knows of each row; max and sum stay apart, since folding them loses digits of large logits."""

    max_N: Tensor
    """Largest logit (-inf where no vocabulary row is held here)."""
    sum_N: Tensor
    """Sum of exp(logit - max)."""
    target_N: Tensor
    """The label's logit; 0 where the label is not held here."""
    moment_N: Tensor | None = None
    """Sum of exp(logit - max) * (logit - max), from which the entropy follows; None where nothing asks for it."""

    def token_statistics(self, valid_N: Tensor) -> TokenStatistics:
        """Losses, and entropies where their moment is there; 0 where not valid."""
        log_sum_N = self.sum_N.log()
        loss_N = (log_sum_N - (self.target_N - self.max_N)).masked_fill_(~valid_N, 0.0)
        if self.moment_N is None:
            return TokenStatistics(loss_N)
        return TokenStatistics(loss_N, (log_sum_N - self.moment_N / self.sum_N).masked_fill_(~valid_N, 0.0))


def accumulation_dtype(x: Tensor) -> torch.dtype:
    """fp64 for fp64 inputs, else fp32: losses and sums are never less precise than fp32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def row_statistics(
    hidden_Nd: Tensor, weight_Vd: Tensor, local_label_N: Tensor, *, with_entropy: bool = False
) -> RowStatistics:
    """Pass 1.

    Args:
        local_label_N: the label's row in `weight_Vd`, int64; outside [0, V) where another rank holds it.
    """
    dtype, rows = accumulation_dtype(hidden_Nd), hidden_Nd.shape[0]
    max_N = hidden_Nd.new_full((rows,), -torch.inf, dtype=dtype)
    sum_N, target_N = torch.zeros_like(max_N), torch.zeros_like(max_N)
    moment_N = torch.zeros_like(max_N) if with_entropy else None
    for start, block_Bd in _blocks(weight_Vd):
        logits_NB = _product(hidden_Nd, block_Bd)
        column_N = local_label_N - start
        held_N = (column_N >= 0) & (column_N < block_Bd.shape[0])
        column_N1 = column_N.clamp(0, block_Bd.shape[0] - 1)[:, None]
        target_N = torch.where(held_N, logits_NB.gather(1, column_N1).squeeze(1), target_N)
        new_max_N = torch.maximum(max_N, logits_NB.amax(1))
        shrink_N, logits_NB = (max_N - new_max_N).exp_(), logits_NB.sub_(new_max_N[:, None])
        if moment_N is not None:
            # a sum over nothing has no maximum to be moved from
            shift_N = torch.where(sum_N > 0, max_N - new_max_N, 0.0)
            moment_N.add_(sum_N * shift_N).mul_(shrink_N).add_((logits_NB.exp() * logits_NB).sum(1))
        sum_N.mul_(shrink_N).add_(logits_NB.exp_().sum(1))
        max_N = new_max_N
    return RowStatistics(max_N, sum_N, target_N, moment_N)


def kept_gradients(
    hidden_Kd: Tensor, weight_Vd: Tensor, local_label_K: Tensor, max_K: Tensor, log_sum_K: Tensor, scale_K: Tensor
) -> tuple[Tensor, Tensor]:
    """Pass 2: gradients of the sum of `scale_K * token loss` over the kept rows.

    Args:
        max_K, log_sum_K: the whole vocabulary's statistics, so that exp(logit - max - log_sum) is a probability.

    Returns:
        gradient of the rows through the vocabulary rows held here [K, d] in fp32 (or fp64), and of the weight
        [V, d] in the weight's dtype.
    """
    grad_weight_Vd = torch.empty_like(weight_Vd)
    grad_hidden_Kd = torch.zeros_like(hidden_Kd, dtype=accumulation_dtype(hidden_Kd))
    for start, block_Bd in _blocks(weight_Vd):
        delta_KB = _product(hidden_Kd, block_Bd).sub_(max_K[:, None]).sub_(log_sum_K[:, None]).exp_()
        column_K = local_label_K - start
        row_T = ((column_K >= 0) & (column_K < block_Bd.shape[0])).nonzero().squeeze(1)
        delta_KB[row_T, column_K[row_T]] -= 1.0
        delta_KB = delta_KB.mul_(scale_K[:, None]).to(weight_Vd.dtype)
        grad_weight_Vd[start : start + block_Bd.shape[0]] = delta_KB.t() @ hidden_Kd
        grad_hidden_Kd += delta_KB @ block_Bd
    return grad_hidden_Kd, grad_weight_Vd


def _blocks(weight_Vd: Tensor) -> Iterator[tuple[int, Tensor]]:
    for start in range(0, weight_Vd.shape[0], BLOCK_SIZE):
        yield start, weight_Vd[start : start + BLOCK_SIZE]


def _product(rows_Nd: Tensor, block_Bd: Tensor) -> Tensor:
    """Logits [N, B] in fp32 (or fp64); bf16 logits would cost a loss error of 3e-2."""
    dtype = accumulation_dtype(rows_Nd)
    if rows_Nd.dtype == dtype:
        return rows_Nd @ block_Bd.t()
    if rows_Nd.is_cuda:
        return torch.mm(rows_Nd, block_Bd.t(), out_dtype=dtype)
    return rows_Nd.to(dtype) @ block_Bd.to(dtype).t()
