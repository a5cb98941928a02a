"""The training objective: from a micro-batch's hidden states and labels to its loss sum and its `LossSums`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

from torch import Tensor

from megatron_slm.loss.distillation import Distillation, distilled_sum
from megatron_slm.loss.prediction import ThresholdPredictor
from megatron_slm.loss.selective_ce import RowLosses, row_losses, row_statistics
from megatron_slm.loss.soft_cap import cap_
from megatron_slm.loss.sums import EVALUATION, SumLayout, evaluation_sums, loss_sums
from megatron_slm.loss.variants import LossHead
from megatron_slm.loss.vocab_parallel import VocabularyPart, loss_rows
from megatron_slm.parallel.collectives import all_gather_dim0
from megatron_slm.parallel.context import held_rows, whole_rows
from megatron_slm.parallel.groups import ContextParallel, DataParallel, TensorParallel
from megatron_slm.selection.policies import score_quantiles
from megatron_slm.selection.ranking import Choice
from megatron_slm.selection.selector import Selector
from megatron_slm.types import DenseDistribution, MicroBatch, Selection, TokenStatistics


class OutputWeight(NamedTuple):
    """The output weight's token rows held here, and their place in the vocabulary."""

    weight_Vd: Tensor
    start: int
    """Token id of the first row."""
    rows: int
    """Rows of the largest part over the tensor-parallel ranks, padding included."""
    softcap: float | None = None
    """Of the logits; None for none."""

    def part(self, tp: TensorParallel) -> VocabularyPart:
        """Return the part of the vocabulary that these rows are."""
        return VocabularyPart(tp=tp, start=self.start, rows=self.rows, softcap=self.softcap)

    def logits(self, hidden: Tensor) -> Tensor:
        """Compute the logits of the token rows held here, [..., d] to [..., V]."""
        return cap_(hidden @ self.weight_Vd.t(), self.softcap)


class ScoredTokens(NamedTuple):
    """A micro-batch's tokens under a model and its selection, without a gradient, each [b, s]."""

    loss_bs: Tensor
    """Token losses in nats, fp32; 0 where not valid."""
    score_bs: Tensor | None
    """Scores that tokens are ranked by, fp32; this and the next are None where nothing was selected."""
    kept_bs: Tensor | None
    """True for tokens that would be kept, bool."""


@dataclass(frozen=True, kw_only=True)
class StepSettings:
    """Settings of a step's objective that change from step to step."""

    step: int
    """Steps done before this one."""
    score_threshold: float | None = None
    """The running threshold of the policy `quantile`; None before there is one."""
    keep_ratio: float | None = None
    """The keep ratio of --slm-keep-adaptation; None for that of the schedule."""
    loss_limit: float | None = None
    """Mean loss over valid tokens, in nats, beyond which the step is skipped; None applies it at any."""
    norm_limit: float | None = None
    """Global gradient norm before clipping beyond which the step is skipped; None applies it at any."""
    row_shares: tuple[int, ...] | None = None
    """Sixteenths of the rows of each block's backward pass; None where nothing controls them."""


Observer = Callable[[MicroBatch, Tensor, Tensor | None, Tensor], None]
"""Called on the last stage with a micro-batch, its token losses, its reference losses (both fp32 [N]) and the
kept rows (int64 [K])."""


@dataclass(kw_only=True, eq=False)
class Objective:
    """Selective language modeling, or CLM, which is the same with everything kept and no reference.

    Its predictor learns from every micro-batch; nothing else of it changes, and no result depends on the predictor.
    """

    selector: Selector
    tp: TensorParallel
    dp: DataParallel = field(default_factory=DataParallel)
    """The ranks whose tokens are ranked together in the scope `data-parallel`; one rank in the others."""
    context: ContextParallel = field(default_factory=ContextParallel)
    """The ranks that share the sequences of a micro-batch, whose tokens are ranked together in every scope."""
    head: LossHead = field(default_factory=LossHead)
    distillation: Distillation | None = None
    """The kept tokens' loss; None for cross-entropy."""
    predictor: ThresholdPredictor = field(default_factory=ThresholdPredictor)
    """Predicts which rows will be kept."""
    observer: Observer | None = None
    num_sources: int = 1
    """Corpora of the run."""

    @property
    def sum_layout(self) -> SumLayout:
        """Layout of the sums that `loss` returns."""
        return SumLayout(self.num_sources)

    def loss(
        self,
        x_sbd: Tensor,
        output: OutputWeight,
        batch: MicroBatch,
        reference: TokenStatistics | None,
        settings: StepSettings,
    ) -> tuple[Tensor, Tensor]:
        """Compute a micro-batch's loss sum, which carries the gradient of the kept tokens, and its packed `LossSums`.

        The sums, fp64 [`sum_layout.size`], stay on the device: a step adds them up there and reads them once.

        Args:
            x_sbd: the decoder's last hidden states, [s, b, d], or [s / size, b, d] under sequence parallelism.
            reference: the reference's statistics of the same tokens, with its distribution where that is distilled;
                None where there is none.
        """
        losses = row_losses(
            loss_rows(x_sbd, self.tp),
            output.weight_Vd,
            batch.labels_bs.flatten(),
            batch.valid_bs.flatten(),
            predict=partial(self._predict, batch, reference),
            keep_ratio=self.selector.expected_share(settings.step),
            part=output.part(self.tp),
            with_entropy=self.selector.needs("entropy"),
            with_top_entropy=self.selector.needs("top-entropy"),
            head=self.head,
        )
        choice, of_micro_batch = self.choose(losses.tokens, batch, reference, settings)
        kept_K = choice.kept_N.nonzero().squeeze(1)
        selection = Selection(kept_K, None if choice.weight_N is None else choice.weight_N[kept_K])
        loss_sum, trained_loss_K, divergence_K = self._kept_sum(losses, selection, reference)
        if losses.predicted:
            self._learn(losses.tokens, batch, reference, choice, num_kept=len(kept_K))
        reference_loss_N = None if reference is None else reference.loss_N
        if self.observer is not None:
            self.observer(batch, losses.tokens.loss_N, reference_loss_N, kept_K)
        sums = loss_sums(
            token_loss_N=losses.tokens.loss_N,
            reference_loss_N=reference_loss_N,
            choice=choice,
            quantiles=score_quantiles(of_micro_batch.score_N, of_micro_batch.ranked_N),
            kept_K=kept_K,
            trained_loss_K=trained_loss_K,
            divergence_K=divergence_K,
            valid_N=batch.valid_bs.flatten(),
            measured_threshold=self._measure(of_micro_batch, settings.step),
            source_b=batch.source_b,
            num_sources=self.num_sources,
        )
        return loss_sum, self.sum_layout.pack(sums)

    def _kept_sum(
        self, losses: RowLosses, selection: Selection, reference: TokenStatistics | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the loss sum with its gradient, the kept tokens' losses [K], and their divergences [K] if any."""
        loss_K = losses.tokens.loss_N[selection.kept_K]
        if self.distillation is None:
            return losses.kept_sum(selection), loss_K, None
        assert reference is not None, "a run that distills has a reference"
        assert reference.distribution is not None, "the reference of a run that distills has a distribution"
        loss_sum, divergence_K = distilled_sum(losses, selection, self.distillation, reference.distribution)
        return loss_sum, self.distillation.mixed(loss_K, divergence_K), divergence_K

    def _predict(
        self, batch: MicroBatch, reference: TokenStatistics | None, rows: slice, tokens: TokenStatistics
    ) -> Tensor | None:
        score_R = self.selector.row_scores(rows, tokens, reference, batch)
        return None if score_R is None else self.predictor.predict(score_R)

    def _learn(
        self,
        tokens: TokenStatistics,
        batch: MicroBatch,
        reference: TokenStatistics | None,
        choice: Choice,
        *,
        num_kept: int,
    ) -> None:
        score_N = self.selector.row_scores(slice(None), tokens, reference, batch)
        if score_N is not None:
            self.predictor.learn(score_N, choice.ranked_N, num_kept)

    def choose(
        self,
        tokens: TokenStatistics,
        batch: MicroBatch,
        reference: TokenStatistics | None,
        settings: StepSettings,
    ) -> tuple[Choice, Choice]:
        """Choose the tokens of a micro-batch to keep: those held here, and those of the whole micro-batch.

        Collective over the ranks whose tokens are ranked together: one gather of a few numbers a token.
        """
        ranking = self.selector.rank(tokens, reference, batch)
        num_samples, held = batch.labels_bs.shape
        length = held * self.context.size
        together = self.dp if self.dp.size > 1 else self.context
        if together.size > 1:
            parts = all_gather_dim0(ranking.pack()[None], together)
            ranking = ranking.unpack(whole_rows(parts, num_samples, self.context, together))
        choice = self.selector.choose(
            ranking,
            length=length,
            step=settings.step,
            threshold=settings.score_threshold,
            keep_ratio=settings.keep_ratio,
        )
        number, num_rows = self.dp.rank // self.context.size, num_samples * length
        of_micro_batch = choice.rows(slice(number * num_rows, (number + 1) * num_rows))
        if self.context.size == 1:
            return of_micro_batch, of_micro_batch
        own_M = held_rows(num_samples, length, self.context, batch.labels_bs.device)
        return of_micro_batch.rows(own_M), of_micro_batch

    def _measure(self, of_micro_batch: Choice, step: int) -> tuple[Tensor, Tensor]:
        """Measure a micro-batch for the next step's threshold (`Selector.measure`), on one of its ranks."""
        threshold, count = self.selector.measure(of_micro_batch, step)
        return (threshold, count) if self.context.rank == 0 else (threshold * 0, count * 0)

    def scored_tokens(
        self,
        x_sbd: Tensor,
        output: OutputWeight,
        batch: MicroBatch,
        reference: TokenStatistics | None,
        settings: StepSettings | None,
    ) -> ScoredTokens:
        """Compute the losses of a micro-batch's tokens and choose among them; without settings the losses alone."""
        selects = settings is not None
        tokens = self.statistics(
            x_sbd,
            output,
            batch,
            with_entropy=selects and self.selector.needs("entropy"),
            with_top_entropy=selects and self.selector.needs("top-entropy"),
        )
        loss_bs = tokens.loss_N.view(batch.valid_bs.shape)
        if settings is None:
            return ScoredTokens(loss_bs, None, None)
        choice, _ = self.choose(tokens, batch, reference, settings)
        return ScoredTokens(loss_bs, choice.score_N.view_as(batch.valid_bs), choice.kept_N.view_as(batch.valid_bs))

    def evaluation_sums(self, x_sbd: Tensor, output: OutputWeight, batch: MicroBatch) -> Tensor:
        """Compute a held-out micro-batch's sums without a gradient, packed by the layout `EVALUATION`."""
        return EVALUATION.pack(evaluation_sums(self.statistics(x_sbd, output, batch), batch))

    def statistics(
        self,
        x_sbd: Tensor,
        output: OutputWeight,
        batch: MicroBatch,
        *,
        with_entropy: bool = False,
        with_top_entropy: bool = False,
        with_distribution: bool = False,
    ) -> TokenStatistics:
        """Compute the statistics of every token without a gradient: for the reference and for evaluation.

        Args:
            with_distribution: keep what the distribution is computed from, `x_sbd` above all.
        """
        rows = row_statistics(
            loss_rows(x_sbd, self.tp),
            output.weight_Vd,
            batch.labels_bs.flatten(),
            part=output.part(self.tp),
            with_entropy=with_entropy,
            with_top_entropy=with_top_entropy,
            head=self.head,
        )
        statistics = rows.token_statistics(batch.valid_bs.flatten())
        if not with_distribution:
            return statistics
        distribution = DenseDistribution(x_sbd, output.weight_Vd, rows.max_N, rows.sum_N, output.softcap)
        return statistics._replace(distribution=distribution)
