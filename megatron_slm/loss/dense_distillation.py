"""The loss's second pass with a second model: its distribution is computed block by block beside the model's.

One more product of [K, d of the reference] and [d, V] than the cross-entropy's second pass; another one of each model
where the divergence's gradient needs its value first, and another where the temperature is not 1. No table of K x V
exists: the model's logits of one block of columns, the reference's of a chunk of rows of it.

Shapes: K kept rows, C rows of a chunk, d hidden (each model's own), V vocabulary rows held here, B rows of a block.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_slm.arithmetic import ceil_div
from megatron_slm.loss.blocks import BlockMemory, VocabularyBlock, accumulation_dtype, add_product, vocabulary_blocks
from megatron_slm.loss.divergences import Divergence
from megatron_slm.loss.kernels import Kernels
from megatron_slm.loss.passes import KeptRows, StashedRows, forward_pass
from megatron_slm.loss.soft_cap import slope_
from megatron_slm.loss.stash import Stash
from megatron_slm.loss.vocab_parallel import VocabularyPart

NUM_CHUNKS = 8
"""Chunks of rows of a block whose element-wise work is done at once. It takes three tables of a chunk: less than the
second block that cross-entropy has."""
LEAST_CHUNK_ROWS = 64
"""A chunk of fewer rows is not worth its calls."""


def chunk_rows(num_rows: int) -> int:
    """Return the rows of a chunk."""
    return min(num_rows, max(LEAST_CHUNK_ROWS, ceil_div(num_rows, NUM_CHUNKS)))


@dataclass(frozen=True)
class DensePass:
    """Results of the pass."""

    divergence_K: Tensor
    """Each kept row's divergence at the temperature, nats; bit-equal on all parts of the vocabulary."""
    grad_hidden_Kd: Tensor
    """Gradient of the rows through the vocabulary rows held here, fp32 (or fp64)."""
    grad_weight_Vd: Tensor
    """In the weight's dtype."""


class _LogProbabilities:
    """A model's log-probabilities of the kept rows at a temperature, a block of columns at a time."""

    def __init__(
        self,
        rows: KeptRows,
        weight_Vd: Tensor,
        most_rows: int,
        *,
        temperature: float,
        kernels: Kernels,
        part: VocabularyPart,
        stash: Stash | None = None,
    ) -> None:
        self.rows, self.temperature = rows, temperature
        self.log_sum_K = -rows.factor_K.log()
        """Of exp((logit - max) / temperature)."""
        if temperature != 1.0:
            tempered = forward_pass(
                rows.hidden_Kd,
                weight_Vd,
                torch.full_like(rows.local_label_K, -1),
                kernels=kernels,
                combine=part.combine,
                with_entropy=False,
                chunk_rows=len(rows.kept_K),
                temperature=temperature,
                softcap=rows.softcap,
            )
            self.log_sum_K = tempered.sum_N.log()
        self._memory = BlockMemory(most_rows, weight_Vd.shape[0], rows.hidden_Kd, softcap=rows.softcap)
        self._stashed = None if stash is None else StashedRows(rows, stash)

    def of(self, chunk: slice, block: VocabularyBlock, *, release: bool = True) -> Tensor:
        """Return [C, B] in fp32 (or fp64), in the memory of the block before.

        Args:
            release: it is the last pass over the stash.
        """
        if self._stashed is not None:
            x_KB, factor_K = self._stashed.exponentials(block, release=release)
            out_KB = self._memory.empty(*x_KB.shape)
            # what was too small for the stash is 0 there: no number's logarithm, so the smallest one's
            least = math.log(torch.finfo(out_KB.dtype).tiny)
            return out_KB.copy_(x_KB).mul_(factor_K[:, None]).log_().clamp_(min=least)
        logits_CB = self._memory.logits(self.rows.hidden_Kd[chunk], block)
        logits_CB.sub_(self.rows.max_K[chunk, None])
        if self.temperature != 1.0:
            logits_CB.div_(self.temperature)
        return logits_CB.sub_(self.log_sum_K[chunk, None])


def dense_pass(
    rows: KeptRows,
    weight_Vd: Tensor,
    reference_rows: KeptRows,
    reference_weight_Vd: Tensor,
    *,
    weight_K: Tensor,
    formula: Divergence,
    weight: float,
    temperature: float,
    kernels: Kernels,
    part: VocabularyPart,
    stash: Stash | None,
) -> DensePass:
    """Compute the kept rows' divergence, and the gradients of `sum_K weight_K ((1 - weight) CE + weight T^2 D)`.

    Args:
        rows: the model's, with factors 1 / sum of exponentials and targets probability - 1.
        reference_rows: the reference's, of the same tokens.
        weight_K: factor of each row's loss.
        stash: the model's exponentials; only at a temperature of 1, whose they are.
    """
    assert reference_weight_Vd.shape[0] == weight_Vd.shape[0], "both models have the same part of the vocabulary here"
    hidden_Kd = rows.hidden_Kd
    grad_hidden_Kd = torch.zeros_like(hidden_Kd, dtype=accumulation_dtype(hidden_Kd))
    moments_2K = grad_hidden_Kd.new_zeros(2, len(hidden_Kd))
    if not len(hidden_Kd):
        return DensePass(moments_2K[0], grad_hidden_Kd, torch.zeros_like(weight_Vd))
    # not zeros: its pages are first written block by block, as the stash's blocks are freed
    grad_weight_Vd = torch.empty_like(weight_Vd)
    shared = {"temperature": temperature, "kernels": kernels, "part": part}
    model = _LogProbabilities(rows, weight_Vd, len(hidden_Kd), stash=stash, **shared)  # type: ignore[arg-type]
    most_rows = chunk_rows(len(hidden_Kd))
    reference = _LogProbabilities(reference_rows, reference_weight_Vd, most_rows, **shared)  # type: ignore[arg-type]
    blocks = list(zip(vocabulary_blocks(weight_Vd), vocabulary_blocks(reference_weight_Vd), strict=True))
    everything = slice(0, len(hidden_Kd))
    if formula.needs_moments:
        for block, reference_block in blocks:
            log_p_KB = model.of(everything, block, release=False)
            for chunk in _chunks(len(hidden_Kd)):
                moments_2K[:, chunk] += formula.moments(log_p_KB[chunk], reference.of(chunk, reference_block))
        moments_2K = part.sum_in_rank_order(moments_2K)
    shape = hidden_Kd.shape[0], weight_Vd.shape[0]
    out_memory = None if weight_Vd.dtype == moments_2K.dtype else BlockMemory(*shape, hidden_Kd, weight_Vd.dtype)
    mixed = _Mixed(rows, model.log_sum_K, weight_K, weight, temperature)
    for block, reference_block in blocks:
        x_KB = model.of(everything, block)
        for chunk in _chunks(len(hidden_Kd)):
            log_q_CB = reference.of(chunk, reference_block)
            if not formula.needs_moments:
                moments_2K[:, chunk] += formula.moments(x_KB[chunk], log_q_CB)
            mixed.gradient_(x_KB[chunk], formula.gradient(x_KB[chunk], log_q_CB, moments_2K[:, chunk]), chunk, block)
        out_KB = x_KB if out_memory is None else out_memory.empty(*x_KB.shape).copy_(x_KB)
        torch.mm(out_KB.t(), hidden_Kd, out=grad_weight_Vd[block.start : block.start + block.size])
        add_product(grad_hidden_Kd, out_KB, block)
    if not formula.needs_moments:
        moments_2K = part.sum_in_rank_order(moments_2K)
    return DensePass(formula.value(moments_2K), grad_hidden_Kd, grad_weight_Vd)


def _chunks(num_rows: int) -> Iterator[slice]:
    step = chunk_rows(num_rows)
    return (slice(start, min(start + step, num_rows)) for start in range(0, num_rows, step))


class _Mixed:
    """The logits' gradient of the mixed loss, from that of the divergence."""

    def __init__(self, rows: KeptRows, log_sum_K: Tensor, weight_K: Tensor, weight: float, temperature: float) -> None:
        self.rows, self.weight_K, self.weight, self.temperature = rows, weight_K, weight, temperature
        self.shift_K = temperature * log_sum_K + rows.factor_K.log()
        """Turns `temperature * log-probability at it` into the log-probability at 1, when added."""
        self.log_sum_K = log_sum_K

    def gradient_(self, x_CB: Tensor, divergence_CB: Tensor, chunk: slice, block: VocabularyBlock) -> None:
        """Replace log-probabilities at the temperature by the gradients of the block's logits, in place."""
        slope_CB = self._slope(x_CB, chunk)
        if self.temperature != 1.0:
            x_CB.mul_(self.temperature).add_(self.shift_K[chunk, None])
        x_CB.exp_()
        column_C = block.columns(self.rows.local_label_K[chunk])
        inside_C = (column_C >= 0) & (column_C < block.size)
        label_C1 = torch.where(inside_C, column_C, 0)[:, None]
        target_C1 = torch.where(inside_C[:, None], self.rows.target_K[chunk, None], x_CB.gather(1, label_C1))
        x_CB.scatter_(1, label_C1, target_C1).mul_(1 - self.weight)
        x_CB.add_(divergence_CB, alpha=self.weight * self.temperature).mul_(self.weight_K[chunk, None])
        if slope_CB is not None:
            x_CB.mul_(slope_CB)

    def _slope(self, x_CB: Tensor, chunk: slice) -> Tensor | None:
        """The capped logits' derivatives, from log-probabilities at the temperature; None without a cap."""
        if self.rows.softcap is None:
            return None
        logits_CB = (x_CB + self.log_sum_K[chunk, None]).mul_(self.temperature).add_(self.rows.max_K[chunk, None])
        return slope_(logits_CB, self.rows.softcap)
