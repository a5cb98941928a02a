"""What a step trains on: a micro-batch's hidden states and labels in, a loss sum and its statistics out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_slm.loss.selective_ce import selective_cross_entropy, token_statistics
from megatron_slm.loss.vocab_parallel import VocabularyShard, loss_rows
from megatron_slm.parallel.groups import TensorParallel
from megatron_slm.selection.scope import Scope, select_in_scope
from megatron_slm.selection.scores import excess_loss
from megatron_slm.types import MicroBatch, Selection, TokenStatistics


class OutputWeight(NamedTuple):
    """The output weight's token rows held here, and which rows they are."""

    weight_Vd: Tensor
    start: int
    rows: int
    """Rows of the largest part over the tensor-parallel ranks, padding included."""


@dataclass(frozen=True)
class LossSums:
    """Sums over tokens, each in nats; the quotients that are logged are taken once, over a whole step."""

    kept_loss: float = 0.0
    kept_tokens: float = 0.0
    valid_loss: float = 0.0
    valid_tokens: float = 0.0
    reference_loss: float = 0.0
    kept_excess: float = 0.0

    def __add__(self, other: LossSums) -> LossSums:
        return LossSums(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})


@dataclass(frozen=True, kw_only=True)
class StepSettings:
    """What a step's objective depends on beside its tokens and weights."""

    step: int
    """Steps done before this one."""


Observer = Callable[[MicroBatch, Tensor, Tensor | None, Tensor], None]
"""Called on the last stage with a micro-batch, its token losses, its reference losses (both fp32 [N]) and the
kept rows (int64 [K])."""


@dataclass(frozen=True, kw_only=True)
class Objective:
    """Selective language modeling, or CLM, which is the same with everything kept and no reference."""

    keep_ratio: float
    scope: Scope
    tp: TensorParallel
    observer: Observer | None = None

    def loss(
        self,
        x_sbd: Tensor,
        output: OutputWeight,
        batch: MicroBatch,
        reference: TokenStatistics | None,
        settings: StepSettings,
    ) -> tuple[Tensor, LossSums]:
        """The loss sum of a micro-batch (carrying the gradient of the kept tokens) and its statistics.

        Args:
            x_sbd: the head's output, [s, b, d], or [s / size, b, d] under sequence parallelism.
            reference: what the reference says of the same tokens; None keeps every token.
            settings: the step's.
        """
        reference_loss_N = None if reference is None else reference.loss_N
        valid_N = batch.valid_bs.flatten()

        def select(tokens: TokenStatistics) -> Selection:
            if reference_loss_N is None:
                return Selection(valid_N.nonzero().squeeze(1))
            score_bs = excess_loss(tokens.loss_N, reference_loss_N).view_as(batch.valid_bs)
            return Selection(select_in_scope(score_bs, batch.valid_bs, self.keep_ratio, self.scope))

        loss_sum, selection, tokens = selective_cross_entropy(
            loss_rows(x_sbd, self.tp),
            output.weight_Vd,
            batch.labels_bs.flatten(),
            valid_N,
            select=select,
            shard=VocabularyShard(tp=self.tp, start=output.start, rows=output.rows),
        )
        if self.observer is not None:
            self.observer(batch, tokens.loss_N, reference_loss_N, selection.kept_K)
        return loss_sum, _sums(tokens.loss_N, selection.kept_K, valid_N, reference_loss_N)

    def statistics(self, x_sbd: Tensor, output: OutputWeight, batch: MicroBatch) -> TokenStatistics:
        """What a model says of every token, without a gradient: for the reference and for evaluation."""
        return token_statistics(
            loss_rows(x_sbd, self.tp),
            output.weight_Vd,
            batch.labels_bs.flatten(),
            batch.valid_bs.flatten(),
            shard=VocabularyShard(tp=self.tp, start=output.start, rows=output.rows),
        )


def _sums(token_loss_N: Tensor, kept_K: Tensor, valid_N: Tensor, reference_loss_N: Tensor | None) -> LossSums:
    loss_N = token_loss_N.double()
    reference_N = torch.zeros_like(loss_N) if reference_loss_N is None else reference_loss_N.double()
    sums = [
        loss_N[kept_K].sum(),
        loss_N.sum(),
        valid_N.sum().double(),
        reference_N.sum(),
        (loss_N - reference_N)[kept_K].sum(),
    ]
    kept, valid, num_valid, reference, excess = torch.stack(sums).tolist()  # one transfer from the device
    return LossSums(
        kept_loss=kept,
        kept_tokens=float(kept_K.numel()),
        valid_loss=valid,
        valid_tokens=num_valid,
        reference_loss=reference,
        kept_excess=excess,
    )


def evaluation_sums(statistics: TokenStatistics, batch: MicroBatch) -> LossSums:
    """A held-out micro-batch's loss sum and count."""
    count = float(batch.valid_bs.sum())
    total = float(statistics.loss_N.double().sum())
    return LossSums(kept_loss=total, kept_tokens=count, valid_loss=total, valid_tokens=count)
