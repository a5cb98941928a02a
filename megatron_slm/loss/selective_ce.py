"""Selective cross-entropy: the losses of all valid tokens, the gradient of the kept ones only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_slm.loss.kernels import choose_kernels
from megatron_slm.loss.passes import KeptRows, backward_pass, forward_pass
from megatron_slm.loss.row_statistics import RowStatistics
from megatron_slm.loss.variants import LossHead
from megatron_slm.loss.vocab_parallel import VocabularyShard
from megatron_slm.parallel.groups import TensorParallel
from megatron_slm.types import Selection, TokenStatistics

Select = Callable[[TokenStatistics], Selection]
"""What the model says of all rows, to the rows that are trained on."""

Likely = Callable[[slice, TokenStatistics], Tensor | None]
"""Some rows and what the model says of them, to those that will probably be kept (bool [R]; None: any of them)."""

WHOLE_VOCABULARY = VocabularyShard(tp=TensorParallel(), start=0)


class SelectiveLoss(NamedTuple):
    """A micro-batch's loss as a sum; only the step divides, once, by the count of its whole batch."""

    loss_sum: Tensor
    """Sum of the kept tokens' losses, each times its weight, in nats; carries the gradient."""
    selection: Selection
    statistics: TokenStatistics
    """Every row's loss (and entropy) in nats, fp32 (fp64 for fp64 inputs), detached; 0 where not valid."""


@dataclass(frozen=True, kw_only=True)
class _Call:
    """The arguments that are no tensors of autograd's, and where results that are none go."""

    label_N: Tensor
    valid_N: Tensor
    select: Select
    likely: Likely | None
    keep_ratio: float
    shard: VocabularyShard
    with_entropy: bool
    head: LossHead
    results: list[Any]


class _SelectiveCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_Nd: Tensor, weight_Vd: Tensor, call: _Call) -> Tensor:
        kernels = choose_kernels(call.head.backend, on_gpu=hidden_Nd.is_cuda)
        columns = call.shard.rows or weight_Vd.shape[0]
        plan = call.head.plan(hidden_Nd.shape[0], columns, call.keep_ratio, hidden_Nd.dtype)
        stash = plan.stash(hidden_Nd, weight_Vd) if any(ctx.needs_input_grad) else None
        stats = forward_pass(
            hidden_Nd,
            weight_Vd,
            call.label_N - call.shard.start,
            kernels=kernels,
            combine=call.shard.combine,
            with_entropy=call.with_entropy,
            chunk_rows=plan.chunk_rows,
            stash=stash,
            likely=_likely_rows(call) if plan.variant == "predictive" else None,
        )
        tokens = stats.token_statistics(call.valid_N)
        selection = call.select(tokens)
        call.results.extend((selection, tokens))
        kept_K, weight_K = selection.kept_K, selection.weight_K
        loss_K = tokens.loss_N[kept_K]
        ctx.call, ctx.kernels, ctx.stash = call, kernels, stash
        ctx.save_for_backward(hidden_Nd, weight_Vd, kept_K, weight_K, loss_K, stats.max_N[kept_K], stats.sum_N[kept_K])
        return loss_K.sum() if weight_K is None else (loss_K * weight_K).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        hidden_Nd, weight_Vd, kept_K, weight_K, loss_K, max_K, sum_K = ctx.saved_tensors
        scale_K = grad.expand_as(loss_K) if weight_K is None else weight_K * grad
        rows = KeptRows(
            hidden_Kd=hidden_Nd[kept_K],
            local_label_K=ctx.call.label_N[kept_K] - ctx.call.shard.start,
            kept_K=kept_K,
            max_K=max_K,
            factor_K=scale_K / sum_K,
            target_K=scale_K * torch.expm1(-loss_K),  # probability - 1, with all its digits where it is nearly 0
        )
        grad_Kd, grad_weight_Vd = backward_pass(rows, weight_Vd, kernels=ctx.kernels, stash=ctx.stash)
        grad_hidden_Nd = torch.zeros_like(hidden_Nd)
        grad_hidden_Nd[kept_K] = ctx.call.shard.sum_rows(grad_Kd).to(hidden_Nd.dtype)
        return grad_hidden_Nd, grad_weight_Vd, None


def _likely_rows(call: _Call) -> Callable[[slice, RowStatistics], Tensor | None] | None:
    likely = call.likely
    if likely is None:
        return None
    return lambda chunk, stats: likely(chunk, stats.token_statistics(call.valid_N[chunk]))


def selective_cross_entropy(
    hidden_Nd: Tensor,
    weight_Vd: Tensor,
    label_N: Tensor,
    valid_N: Tensor,
    *,
    select: Select,
    likely: Likely | None = None,
    keep_ratio: float = 1.0,
    shard: VocabularyShard = WHOLE_VOCABULARY,
    with_entropy: bool = False,
    head: LossHead = LossHead(),  # noqa: B008 (frozen)
) -> SelectiveLoss:
    """`sum over kept i of -log softmax(hidden_i W^T)[label_i]` (Rho-1, equation 5, before its division).

    The kept rows are chosen by `select` from the losses of all rows, in the middle of the forward pass. No table of
    N x V logits exists beyond the memory that `head` allows; see `loss/variants.py` for what each choice costs.

    Args:
        hidden_Nd: output of the final norm, fp32, bf16 or fp64.
        weight_Vd: the output weight's rows held here, of the same dtype.
        label_N: token ids, int64; any id of the vocabulary where not valid.
        valid_N: bool; rows that count.
        select: sees the statistics of all rows (0 where not valid) and chooses among them.
        likely: guesses which rows will be kept; only time and memory depend on it.
        keep_ratio: share of the rows that will be kept, about; only time and memory depend on it.
        shard: this rank's part of the vocabulary.
        with_entropy: also compute every row's entropy.
        head: backend, variant and memory.

    Raises:
        ConfigError: the backend cannot run here.
    """
    call = _Call(
        label_N=label_N,
        valid_N=valid_N,
        select=select,
        likely=likely,
        keep_ratio=keep_ratio,
        shard=shard,
        with_entropy=with_entropy,
        head=head,
        results=[],
    )
    loss_sum = _SelectiveCrossEntropy.apply(hidden_Nd, weight_Vd, call)
    return SelectiveLoss(loss_sum, *call.results)


@torch.no_grad()
def token_statistics(
    hidden_Nd: Tensor,
    weight_Vd: Tensor,
    label_N: Tensor,
    valid_N: Tensor,
    *,
    shard: VocabularyShard = WHOLE_VOCABULARY,
    with_entropy: bool = False,
    head: LossHead = LossHead(),  # noqa: B008 (frozen)
) -> TokenStatistics:
    """Every row's loss (and entropy) in nats, fp32 [N], 0 where not valid: for the reference and for evaluation."""
    stats = forward_pass(
        hidden_Nd,
        weight_Vd,
        label_N - shard.start,
        kernels=choose_kernels(head.backend, on_gpu=hidden_Nd.is_cuda),
        combine=shard.combine,
        with_entropy=with_entropy,
        chunk_rows=hidden_Nd.shape[0],
    )
    return stats.token_statistics(valid_N)
