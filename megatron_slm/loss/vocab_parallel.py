"""Exchange between the ranks of a vocabulary-parallel loss: a few numbers a row, and the kept rows' gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_slm.loss.row_statistics import RowStatistics
from megatron_slm.parallel.collectives import all_gather_dim0, all_reduce_sum
from megatron_slm.parallel.groups import TensorParallel


@dataclass(frozen=True, kw_only=True)
class VocabularyPart:
    """The part of the vocabulary that this rank's output weight holds; token `start` is its row 0."""

    tp: TensorParallel
    start: int
    rows: int | None = None
    """Rows of the largest part. All ranks walk over their parts in the same chunks, so that their exchanges match;
    None where there is one part."""
    softcap: float | None = None
    """Of the logits; None for none."""

    def combine(self, local: RowStatistics) -> RowStatistics:
        """Return the whole vocabulary's statistics, bit-equal on all ranks, so that all keep the same tokens.

        One all-gather; every rank adds the parts in rank order, which an all-reduce would not promise.
        """
        if self.tp.size == 1:
            return local
        return local.combined(all_gather_dim0(local.stacked()[None], self.tp))

    def sum_in_rank_order(self, x: Tensor) -> Tensor:
        """Sum a tensor over the vocabulary's parts, to the same bits on all ranks."""
        return x if self.tp.size == 1 else all_gather_dim0(x[None], self.tp).sum(0)

    def sum_rows(self, grad_hidden_Kd: Tensor) -> Tensor:
        """Sum the kept rows' gradient over the vocabulary's parts."""
        return grad_hidden_Kd if self.tp.size == 1 else all_reduce_sum(grad_hidden_Kd, self.tp)


class _WholeSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_sbd: Tensor, tp: TensorParallel) -> Tensor:
        ctx.tp, ctx.length = tp, x_sbd.shape[0]
        return all_gather_dim0(x_sbd, tp)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0].narrow(0, ctx.tp.rank * ctx.length, ctx.length), None


def loss_rows(x_sbd: Tensor, tp: TensorParallel) -> Tensor:
    """Return every token's row in (sequence, position) order, [s, b, d] (or [s / size, b, d]) to [N, d].

    The loss itself sums its gradient over the ranks, of the kept rows only, so the backward pass of the gather only
    takes this rank's positions.
    """
    if tp.sequence_parallel:
        x_sbd = _WholeSequence.apply(x_sbd, tp)
    return x_sbd.transpose(0, 1).flatten(0, 1)
