"""Selective cross-entropy: the losses of all valid tokens, the gradient of the kept ones only.

It has two halves, and the selection in between: `row_losses` computes every row's loss, `RowLosses.kept_sum` the sum of
the kept ones, which carries their gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_slm.loss.kernels import Kernels, choose_kernels
from megatron_slm.loss.passes import KeptRows, SparseTarget, backward_pass, forward_pass
from megatron_slm.loss.row_statistics import RowStatistics
from megatron_slm.loss.stash import Stash
from megatron_slm.loss.variants import LossHead
from megatron_slm.loss.vocab_parallel import VocabularyPart
from megatron_slm.parallel.groups import TensorParallel
from megatron_slm.types import Selection, TokenStatistics

Select = Callable[[TokenStatistics], Selection]
"""Chooses the rows to train on from the model's statistics of all rows."""

Predict = Callable[[slice, TokenStatistics], Tensor | None]
"""Predicts from the model's statistics of some rows which of them will be kept, bool [R]; None predicts nothing."""

WHOLE_VOCABULARY = VocabularyPart(tp=TensorParallel(), start=0)


@dataclass(frozen=True, kw_only=True)
class RowLosses:
    """Every row's loss, and what the gradient of the kept rows is computed from."""

    tokens: TokenStatistics
    """Every row's loss (and entropy) in nats, fp32 (fp64 for fp64 inputs), detached; 0 where not valid."""
    hidden_Nd: Tensor
    weight_Vd: Tensor
    local_label_N: Tensor
    part: VocabularyPart
    kernels: Kernels
    rows: RowStatistics
    """Statistics over the whole vocabulary."""
    stash: Stash | None
    predicted: bool
    """The stash holds the rows that were predicted to be kept."""

    def kept_sum(self, selection: Selection, target: SparseTarget | None = None) -> Tensor:
        """Sum the kept rows' losses, each times its weight. The sum carries their gradient; differentiate it once.

        Args:
            target: of distillation from stored probabilities, mixed into the losses.
        """
        return _KeptSum.apply(self.hidden_Nd, self.weight_Vd, self, selection, target)


class _KeptSum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_Nd: Tensor,
        weight_Vd: Tensor,
        losses: RowLosses,
        selection: Selection,
        target: SparseTarget | None,
    ) -> Tensor:
        kept_K, weight_K = selection
        loss_K, max_K, sum_K = (x[kept_K] for x in (losses.tokens.loss_N, losses.rows.max_N, losses.rows.sum_N))
        ctx.part, ctx.kernels, ctx.stash, ctx.target = losses.part, losses.kernels, losses.stash, target
        ctx.save_for_backward(
            hidden_Nd, weight_Vd, losses.local_label_N[kept_K], kept_K, weight_K, loss_K, max_K, sum_K
        )
        if target is not None:
            loss_K = (1 - target.weight) * loss_K + target.weight * target.divergence_K
        return loss_K.sum() if weight_K is None else (loss_K * weight_K).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        hidden_Nd, weight_Vd, local_label_K, kept_K, weight_K, loss_K, max_K, sum_K = ctx.saved_tensors
        scale_K = grad.expand_as(loss_K) if weight_K is None else weight_K * grad
        factor_K, target_K = scale_K, scale_K * torch.expm1(-loss_K)  # probability - 1, with all its digits near 0
        add = None
        if (target := ctx.target) is not None:
            slope_K = target.weight * target.slope_K
            factor_K = scale_K * (1 - target.weight + slope_K)
            target_K = (1 - target.weight) * target_K + scale_K * slope_K * torch.exp(-loss_K)
            add = partial(target.add_to, scale_K=scale_K)
        rows = KeptRows(
            hidden_Kd=hidden_Nd[kept_K],
            local_label_K=local_label_K,
            kept_K=kept_K,
            max_K=max_K,
            factor_K=factor_K / sum_K,
            target_K=target_K,
            softcap=ctx.part.softcap,
        )
        grad_Kd, grad_weight_Vd = backward_pass(rows, weight_Vd, kernels=ctx.kernels, stash=ctx.stash, add=add)
        grad_hidden_Nd = torch.zeros_like(hidden_Nd)
        grad_hidden_Nd[kept_K] = ctx.part.sum_rows(grad_Kd).to(hidden_Nd.dtype)
        return grad_hidden_Nd, grad_weight_Vd, None, None, None


def row_losses(
    hidden_Nd: Tensor,
    weight_Vd: Tensor,
    label_N: Tensor,
    valid_N: Tensor,
    *,
    predict: Predict | None = None,
    keep_ratio: float = 1.0,
    part: VocabularyPart = WHOLE_VOCABULARY,
    with_entropy: bool = False,
    with_top_entropy: bool = False,
    head: LossHead = LossHead(),  # noqa: B008 (frozen)
) -> RowLosses:
    """Compute the losses of all rows: the first half of `selective_cross_entropy`, which explains the arguments.

    Raises:
        ConfigError: the backend cannot run here.
    """
    kernels = choose_kernels(head.backend, on_gpu=hidden_Nd.is_cuda)
    plan = head.plan(hidden_Nd.shape[0], part.rows or weight_Vd.shape[0], keep_ratio, hidden_Nd.dtype)
    differentiates = torch.is_grad_enabled() and (hidden_Nd.requires_grad or weight_Vd.requires_grad)
    local_label_N = label_N - part.start
    with torch.no_grad():
        stash = plan.stash(hidden_Nd, weight_Vd) if differentiates else None
        predicts = stash is not None and plan.variant == "predictive"
        rows = forward_pass(
            hidden_Nd,
            weight_Vd,
            local_label_N,
            kernels=kernels,
            combine=part.combine,
            with_entropy=with_entropy,
            with_top_entropy=with_top_entropy,
            chunk_rows=plan.chunk_rows,
            stash=stash,
            predict=_by_row_statistics(predict, valid_N) if predicts and predict is not None else None,
            softcap=part.softcap,
        )
        tokens = rows.token_statistics(valid_N)
    return RowLosses(
        tokens=tokens,
        hidden_Nd=hidden_Nd,
        weight_Vd=weight_Vd,
        local_label_N=local_label_N,
        part=part,
        kernels=kernels,
        rows=rows,
        stash=stash,
        predicted=predicts,
    )


def _by_row_statistics(predict: Predict, valid_N: Tensor) -> Callable[[slice, RowStatistics], Tensor | None]:
    return lambda chunk, rows: predict(chunk, rows.token_statistics(valid_N[chunk]))


class SelectiveLoss(NamedTuple):
    """A micro-batch's loss as a sum; only the step divides, once, by the count of its whole batch."""

    loss_sum: Tensor
    """Sum of the kept tokens' losses, each times its weight, in nats; carries the gradient."""
    selection: Selection
    statistics: TokenStatistics
    """Every row's loss (and entropy) in nats, fp32 (fp64 for fp64 inputs), detached; 0 where not valid."""


def selective_cross_entropy(
    hidden_Nd: Tensor,
    weight_Vd: Tensor,
    label_N: Tensor,
    valid_N: Tensor,
    *,
    select: Select,
    predict: Predict | None = None,
    keep_ratio: float = 1.0,
    part: VocabularyPart = WHOLE_VOCABULARY,
    with_entropy: bool = False,
    with_top_entropy: bool = False,
    head: LossHead = LossHead(),  # noqa: B008 (frozen)
) -> SelectiveLoss:
    """`sum over kept i of -log softmax(hidden_i W^T)[label_i]` (Rho-1, equation 5, before its division).

    The kept rows are chosen by `select` from the losses of all rows. No table of N x V logits exists beyond the memory
    that `head` allows; see `loss/variants.py` for the cost of each choice.

    Args:
        hidden_Nd: output of the final norm, fp32, bf16 or fp64.
        weight_Vd: the output weight's rows held here, of the same dtype.
        label_N: token ids, int64; any id of the vocabulary where not valid.
        valid_N: bool; rows that count.
        select: chooses rows by the statistics of all rows (0 where not valid).
        predict: predicts which rows will be kept; only time and memory depend on it.
        keep_ratio: approximate share of the rows that will be kept; only time and memory depend on it.
        part: this rank's part of the vocabulary.
        with_entropy: also compute every row's entropy.
        with_top_entropy: also compute the entropy of every row's `TOP_LOGITS` most likely tokens, renormalized.
        head: backend, variant and memory.

    Raises:
        ConfigError: the backend cannot run here.
    """
    losses = row_losses(
        hidden_Nd,
        weight_Vd,
        label_N,
        valid_N,
        predict=predict,
        keep_ratio=keep_ratio,
        part=part,
        with_entropy=with_entropy,
        with_top_entropy=with_top_entropy,
        head=head,
    )
    selection = select(losses.tokens)
    return SelectiveLoss(losses.kept_sum(selection), selection, losses.tokens)


@torch.no_grad()
def token_statistics(
    hidden_Nd: Tensor,
    weight_Vd: Tensor,
    label_N: Tensor,
    valid_N: Tensor,
    *,
    part: VocabularyPart = WHOLE_VOCABULARY,
    with_entropy: bool = False,
    with_top_entropy: bool = False,
    head: LossHead = LossHead(),  # noqa: B008 (frozen)
) -> TokenStatistics:
    """Every row's loss (and entropy) in nats, fp32 [N], 0 where not valid: for the reference and for evaluation."""
    rows = row_statistics(
        hidden_Nd,
        weight_Vd,
        label_N,
        part=part,
        with_entropy=with_entropy,
        with_top_entropy=with_top_entropy,
        head=head,
    )
    return rows.token_statistics(valid_N)


@torch.no_grad()
def row_statistics(
    hidden_Nd: Tensor,
    weight_Vd: Tensor,
    label_N: Tensor,
    *,
    part: VocabularyPart = WHOLE_VOCABULARY,
    with_entropy: bool = False,
    with_top_entropy: bool = False,
    head: LossHead = LossHead(),  # noqa: B008 (frozen)
) -> RowStatistics:
    """Every row's statistics over the whole vocabulary, which its loss and entropy are computed from."""
    return forward_pass(
        hidden_Nd,
        weight_Vd,
        label_N - part.start,
        kernels=choose_kernels(head.backend, on_gpu=hidden_Nd.is_cuda),
        combine=part.combine,
        with_entropy=with_entropy,
        with_top_entropy=with_top_entropy,
        chunk_rows=hidden_Nd.shape[0],
        softcap=part.softcap,
    )
