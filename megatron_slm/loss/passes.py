"""The loss's two passes over the vocabulary: statistics of all rows, gradients of the kept ones.

The vocabulary is the outer loop of the backward pass, so that the weight's gradient is written once, and of the
forward pass too where it takes all rows at once. No table of N x V exists beyond the stash's capacity.

Shapes: N rows (tokens), R rows of a chunk, K kept rows, d hidden, V vocabulary rows held here, B rows of a block.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_slm.loss.blocks import BlockMemory, VocabularyBlock, accumulation_dtype, add_product, vocabulary_blocks
from megatron_slm.loss.kernels import Kernels
from megatron_slm.loss.row_statistics import RowStatistics
from megatron_slm.loss.soft_cap import slope_
from megatron_slm.loss.stash import Stash


def forward_pass(
    hidden_Nd: Tensor,
    weight_Vd: Tensor,
    local_label_N: Tensor,
    *,
    kernels: Kernels,
    combine: Callable[[RowStatistics], RowStatistics],
    with_entropy: bool,
    chunk_rows: int,
    with_top_entropy: bool = False,
    stash: Stash | None = None,
    predict: Callable[[slice, RowStatistics], Tensor | None] | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
) -> RowStatistics:
    """Compute every row's statistics over the whole vocabulary: one product of [N, d] and [d, V], block by block.

    Args:
        local_label_N: the label's row in `weight_Vd`, int64; outside [0, V) where another rank holds it.
        combine: turns statistics over the vocabulary rows held here into those over the whole vocabulary.
        chunk_rows: rows that pass over the vocabulary at once.
        stash: keeps exponentials for the backward pass.
        predict: rows of a chunk to stash; None stashes all, as far as there is space.
        temperature: divides the logits.
        softcap: of the logits, before.
    """
    held = RowStatistics.of_no_logits(hidden_Nd, with_entropy=with_entropy, with_top_entropy=with_top_entropy)
    memory = BlockMemory(min(chunk_rows, hidden_Nd.shape[0]), weight_Vd.shape[0], hidden_Nd, softcap=softcap)
    combined: list[RowStatistics] = []
    for start in range(0, hidden_Nd.shape[0], chunk_rows):
        chunk = slice(start, min(start + chunk_rows, hidden_Nd.shape[0]))
        rows = held.rows(chunk)
        stashed = None if stash is None else stash.open(chunk.stop - chunk.start)
        for block in vocabulary_blocks(weight_Vd):
            logits_RB = memory.logits(hidden_Nd[chunk], block)
            if temperature != 1.0:
                logits_RB.div_(temperature)
            exponentials_RB = None if stashed is None else stashed[block.index]
            rows.fold_top(logits_RB)
            kernels.fold(logits_RB, rows, block.columns(local_label_N[chunk]), exponentials_RB)
            if stash is not None:
                stash.max_LN[block.index, chunk] = rows.max_N
        combined.append(combine(rows))
        if stash is not None and stashed is not None:
            stash.close(chunk, None if predict is None else predict(chunk, combined[-1]))
    if stash is not None:
        stash.seal()
    return RowStatistics.concatenated(combined)


@dataclass(frozen=True, kw_only=True)
class KeptRows:
    """The kept rows, as the backward pass takes them; statistics over the whole vocabulary."""

    hidden_Kd: Tensor
    local_label_K: Tensor
    kept_K: Tensor
    max_K: Tensor
    factor_K: Tensor
    """Turns exp(logit - max) into the logit's gradient: the row's weight over its sum of exponentials."""
    target_K: Tensor
    """Gradient of the label's logit: the row's weight times (probability - 1)."""
    softcap: float | None = None
    """Of the logits, whose gradients are those of the capped ones."""


@dataclass(frozen=True, kw_only=True)
class SparseTarget:
    """Distillation's part of the kept rows' gradients: a factor of all probabilities, and numbers of k ids a row."""

    weight: float
    """Of the divergence in the loss; the cross-entropy has the rest."""
    divergence_K: Tensor
    """Each row's divergence, nats."""
    slope_K: Tensor
    """The divergence's gradient for the logits of all ids but the k, divided by their probabilities."""
    local_id_Kk: Tensor
    """The ids' rows in the output weight held here, int64; outside of it where another rank holds them."""
    extra_Kk: Tensor
    """The divergence's gradient for the logits of the k ids, less slope times probability."""

    def add_to(self, gradient_KB: Tensor, block: VocabularyBlock, scale_K: Tensor) -> None:
        """Add the k ids' numbers to the gradients of a block's logits, in place.

        Args:
            scale_K: factor of each row's loss.
        """
        column_Kk = block.columns(self.local_id_Kk)
        inside_Kk = (column_Kk >= 0) & (column_Kk < block.size)
        extra_Kk = torch.where(inside_Kk, self.weight * scale_K[:, None] * self.extra_Kk, 0.0)
        gradient_KB.scatter_add_(1, torch.where(inside_Kk, column_Kk, 0), extra_Kk.to(gradient_KB.dtype))


def backward_pass(
    rows: KeptRows,
    weight_Vd: Tensor,
    *,
    kernels: Kernels,
    stash: Stash | None = None,
    add: Callable[[Tensor, VocabularyBlock], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute the gradients of the kept rows' weighted loss sum.

    Args:
        add: adds to the gradients of a block's logits [K, B], in place.

    Returns:
        gradient of the rows through the vocabulary rows held here [K, d] in fp32 (or fp64), and of the weight
        [V, d] in the weight's dtype.
    """
    hidden_Kd = rows.hidden_Kd
    grad_weight_Vd = torch.empty_like(weight_Vd)
    grad_hidden_Kd = torch.zeros_like(hidden_Kd, dtype=accumulation_dtype(hidden_Kd))
    shape = hidden_Kd.shape[0], weight_Vd.shape[0]
    memory, out_memory = (
        BlockMemory(*shape, hidden_Kd, softcap=rows.softcap),
        BlockMemory(*shape, hidden_Kd, weight_Vd.dtype),
    )
    stashed = None if stash is None else StashedRows(rows, stash)
    for block in vocabulary_blocks(weight_Vd):
        if stashed is None:
            x_KB, factor_K, max_K = memory.logits(hidden_Kd, block), rows.factor_K, rows.max_K
        else:
            (x_KB, factor_K), max_K = stashed.exponentials(block), None
        slope_KB = None
        if rows.softcap is not None:
            capped_KB = x_KB.clone() if stashed is None else stashed.logits(x_KB, block)
            slope_KB = slope_(capped_KB, rows.softcap)
        # gradients in the dtype of the products, in place where the logits or exponentials have it
        out_KB = x_KB if x_KB.dtype == weight_Vd.dtype else out_memory.empty(*x_KB.shape)
        column_K = block.columns(rows.local_label_K)
        kernels.gradient(x_KB, factor_K, column_K, rows.target_K, max_K=max_K, out_KB=out_KB)
        if add is not None:
            add(out_KB, block)
        if slope_KB is not None:
            out_KB.mul_(slope_KB)
        torch.mm(out_KB.t(), hidden_Kd, out=grad_weight_Vd[block.start : block.start + block.size])
        add_product(grad_hidden_Kd, out_KB, block)
    return grad_hidden_Kd, grad_weight_Vd


class StashedRows:
    """The kept rows' exponentials, block by block: from the stash, or recomputed for the rows it does not have.

    Recomputed rows are rounded as the stash rounds, and in the same order, so that the result does not depend on
    which rows were predicted.
    """

    def __init__(self, rows: KeptRows, stash: Stash) -> None:
        self.rows, self.stash = rows, stash
        self.slot_K = stash.slots(rows.kept_K)
        # with room for all rows none can be missing, and the device is not asked
        self.missing_M = (self.slot_K < 0).nonzero().squeeze(1) if not stash.has_room_for_all else self.slot_K[:0]
        self.hidden_Md = rows.hidden_Kd[self.missing_M]
        self.has_all = stash.has_room_for_all and self.slot_K.numel() == stash.num_rows

    def logits(self, x_KB: Tensor, block: VocabularyBlock) -> Tensor:
        """Return the logits of a block's exponentials, [K, B] in fp32 (or fp64); -infinity where they are 0."""
        max_K = self.stash.max_LN[block.index, self.rows.kept_K]
        return x_KB.to(max_K.dtype).log().add_(max_K[:, None])

    def exponentials(self, block: VocabularyBlock, *, release: bool = True) -> tuple[Tensor, Tensor]:
        """Return exp(logit - maximum so far) [K, B], and the factors that turn it into the logits' gradients [K].

        Args:
            release: free the stash's block, so that the result may be overwritten.
        """
        max_K = self.stash.max_LN[block.index, self.rows.kept_K]
        x_KB = self.stash.take(block.index, release=release)
        # where it has just these rows, they are in order already, since slots ascend as rows do
        x_KB = x_KB[: self.stash.num_rows] if self.has_all else x_KB.index_select(0, self.slot_K.clamp(min=0))
        if self.missing_M.numel():
            computed_MB = (
                BlockMemory(len(self.hidden_Md), block.size, self.hidden_Md, softcap=self.rows.softcap)
                .logits(self.hidden_Md, block)
                .sub_(max_K[self.missing_M][:, None])
                .exp_()
            )
            x_KB[self.missing_M] = computed_MB.to(x_KB.dtype)
        return x_KB, self.rows.factor_K * (max_K - self.rows.max_K).exp()
