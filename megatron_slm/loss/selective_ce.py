"""Selective cross-entropy: the losses of all valid tokens, the gradient of the kept ones only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_slm.loss.torch_backend import kept_gradients, row_statistics
from megatron_slm.loss.vocab_parallel import VocabularyShard
from megatron_slm.parallel.groups import TensorParallel

Select = Callable[[Tensor], Tensor]
"""Token losses [N] to the kept rows, ascending int64 [K]."""

WHOLE_VOCABULARY = VocabularyShard(tp=TensorParallel(), start=0)


class SelectiveLoss(NamedTuple):
    """A micro-batch's loss as a sum and a count; only the step divides, once, by the count of its whole batch."""

    loss_sum: Tensor
    """Sum of the kept tokens' losses in nats; carries the gradient."""
    kept_K: Tensor
    """Rows kept, ascending int64."""
    token_loss_N: Tensor
    """Every row's loss in nats, fp32 (fp64 for fp64 inputs), detached; 0 where not valid."""


class _SelectiveCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_Nd: Tensor,
        weight_Vd: Tensor,
        label_N: Tensor,
        valid_N: Tensor,
        select: Select,
        shard: VocabularyShard,
    ) -> tuple[Tensor, Tensor, Tensor]:
        stats = shard.combine(row_statistics(hidden_Nd, weight_Vd, label_N - shard.start))
        log_sum_N = stats.sum_N.log()
        token_loss_N = (log_sum_N - (stats.target_N - stats.max_N)).masked_fill_(~valid_N, 0.0)
        kept_K = select(token_loss_N)
        ctx.save_for_backward(hidden_Nd, weight_Vd, label_N[kept_K], kept_K, stats.max_N[kept_K], log_sum_N[kept_K])
        ctx.shard = shard
        ctx.mark_non_differentiable(kept_K, token_loss_N)
        return token_loss_N[kept_K].sum(), kept_K, token_loss_N

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden_Nd, weight_Vd, label_K, kept_K, max_K, log_sum_K = ctx.saved_tensors
        grad_Kd, grad_weight_Vd = kept_gradients(
            hidden_Nd[kept_K], weight_Vd, label_K - ctx.shard.start, max_K, log_sum_K, grads[0]
        )
        grad_hidden_Nd = torch.zeros_like(hidden_Nd)
        grad_hidden_Nd[kept_K] = ctx.shard.sum_rows(grad_Kd).to(hidden_Nd.dtype)
        return grad_hidden_Nd, grad_weight_Vd, None, None, None, None


def selective_cross_entropy(
    hidden_Nd: Tensor,
    weight_Vd: Tensor,
    label_N: Tensor,
    valid_N: Tensor,
    *,
    select: Select,
    shard: VocabularyShard = WHOLE_VOCABULARY,
) -> SelectiveLoss:
    """`sum over kept i of -log softmax(hidden_i W^T)[label_i]` (Rho-1, equation 5, before its division).

    The kept rows are chosen by `select` from the losses of all rows, in the middle of the forward pass. No
    table of N x V logits ever exists: memory is one block of columns; the backward pass recomputes the kept
    rows' logits (cost 1 + 3k GEMMs of N x d x V at keep ratio k, against 3 for the full loss).

    Args:
        hidden_Nd: output of the final norm, fp32, bf16 or fp64.
        weight_Vd: the output weight's rows held here.
        label_N: token ids, int64; any id of the vocabulary where not valid.
        valid_N: bool; rows that count.
        select: sees the losses (0 where not valid) and returns the rows to keep.
        shard: this rank's part of the vocabulary.
    """
    return SelectiveLoss(*_SelectiveCrossEntropy.apply(hidden_Nd, weight_Vd, label_N, valid_N, select, shard))


@torch.no_grad()
def token_losses(
    hidden_Nd: Tensor, weight_Vd: Tensor, label_N: Tensor, valid_N: Tensor, *, shard: VocabularyShard = WHOLE_VOCABULARY
) -> Tensor:
    """Every row's loss in nats, fp32 [N], 0 where not valid: pass 1 alone, for the reference and evaluation."""
    stats = shard.combine(row_statistics(hidden_Nd, weight_Vd, label_N - shard.start))
    return (stats.sum_N.log() - (stats.target_N - stats.max_N)).masked_fill_(~valid_N, 0.0)
