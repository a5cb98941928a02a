"""Selects the kept tokens from both models' statistics, by scores, policy, scope, schedule and protected ids.

Selection has two steps, so that callers can concatenate the tokens of several ranks in between: `rank` computes the
scores of each token by itself; `choose` compares the tokens. Neither depends on ranks.

Shapes: N tokens, in (sequence, position) order; S scores; b sequences of s tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from megatron_slm.config.scores import ScoreInput
from megatron_slm.selection import noise
from megatron_slm.selection.policies import (
    measured_threshold,
    running_threshold,
    share_threshold,
    soft_weights,
    standardize,
)
from megatron_slm.selection.schedule import KeepSchedule
from megatron_slm.selection.scope import Scope, in_scope, select_in_scope
from megatron_slm.selection.scores import Score, ScoreInputs
from megatron_slm.selection.select import num_kept
from megatron_slm.types import MicroBatch, TokenStatistics, move

Policy = Literal["top-k", "threshold", "quantile", "sample", "weights"]
Combine = Literal["intersection", "union", "sum"]


class Ranking(NamedTuple):
    """Scores and eligibility of each token."""

    score_SN: Tensor
    """fp32 [S, N]."""
    finite_N: Tensor
    """Valid, with finite losses and scores; bool [N]."""
    ranked_N: Tensor
    """Subset of `finite_N` whose ids may be kept; bool [N]."""
    always_N: Tensor
    """Subset of `ranked_N` whose ids are always kept; bool [N]."""
    noise_N: Tensor | None = None
    """Gumbel noise, fp32 [N]; only with the policy `sample`."""

    def pack(self) -> Tensor:
        """Return the ranking as one fp32 table [R, N] for communication; tables may be concatenated along N."""
        masks = [self.finite_N.float(), self.ranked_N.float(), self.always_N.float()]
        noise = [] if self.noise_N is None else [self.noise_N]
        return torch.stack([*self.score_SN, *masks, *noise])

    @classmethod
    def unpack(cls, table_RN: Tensor, num_scores: int) -> Ranking:
        """Return the ranking of a table from `pack`."""
        finite_N, ranked_N, always_N, *noise = table_RN[num_scores:]
        return cls(
            score_SN=table_RN[:num_scores],
            finite_N=finite_N.bool(),
            ranked_N=ranked_N.bool(),
            always_N=always_N.bool(),
            noise_N=noise[0] if noise else None,
        )


class Choice(NamedTuple):
    """Result of the selection for each token."""

    kept_N: Tensor
    """bool [N]."""
    score_N: Tensor
    """The ranked score (the first of several, unless summed), fp32 [N]."""
    finite_N: Tensor
    """Same as in `Ranking`, like the next two."""
    ranked_N: Tensor
    always_N: Tensor
    weight_N: Tensor | None = None
    """Factor of each kept loss, fp32 [N]; None means 1 for all."""
    expected_ratio: float | None = None
    """Average share kept, where losses are divided by an expected count and not the micro-batch's own."""

    def rows(self, rows: slice) -> Choice:
        """Return the choice for a slice of the tokens, such as one rank's."""
        tensors = [x[rows] if isinstance(x, Tensor) else x for x in self]
        return Choice(*tensors)  # type: ignore[arg-type]

    def divisor(self) -> Tensor:
        """Return the divisor of the loss sum, fp64 []: the number of kept tokens, or its expectation.

        Soft weights have mean 1, so their sum is the number of tokens.
        """
        if self.expected_ratio is None:
            return self.kept_N.sum().double()
        ordinary = (self.ranked_N & ~self.always_N).sum()
        return self.always_N.sum() + self.expected_ratio * ordinary.double()


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
    temperature: float = 1.0
    weight_floor: float = 0.0
    always_keep: tuple[int, ...] = ()
    never_keep: tuple[int, ...] = ()
    seed: int = 0

    def needs(self, score_input: ScoreInput) -> bool:
        """Return True if any score needs the input."""
        return any(score_input in score.needs for score in self.scores)

    @property
    def needs_reference(self) -> bool:
        """True if any score needs a reference model."""
        return any(score.needs_reference for score in self.scores)

    def expected_share(self, step: int) -> float:
        """Return the approximate share of tokens kept in a step; for planning, never for results."""
        if not self.scores or self.policy in ("weights", "threshold") or self.schedule.warming_up(step):
            return 1.0
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
        fits = self.policy in ("top-k", "sample") and self.scope != "data-parallel"
        return fits and bool(self.scores) and not self.always_keep

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
        position_N = torch.arange(batch.labels_bs.shape[1], device=label_N.device).repeat(len(batch.sample_b))[rows]
        inputs = ScoreInputs(loss_N=tokens.loss_N, entropy_N=tokens.entropy_N)
        if reference is not None:
            entropy_N = None if reference.entropy_N is None else reference.entropy_N[rows]
            inputs = inputs._replace(reference_loss_N=reference.loss_N[rows], reference_entropy_N=entropy_N)
        if self.needs("uniform"):
            uniform_N = noise.uniform(self.seed, noise.RANDOM_SCORE, sample_N, position_N)
            inputs = inputs._replace(uniform_N=uniform_N)
        scores = [score.of(inputs) for score in self.scores]
        statistics = (inputs.loss_N, inputs.entropy_N, inputs.reference_loss_N, inputs.reference_entropy_N)
        finite_N = ranked_N = batch.valid_bs.flatten()[rows] & _all_finite(*statistics, *scores)
        if self.never_keep:
            ranked_N = ranked_N & ~torch.isin(label_N, _ids(self.never_keep, label_N.device))
        always_N = torch.zeros_like(ranked_N)
        if self.always_keep:
            always_N = ranked_N & torch.isin(label_N, _ids(self.always_keep, label_N.device))
        no_scores_SN = tokens.loss_N.new_zeros((0, tokens.loss_N.numel()), dtype=torch.float32)
        samples = self.policy == "sample"
        return Ranking(
            score_SN=torch.stack(scores) if scores else no_scores_SN,
            finite_N=finite_N,
            ranked_N=ranked_N,
            always_N=always_N,
            noise_N=noise.gumbel(self.seed, noise.GUMBEL, sample_N, position_N) if samples else None,
        )

    def _with_noise(self, score_N: Tensor, noise_N: Tensor | None) -> Tensor:
        """Return score / T + noise, whose k highest sample softmax(score / T) without replacement (Gumbel top-k)."""
        return score_N if noise_N is None else score_N / self.temperature + noise_N

    # ---- all tokens -----------------------------------------------------------------------------------

    def choose(self, ranking: Ranking, *, length: int, step: int, threshold: float | None = None) -> Choice:
        """Choose the kept tokens.

        Args:
            ranking: all tokens of a scope, or of several scopes.
            length: tokens per sequence, `s`.
            step: index of the step, from 0.
            threshold: running threshold of the policy `quantile`; None in a run's first step.
        """
        score_N, ranked_N, always_N = self._score(ranking, length), ranking.ranked_N, ranking.always_N
        keep_all = Choice(ranked_N, score_N, ranking.finite_N, ranked_N, always_N)
        if not self.scores or self.schedule.warming_up(step):
            return keep_all
        ratio = self.schedule.ratio(step, self.keep_ratio)
        if self.policy == "weights":
            return keep_all._replace(weight_N=self._weights(score_N, ranked_N, length))
        if self.policy == "threshold":
            return keep_all._replace(kept_N=ranked_N & (always_N | (score_N >= self.threshold)))
        if self.policy == "quantile":
            lowest = share_threshold(score_N, ranked_N & ~always_N, ratio) if threshold is None else threshold
            kept_N = ranked_N & (always_N | (score_N >= lowest)) if ratio < 1.0 else ranked_N
            return keep_all._replace(kept_N=kept_N, expected_ratio=ratio)
        return keep_all._replace(kept_N=self._top(ranking, score_N, length, step, ratio))

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

    def _weights(self, score_N: Tensor, ranked_N: Tensor, length: int) -> Tensor:
        def weights(score_M: Tensor, ranked_M: Tensor) -> Tensor:
            return soft_weights(score_M, ranked_M, self.temperature, self.weight_floor)

        return in_scope(weights, score_N.view(-1, length), ranked_N.view(-1, length), self.scope).flatten()

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
        return select_in_scope(views[0], views[1], ratio, self.scope, views[2] if self.always_keep else None)

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

    def describe(self) -> str:
        """Return a short description for tables."""
        if not self.scores:
            return "every token"
        joiner = {"intersection": " ∩ ", "union": " ∪ ", "sum": " + ", None: ""}[self.combine]
        by = joiner.join(score.name for score in self.scores)
        return f"keep {self.keep_ratio} by {by}, {self.policy} per {self.scope}"


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
