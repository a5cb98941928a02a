"""Selects the kept tokens from both models' statistics, by scores, policy, scope, schedule and protected ids.

Selection has two steps, so that callers can concatenate the tokens of several ranks in between: `rank` computes the
scores of each token by itself; `choose` compares the tokens. Neither depends on ranks.

Shapes: N tokens, in (sequence, position) order; S scores; b sequences of s tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from megatron_slm.config.scores import ScoreInput
from megatron_slm.config.weights import Normalization
from megatron_slm.selection import noise
from megatron_slm.selection.adaptation import adapted
from megatron_slm.selection.policies import measured_threshold, running_threshold, share_threshold, standardize
from megatron_slm.selection.ranking import Choice, Ranking
from megatron_slm.selection.schedule import KeepSchedule
from megatron_slm.selection.scope import Scope, in_scope, select_in_scope
from megatron_slm.selection.scores import Score, ScoreInputs, column
from megatron_slm.selection.select import num_kept
from megatron_slm.selection.spans import low_runs
from megatron_slm.selection.weights import WEIGHTS, Weight, WeightOptions, kept_weights
from megatron_slm.types import MicroBatch, TokenStatistics, move, positions_of

Policy = Literal["top-k", "threshold", "quantile", "sample", "weights", "positive", "peaking"]
Combine = Literal["intersection", "union", "sum"]


@dataclass(frozen=True, kw_only=True)
class Selector:
    """Selects the tokens to train on and their weights; without scores, every token (CLM)."""

    scores: tuple[Score, ...] = ()
    keep_ratio: float = 1.0
    scope: Scope = "micro-batch"
    policy: Policy = "top-k"
    combine: Combine | None = None
    combine_ratios: tuple[float, ...] = ()
    """Keep ratio of each score, for `intersection` and `union`."""
    combine_weights: tuple[float, ...] = ()
    """Weight of each score, for `sum`."""
    schedule: KeepSchedule = field(default_factory=KeepSchedule)
    threshold: float = 0.0
    threshold_decay: float = 0.9
    keep_adaptation: float = 0.0
    """Sensitivity of a keep ratio that adapts; 0 for a fixed one."""
    keep_least: float = 0.1
    """Smallest ratio of the adaptation."""
    keep_most: float = 1.0
    """Largest share that the policy `positive` keeps."""
    peaking_share: float = 0.6
    """Share of the lowest scores whose runs the policy `peaking` drops."""
    peaking_length: int = 3
    """Least length of such a run, in tokens."""
    temperature: float | None = None
    """Divisor of scores in the policy `sample` (None: 1), and of weights (see `WeightOptions`)."""
    weight: Weight | None = None
    """Weight of the kept tokens; None: 1 for all, and `gibbs` with the policy `weights`."""
    weight_normalization: Normalization | None = None
    """None: the published one."""
    weight_power: float | None = None
    """Exponent in the weight's formula; None: its default."""
    weight_floor: float = 0.0
    token_weight_V: Tensor | None = field(default=None, compare=False)
    """Factor of each label's weight by its id, fp32 [V]; None: 1 for all."""
    always_keep: tuple[int, ...] = ()
    never_keep: tuple[int, ...] = ()
    protected_spans: str | None = None
    """Column whose tokens above 0 are always kept, and below 0 never."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.policy == "weights" and self.weight is None:
            object.__setattr__(self, "weight", WEIGHTS["gibbs"])

    def needs(self, score_input: ScoreInput) -> bool:
        """Return True if a score or the weight needs the input."""
        return any(score_input in user.needs for user in (*self.scores, self.weight) if user is not None)

    @property
    def selects(self) -> bool:
        """True if tokens are treated unlike each other; False trains on all of them alike (CLM)."""
        return bool(self.scores) or self.weight is not None or self.token_weight_V is not None

    @property
    def needs_reference(self) -> bool:
        """True if any score needs a reference model."""
        return any(score.needs_reference for score in self.scores)

    def expected_share(self, step: int) -> float:
        """Return the approximate share of tokens kept in a step; for planning, never for results."""
        keeps_all = not self.scores or self.policy in ("weights", "threshold")
        if keeps_all or self.schedule.warming_up(step):
            return 1.0
        if self.policy == "positive":
            return self.keep_most
        if self.combine == "intersection":
            return min(self.schedule.ratio(step, own) for own in self.combine_ratios)
        if self.combine == "union":
            return min(1.0, sum(self.schedule.ratio(step, own) for own in self.combine_ratios))
        return self.schedule.ratio(step, self.keep_ratio)

    def most_kept(self, step: int, num_sequences: int, length: int) -> int:
        """An upper bound of the tokens of a micro-batch that a step keeps; all of them where no share bounds it."""
        total = num_sequences * length
        if not self.keeps_a_share or self.schedule.warming_up(step):
            return total
        own = self.combine_ratios if self.combine in ("intersection", "union") else (self.keep_ratio,)
        sets, size = (num_sequences, length) if self.scope == "sequence" else (1, total)
        counts = [sets * num_kept(size, self.schedule.ratio(step, ratio)) for ratio in own]
        return min(total, sum(counts) if self.combine == "union" else min(counts))

    @property
    def keeps_a_share(self) -> bool:
        """True if the tokens that a micro-batch keeps are at most a share of its own."""
        fits = self.policy in ("top-k", "sample") and self.scope != "data-parallel" and not self.keep_adaptation
        return fits and bool(self.scores) and not self._protects

    @property
    def _protects(self) -> bool:
        """True if tokens may be kept whatever their score."""
        return bool(self.always_keep) or self.protected_spans is not None

    # ---- each token by itself -----------------------------------------------------------------------------

    def rank(self, tokens: TokenStatistics, reference: TokenStatistics | None, batch: MicroBatch) -> Ranking:
        """Compute the scores and eligibility of each token of a micro-batch."""
        return self._rank(slice(None), tokens, reference, batch)

    def row_scores(
        self, rows: slice, tokens: TokenStatistics, reference: TokenStatistics | None, batch: MicroBatch
    ) -> Tensor | None:
        """Return the scores of some rows before the losses of the others are known, fp32 [rows].

        Infinity for tokens always kept, -infinity for tokens never kept. None where a token has more than one score
        (combinations), or all are kept (soft weights, CLM).

        Args:
            rows: rows of the micro-batch.
            tokens: the model's statistics of these rows only; `reference` and `batch` are of the whole micro-batch.
        """
        if len(self.scores) != 1 or self.policy == "weights":
            return None
        ranking = self._rank(rows, tokens, reference, batch)
        score_N = self._with_noise(ranking.score_SN[0], ranking.noise_N)
        score_N = torch.where(ranking.always_N, torch.inf, score_N)
        return torch.where(ranking.ranked_N, score_N, -torch.inf)

    def _rank(
        self, rows: slice, tokens: TokenStatistics, reference: TokenStatistics | None, batch: MicroBatch
    ) -> Ranking:
        label_N = batch.labels_bs.flatten()[rows]
        sample_N = batch.sample_b[:, None].expand_as(batch.labels_bs).flatten()[rows]
        position_N = positions_of(batch).repeat(len(batch.sample_b))[rows]
        inputs = self._inputs(rows, tokens, reference, batch, sample_N, position_N)
        scores = [score.of(inputs) for score in self.scores]
        weight_N = None if self.weight is None else self.weight.of(inputs, self._weight_options)
        factor_N = None
        if self.token_weight_V is not None:
            factor_N = move(self.token_weight_V, label_N.device)[label_N]
        statistics = (inputs.loss_N, inputs.entropy_N, inputs.reference_loss_N, inputs.reference_entropy_N)
        finite_N = ranked_N = batch.valid_bs.flatten()[rows] & _all_finite(*statistics, *scores, weight_N, factor_N)
        if self.never_keep:
            ranked_N = ranked_N & ~torch.isin(label_N, _ids(self.never_keep, label_N.device))
        always_N = torch.zeros_like(ranked_N)
        if self.protected_spans is not None:
            protected_N = column(inputs, self.protected_spans)
            ranked_N = ranked_N & ~(protected_N < 0)
            always_N = ranked_N & (protected_N > 0)
        if self.always_keep:
            always_N = always_N | (ranked_N & torch.isin(label_N, _ids(self.always_keep, label_N.device)))
        no_scores_SN = tokens.loss_N.new_zeros((0, tokens.loss_N.numel()), dtype=torch.float32)
        samples = self.policy == "sample"
        return Ranking(
            score_SN=torch.stack(scores) if scores else no_scores_SN,
            finite_N=finite_N,
            ranked_N=ranked_N,
            always_N=always_N,
            noise_N=noise.gumbel(self.seed, noise.GUMBEL, sample_N, position_N) if samples else None,
            weight_N=weight_N,
            factor_N=factor_N,
        )

    def _inputs(
        self,
        rows: slice,
        tokens: TokenStatistics,
        reference: TokenStatistics | None,
        batch: MicroBatch,
        sample_N: Tensor,
        position_N: Tensor,
    ) -> ScoreInputs:
        inputs = ScoreInputs(loss_N=tokens.loss_N, entropy_N=tokens.entropy_N, top_entropy_N=tokens.top_entropy_N)
        if reference is not None:
            entropy_N = None if reference.entropy_N is None else reference.entropy_N[rows]
            inputs = inputs._replace(reference_loss_N=reference.loss_N[rows], reference_entropy_N=entropy_N)
        if self.needs("uniform"):
            uniform_N = noise.uniform(self.seed, noise.RANDOM_SCORE, sample_N, position_N)
            inputs = inputs._replace(uniform_N=uniform_N)
        if batch.columns is not None:
            columns = {name: number_bs.flatten()[rows] for name, number_bs in batch.columns.items()}
            inputs = inputs._replace(columns=columns)
        return inputs

    def _with_noise(self, score_N: Tensor, noise_N: Tensor | None) -> Tensor:
        """Return score / T + noise, whose k highest sample softmax(score / T) without replacement (Gumbel top-k)."""
        return score_N if noise_N is None else score_N / (self.temperature or 1.0) + noise_N

    # ---- all tokens -----------------------------------------------------------------------------------

    def choose(
        self,
        ranking: Ranking,
        *,
        length: int,
        step: int,
        threshold: float | None = None,
        keep_ratio: float | None = None,
    ) -> Choice:
        """Choose the kept tokens.

        Args:
            ranking: all tokens of a scope, or of several scopes.
            length: tokens per sequence, `s`.
            step: index of the step, from 0.
            threshold: running threshold of the policy `quantile`; None in a run's first step.
            keep_ratio: ratio that adapts; None for that of the schedule.
        """
        score_N, ranked_N, always_N = self._score(ranking, length), ranking.ranked_N, ranking.always_N
        choice = Choice(ranked_N, score_N, ranking.finite_N, ranked_N, always_N)
        if not self.selects or self.schedule.warming_up(step):
            return choice
        ratio = self.schedule.ratio(step, self.keep_ratio) if keep_ratio is None else keep_ratio
        if self.policy == "quantile":
            lowest = share_threshold(score_N, ranked_N & ~always_N, ratio) if threshold is None else threshold
            kept_N = ranked_N & (always_N | (score_N >= lowest)) if ratio < 1.0 else ranked_N
            choice = choice._replace(kept_N=kept_N, expected_ratio=ratio)
        elif self.scores and self.policy != "weights":
            choice = choice._replace(kept_N=self._kept(ranking, score_N, length, step, ratio))
        return choice._replace(weight_N=self._weights(choice, ranking, length))

    def _kept(self, ranking: Ranking, score_N: Tensor, length: int, step: int, ratio: float) -> Tensor:
        ranked_N, always_N = ranking.ranked_N, ranking.always_N
        if self.policy == "threshold":
            return ranked_N & (always_N | (score_N >= self.threshold))
        if self.policy == "positive":
            above_N = (score_N > 0) & self._top_share(score_N, ranking, length, self.keep_most)
            return above_N | self._top_share(score_N, ranking, length, ratio)
        if self.policy == "peaking":
            low_N = ranked_N & ~self._top_share(score_N, ranking, length, 1.0 - self.peaking_share)
            anchor_N = ranked_N & ~self._top_share(score_N, ranking, length, ratio)
            sets_SN = torch.stack([low_N, anchor_N]).view(2, -1, length)
            dropped_N = low_runs(sets_SN[0], sets_SN[1], self.peaking_length, self.scope)
            return ranked_N & ~dropped_N
        return self._top(ranking, score_N, length, step, ratio)

    def _score(self, ranking: Ranking, length: int) -> Tensor:
        """Return the score that is ranked and logged, fp32 [N]."""
        if not self.scores:
            return torch.zeros_like(ranking.ranked_N, dtype=torch.float32)
        if self.combine != "sum":
            return ranking.score_SN[0]
        ranked_bs = ranking.ranked_N.view(-1, length)
        total_bs = torch.zeros_like(ranked_bs, dtype=torch.float32)
        for weight, score_N in zip(self.combine_weights, ranking.score_SN, strict=True):
            total_bs += weight * in_scope(standardize, score_N.view(-1, length), ranked_bs, self.scope)
        return total_bs.flatten()

    @property
    def _weight_options(self) -> WeightOptions:
        power = None if self.weight is None else self.weight.power
        return WeightOptions(
            power=self.weight_power or power or 1.0, temperature=self.temperature, floor=self.weight_floor
        )

    def _weights(self, choice: Choice, ranking: Ranking, length: int) -> Tensor | None:
        """Return the weight of each kept token, fp32 [N]; None where all are 1."""
        if self.weight is None and ranking.factor_N is None:
            return None
        base_N = choice.score_N if ranking.weight_N is None else ranking.weight_N
        return kept_weights(
            self.weight,
            base_N.view(-1, length),
            choice.kept_N.view(-1, length),
            None if ranking.factor_N is None else ranking.factor_N.view(-1, length),
            options=self._weight_options,
            normalization=self.weight_normalization,
            scope=self.scope,
        ).flatten()

    def _top(self, ranking: Ranking, score_N: Tensor, length: int, step: int, ratio: float) -> Tensor:
        if self.combine in (None, "sum"):
            return self._top_share(self._with_noise(score_N, ranking.noise_N), ranking, length, ratio)
        kept = [
            self._top_share(one_N, ranking, length, self.schedule.ratio(step, own))
            for one_N, own in zip(ranking.score_SN, self.combine_ratios, strict=True)
        ]
        masks = torch.stack(kept)
        return masks.all(0) if self.combine == "intersection" else masks.any(0)

    def _top_share(self, score_N: Tensor, ranking: Ranking, length: int, ratio: float) -> Tensor:
        views = [x.view(-1, length) for x in (score_N, ranking.ranked_N, ranking.always_N)]
        return select_in_scope(views[0], views[1], ratio, self.scope, views[2] if self._protects else None)

    # ---- the running threshold ------------------------------------------------------------------------------

    def measure(self, choice: Choice, step: int) -> tuple[Tensor, Tensor]:
        """Measure a micro-batch for the next step's threshold: (threshold x ranked tokens, ranked tokens), fp64 [].

        Both are 0 if the policy has no running threshold or the next step keeps everything.
        """
        ordinary_N = choice.ranked_N & ~choice.always_N
        ratio = self.schedule.ratio(step + 1, self.keep_ratio)
        if self.policy != "quantile" or not self.scores or ratio >= 1.0:
            zero = ordinary_N.new_zeros((), dtype=torch.float64)
            return zero, zero
        count = ordinary_N.sum().double()
        return measured_threshold(choice.score_N, ordinary_N, ratio) * count, count

    def next_threshold(self, before: float | None, measured_sum: float, num_ranked: float) -> float | None:
        """Return the running threshold after a step, from `measure` summed over micro-batches and ranks."""
        return running_threshold(before, measured_sum, num_ranked, self.threshold_decay)

    def next_adaptation(self, before: list[float], step: int, kept_loss: float, num_kept: float) -> list[float]:
        """Return the state of the adapting keep ratio after a step (see `adapted`); empty for a fixed ratio.

        Args:
            kept_loss: sum of the kept tokens' losses, in nats.
            num_kept: their number.
        """
        if not self.keep_adaptation or self.schedule.warming_up(step) or num_kept == 0:
            return before
        return adapted(
            before,
            kept_loss / num_kept,
            keep_ratio=self.keep_ratio,
            sensitivity=self.keep_adaptation,
            least=self.keep_least,
        )

    def describe(self) -> str:
        """Return a short description for tables."""
        weighted = "" if self.weight is None else f", weighted by {self.weight.name}"
        if not self.scores:
            return f"every token{weighted}"
        joiner = {"intersection": " ∩ ", "union": " ∪ ", "sum": " + ", None: ""}[self.combine]
        by = joiner.join(score.name for score in self.scores)
        return f"keep {self.keep_ratio} by {by}, {self.policy} per {self.scope}{weighted}"


@lru_cache(maxsize=16)
def _ids(ids: tuple[int, ...], device: torch.device) -> Tensor:
    """Return token ids on the device, int64; copied once."""
    found = move(torch.tensor(ids, dtype=torch.int64, device="cpu"), device)
    assert found is not None, "a tensor was moved"
    return found


def _all_finite(*columns: Tensor | None) -> Tensor:
    """Return True for rows whose numbers are all finite, bool [N]; None columns are ignored."""
    masks = [x.isfinite() for x in columns if x is not None]
    return torch.stack(masks).all(0)
