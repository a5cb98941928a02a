"""What a step trains on: a micro-batch's hidden states and labels in, a loss sum and its statistics out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_slm.loss.prediction import ThresholdPredictor
from megatron_slm.loss.selective_ce import selective_cross_entropy, token_statistics
from megatron_slm.loss.sums import loss_sums
from megatron_slm.loss.variants import LossHead
from megatron_slm.loss.vocab_parallel import VocabularyShard, loss_rows
from megatron_slm.parallel.collectives import all_gather_dim0
from megatron_slm.parallel.groups import DataParallel, TensorParallel
from megatron_slm.selection.selector import Choice, Ranking, Selector
from megatron_slm.types import MicroBatch, Selection, TokenStatistics

ONE_BY_ITSELF = DataParallel()


class OutputWeight(NamedTuple):
    """The output weight's token rows held here, and which rows they are."""

    weight_Vd: Tensor
    start: int
    rows: int
    """Rows of the largest part over the tensor-parallel ranks, padding included."""


class Probed(NamedTuple):
    """What a model and its selection say of a micro-batch, without a gradient, each [b, s]."""

    loss_bs: Tensor
    """Token losses in nats, fp32; 0 where not valid."""
    score_bs: Tensor | None
    """What tokens are ranked by, fp32; this and the next are None where nothing was selected."""
    kept_bs: Tensor | None
    """Which tokens would be kept, bool."""


@dataclass(frozen=True, kw_only=True)
class StepSettings:
    """What a step's objective depends on beside its tokens and weights."""

    step: int
    """Steps done before this one."""
    score_threshold: float | None = None
    """The running threshold of the policy `quantile`; None before there is one."""
    loss_limit: float | None = None
    """Mean loss over valid tokens, in nats, beyond which the step is not applied; None applies it at any."""


Observer = Callable[[MicroBatch, Tensor, Tensor | None, Tensor], None]
"""Called on the last stage with a micro-batch, its token losses, its reference losses (both fp32 [N]) and the
kept rows (int64 [K])."""


@dataclass(frozen=True, kw_only=True)
class Objective:
    """Selective language modeling, or CLM, which is the same with everything kept and no reference."""

    selector: Selector
    tp: TensorParallel
    dp: DataParallel = ONE_BY_ITSELF
    """Who ranks together in the scope `data-parallel`; one rank by itself in the others."""
    head: LossHead = LossHead()  # noqa: RUF009 (frozen)
    predictor: ThresholdPredictor = field(default_factory=ThresholdPredictor)
    """Guesses which rows will be kept; no result depends on what it has seen."""
    observer: Observer | None = None
    num_sources: int = 1
    """Corpora of the run."""

    def loss(
        self,
        x_sbd: Tensor,
        output: OutputWeight,
        batch: MicroBatch,
        reference: TokenStatistics | None,
        settings: StepSettings,
    ) -> tuple[Tensor, Tensor]:
        """The loss sum of a micro-batch (carrying the gradient of the kept tokens) and the values of its `LossSums`.

        The values, fp64 [`num_sums`], stay on the device: a step adds them up there and brings them over once.

        Args:
            x_sbd: the head's output, [s, b, d], or [s / size, b, d] under sequence parallelism.
            reference: what the reference says of the same tokens; None where there is none.
            settings: the step's.
        """
        chosen: list[Choice] = []
        scored: list[Tensor] = []

        def likely(rows: slice, tokens: TokenStatistics) -> Tensor | None:
            score_R = self.selector.row_scores(rows, tokens, reference, batch)
            if score_R is None:
                return None
            scored.append(score_R)
            return self.predictor.likely(score_R)

        def select(tokens: TokenStatistics) -> Selection:
            choice = self.choose(tokens, batch, reference, settings)
            chosen.append(choice)
            kept_K = choice.kept_N.nonzero().squeeze(1)
            if scored:  # the loss asked what is likely: let it know better next time
                self.predictor.learn(torch.cat(scored), choice.ranked_N, len(kept_K))
            return Selection(kept_K, None if choice.weight_N is None else choice.weight_N[kept_K])

        loss_sum, selection, tokens = selective_cross_entropy(
            loss_rows(x_sbd, self.tp),
            output.weight_Vd,
            batch.labels_bs.flatten(),
            batch.valid_bs.flatten(),
            select=select,
            likely=likely,
            keep_ratio=self.selector.expected_share(settings.step),
            shard=VocabularyShard(tp=self.tp, start=output.start, rows=output.rows),
            with_entropy=self.selector.needs("entropy"),
            head=self.head,
        )
        reference_loss_N = None if reference is None else reference.loss_N
        if self.observer is not None:
            self.observer(batch, tokens.loss_N, reference_loss_N, selection.kept_K)
        measured = self.selector.measure(chosen[0], settings.step)
        sources = (batch.source_b, self.num_sources)
        return loss_sum, loss_sums(
            tokens.loss_N, reference_loss_N, chosen[0], selection.kept_K, batch.valid_bs.flatten(), measured, sources
        )

    def choose(
        self,
        tokens: TokenStatistics,
        batch: MicroBatch,
        reference: TokenStatistics | None,
        settings: StepSettings,
    ) -> Choice:
        """Which tokens of a micro-batch are kept. Collective over `dp`, with one gather of a few numbers a token."""
        ranking = self.selector.rank(tokens, reference, batch)
        num_rows = ranking.ranked_N.numel()
        if self.dp.size > 1:
            table_RN = ranking.pack()
            parts = all_gather_dim0(table_RN[None], self.dp)
            ranking = Ranking.unpack(torch.cat(list(parts), dim=1), len(self.selector.scores))
        choice = self.selector.choose(
            ranking, length=batch.labels_bs.shape[1], step=settings.step, threshold=settings.score_threshold
        )
        return choice.rows(slice(self.dp.rank * num_rows, (self.dp.rank + 1) * num_rows))

    def probe(
        self,
        x_sbd: Tensor,
        output: OutputWeight,
        batch: MicroBatch,
        reference: TokenStatistics | None,
        settings: StepSettings | None,
    ) -> Probed:
        """Losses of a micro-batch's tokens, and which of them would be kept; without settings the losses alone."""
        with_entropy = settings is not None and self.selector.needs("entropy")
        tokens = self.statistics(x_sbd, output, batch, with_entropy=with_entropy)
        loss_bs = tokens.loss_N.view(batch.valid_bs.shape)
        if settings is None:
            return Probed(loss_bs, None, None)
        choice = self.choose(tokens, batch, reference, settings)
        return Probed(loss_bs, choice.score_N.view_as(batch.valid_bs), choice.kept_N.view_as(batch.valid_bs))

    def statistics(
        self, x_sbd: Tensor, output: OutputWeight, batch: MicroBatch, *, with_entropy: bool = False
    ) -> TokenStatistics:
        """What a model says of every token, without a gradient: for the reference and for evaluation."""
        return token_statistics(
            loss_rows(x_sbd, self.tp),
            output.weight_Vd,
            batch.labels_bs.flatten(),
            batch.valid_bs.flatten(),
            shard=VocabularyShard(tp=self.tp, start=output.start, rows=output.rows),
            with_entropy=with_entropy,
            head=self.head,
        )
