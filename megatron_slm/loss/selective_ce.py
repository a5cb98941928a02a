"""Selective cross-entropy: the losses of all valid tokens, the gradient of the kept ones only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_slm.loss.torch_backend import kept_gradients, row_statistics
from megatron_slm.loss.vocab_parallel import VocabularyShard
from megatron_slm.parallel.groups import TensorParallel
from megatron_slm.types import Selection, TokenStatistics

Select = Callable[[TokenStatistics], Selection]
"""What the model says of all rows, to the rows that are trained on."""

WHOLE_VOCABULARY = VocabularyShard(tp=TensorParallel(), start=0)


class SelectiveLoss(NamedTuple):
    """A micro-batch's loss as a sum; only the step divides, once, by the count of its whole batch."""

    loss_sum: Tensor
    """Sum of the kept tokens' losses, each times its weight, in nats; carries the gradient."""
    selection: Selection
    statistics: TokenStatistics
    """Every row's loss (and entropy) in nats, fp32 (fp64 for fp64 inputs), detached; 0 where not valid."""


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
        with_entropy: bool,
        result: list[Any],
    ) -> Tensor:
        stats = shard.combine(row_statistics(hidden_Nd, weight_Vd, label_N - shard.start, with_entropy=with_entropy))
        tokens = stats.token_statistics(valid_N)
        selection = select(tokens)
        result += [selection, tokens]
        kept_K, weight_K = selection
        log_sum_K, loss_K = stats.sum_N[kept_K].log(), tokens.loss_N[kept_K]
        if weight_K is None:
            weight_K = torch.ones_like(loss_K)
        ctx.save_for_backward(hidden_Nd, weight_Vd, label_N[kept_K], kept_K, stats.max_N[kept_K], log_sum_K, weight_K)
        ctx.shard = shard
        return (loss_K * weight_K).sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden_Nd, weight_Vd, label_K, kept_K, max_K, log_sum_K, weight_K = ctx.saved_tensors
        grad_Kd, grad_weight_Vd = kept_gradients(
            hidden_Nd[kept_K], weight_Vd, label_K - ctx.shard.start, max_K, log_sum_K, weight_K * grads[0]
        )
        grad_hidden_Nd = torch.zeros_like(hidden_Nd)
        grad_hidden_Nd[kept_K] = ctx.shard.sum_rows(grad_Kd).to(hidden_Nd.dtype)
        return grad_hidden_Nd, grad_weight_Vd, None, None, None, None, None, None


def selective_cross_entropy(
    hidden_Nd: Tensor,
    weight_Vd: Tensor,
    label_N: Tensor,
    valid_N: Tensor,
    *,
    select: Select,
    shard: VocabularyShard = WHOLE_VOCABULARY,
    with_entropy: bool = False,
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
        select: sees the statistics of all rows (0 where not valid) and chooses among them.
        shard: this rank's part of the vocabulary.
        with_entropy: also compute every row's entropy.
    """
    result: list[Any] = []
    loss_sum = _SelectiveCrossEntropy.apply(hidden_Nd, weight_Vd, label_N, valid_N, select, shard, with_entropy, result)
    return SelectiveLoss(loss_sum, *result)


@torch.no_grad()
def token_statistics(
    hidden_Nd: Tensor,
    weight_Vd: Tensor,
    label_N: Tensor,
    valid_N: Tensor,
    *,
    shard: VocabularyShard = WHOLE_VOCABULARY,
    with_entropy: bool = False,
) -> TokenStatistics:
    """Every row's loss (and entropy) in nats, fp32 [N], 0 where not valid: for the reference and for evaluation."""
    stats = row_statistics(hidden_Nd, weight_Vd, label_N - shard.start, with_entropy=with_entropy)
    return shard.combine(stats).token_statistics(valid_N)
