"""Scores, policy, scope, schedule and protected ids composed: from the models' statistics to the kept tokens.

A selection has two halves, so that tokens of several ranks can be ranked together in between: `rank` looks at
each token by itself; `choose` looks at all that compete. Neither knows of ranks.

Shapes: N tokens, in (sequence, position) order; S scores; b sequences of s tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from megatron_slm.selection import noise
from megatron_slm.selection.policies import (
    measured_threshold,
    running_threshold,
    share_threshold,
    soft_weights,
    standardised,
)
from megatron_slm.selection.schedule import KeepSchedule
from megatron_slm.selection.scope import Scope, in_scope, select_in_scope
from megatron_slm.selection.scores import Need, Score, ScoreInputs
from megatron_slm.types import MicroBatch, TokenStatistics, move

Policy = Literal["top-k", "threshold", "quantile", "sample", "weights"]
Combine = Literal["intersection", "union", "sum"]


class Ranking(NamedTuple):
    """What each token brings into the competition."""

    score_SN: Tensor
    """fp32 [S, N]."""
    finite_N: Tensor
    """Valid, and every loss and score of it a finite number; bool [N]."""
    ranked_N: Tensor
    """Takes part: of those, the ones whose id may be kept; bool [N]."""
    always_N: Tensor
    """Is kept in any case: of those, the ones whose id says so; bool [N]."""
    noise_N: Tensor | None = None
    """Gumbel noise, fp32 [N]; only where the policy samples."""

    def pack(self) -> Tensor:
        """Everything as one fp32 table [R, N], to be sent; joining tables along N joins rankings."""
        standing_N = torch.stack([self.finite_N, self.ranked_N, self.always_N]).sum(0)  # each is a part of the last
        rows = [*self.score_SN, standing_N.float()]
        return torch.stack(rows if self.noise_N is None else [*rows, self.noise_N])

    @classmethod
    def unpack(cls, table_RN: Tensor, num_scores: int) -> Ranking:
        """The ranking of a table."""
        standing_N, *rest = table_RN[num_scores:]
        noise_N = rest[0] if rest else None
        return cls(table_RN[:num_scores], standing_N >= 1, standing_N >= 2, standing_N >= 3, noise_N)


class Choice(NamedTuple):
    """What became of each token."""

    kept_N: Tensor
    """bool [N]."""
    score_N: Tensor
    """What was ranked by (of several scores that are not summed, the first), fp32 [N]."""
    finite_N: Tensor
    """This and the next two: see `Ranking`."""
    ranked_N: Tensor
    always_N: Tensor
    weight_N: Tensor | None = None
    """What each kept loss is multiplied by, fp32 [N]; None stands for ones."""
    expected_ratio: float | None = None
    """The share kept on average, where the count of a micro-batch is not what its loss is divided by."""

    def rows(self, rows: slice) -> Choice:
        """A part of the tokens, such as one rank's."""
        tensors = [x[rows] if isinstance(x, Tensor) else x for x in self]
        return Choice(*tensors)  # type: ignore[arg-type]

    def divisor(self) -> Tensor:
        """What a loss sum is to be divided by, fp64 []: the number of kept tokens, or what it is on average.

        Soft weights have mean 1, so the number of tokens is their sum.
        """
        if self.expected_ratio is None:
            return self.kept_N.sum().double()
        ordinary = (self.ranked_N & ~self.always_N).sum()
        return self.always_N.sum() + self.expected_ratio * ordinary.double()


@dataclass(frozen=True, kw_only=True)
class Selector:
    """Which tokens are trained on, and how much each counts. Without scores every token is (CLM)."""

    scores: tuple[Score, ...] = ()
    keep_ratio: float = 1.0
    scope: Scope = "micro-batch"
    policy: Policy = "top-k"
    combine: Combine | None = None
    combine_ratios: tuple[float, ...] = ()
    """Each selection's own share, for `intersection` and `union`."""
    combine_weights: tuple[float, ...] = ()
    """Each score's factor, for `sum`."""
    schedule: KeepSchedule = field(default_factory=KeepSchedule)
    threshold: float = 0.0
    threshold_decay: float = 0.9
    temperature: float = 1.0
    weight_floor: float = 0.0
    always_keep: tuple[int, ...] = ()
    never_keep: tuple[int, ...] = ()
    seed: int = 0

    def needs(self, what: Need) -> bool:
        """Whether any score reads this."""
        return any(what in score.needs for score in self.scores)

    @property
    def needs_reference(self) -> bool:
        """Whether a reference model is needed at all."""
        return any(score.needs_reference for score in self.scores)

    def expected_share(self, step: int) -> float:
        """The share of tokens that a step will keep, about: for planning, never for results."""
        if not self.scores or self.policy in ("weights", "threshold") or self.schedule.warming_up(step):
            return 1.0
        if self.combine == "intersection":
            return min(self.schedule.ratio(step, own) for own in self.combine_ratios)
        if self.combine == "union":
            return min(1.0, sum(self.schedule.ratio(step, own) for own in self.combine_ratios))
        return self.schedule.ratio(step, self.keep_ratio)

    # ---- each token by itself -----------------------------------------------------------------------------

    def rank(self, tokens: TokenStatistics, reference: TokenStatistics | None, batch: MicroBatch) -> Ranking:
        """What each token of a micro-batch brings into the competition."""
        return self._rank(slice(None), tokens, reference, batch)

    def row_scores(
        self, rows: slice, tokens: TokenStatistics, reference: TokenStatistics | None, batch: MicroBatch
    ) -> Tensor | None:
        """What some rows will be ranked by, before the others' losses are known, fp32 [rows].

        Infinity for those kept in any case, -infinity for those that cannot be kept. None where a token's rank
        depends on more than one number of its own (combinations), or all are kept (soft weights, CLM).

        Args:
            rows: which rows of the micro-batch.
            tokens: the model's statistics of these rows; the others' are of the whole micro-batch.
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
        loss_N, entropy_N = tokens
        reference_loss_N, reference_entropy_N = (None, None) if reference is None else reference
        inputs = ScoreInputs(
            loss_N,
            entropy_N,
            None if reference_loss_N is None else reference_loss_N[rows],
            None if reference_entropy_N is None else reference_entropy_N[rows],
            noise.uniform(self.seed, noise.RANDOM_SCORE, sample_N, position_N) if self.needs("uniform") else None,
        )
        scores = [score.of(inputs) for score in self.scores]
        finite_N = ranked_N = batch.valid_bs.flatten()[rows] & _finite(*inputs[:4], *scores)
        if self.never_keep:
            ranked_N = ranked_N & ~torch.isin(label_N, _ids(self.never_keep, label_N.device))
        always_N = torch.zeros_like(ranked_N)
        if self.always_keep:
            always_N = ranked_N & torch.isin(label_N, _ids(self.always_keep, label_N.device))
        return Ranking(
            torch.stack(scores) if scores else loss_N.new_zeros((0, loss_N.numel()), dtype=torch.float32),
            finite_N,
            ranked_N,
            always_N,
            noise.gumbel(self.seed, noise.GUMBEL, sample_N, position_N) if self.policy == "sample" else None,
        )

    def _with_noise(self, score_N: Tensor, noise_N: Tensor | None) -> Tensor:
        """Gumbel top-k: the k highest of score / T + noise are a sample without replacement of softmax(score / T)."""
        return score_N if noise_N is None else score_N / self.temperature + noise_N

    # ---- all that compete -----------------------------------------------------------------------------------

    def choose(self, ranking: Ranking, *, length: int, step: int, threshold: float | None = None) -> Choice:
        """Which tokens are kept.

        Args:
            ranking: of all tokens that are ranked together, or of several such sets.
            length: tokens of a sequence, `s`.
            step: steps done before this one.
            threshold: the running one of the policy `quantile`; None in a run's first step.
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
        """The one score that is ranked by and logged, fp32 [N]."""
        if not self.scores:
            return torch.zeros_like(ranking.ranked_N, dtype=torch.float32)
        if self.combine != "sum":
            return ranking.score_SN[0]
        ranked_bs = ranking.ranked_N.view(-1, length)
        total_bs = torch.zeros_like(ranked_bs, dtype=torch.float32)
        for weight, score_N in zip(self.combine_weights, ranking.score_SN, strict=True):
            total_bs += weight * in_scope(standardised, score_N.view(-1, length), ranked_bs, self.scope)
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
        """What a micro-batch says of the next step's threshold: (threshold times its tokens, its tokens), fp64 [].

        Both are 0 where the policy keeps no threshold, and where the next step keeps everything.
        """
        ordinary_N = choice.ranked_N & ~choice.always_N
        ratio = self.schedule.ratio(step + 1, self.keep_ratio)
        if self.policy != "quantile" or not self.scores or ratio >= 1.0:
            zero = ordinary_N.new_zeros((), dtype=torch.float64)
            return zero, zero
        count = ordinary_N.sum().double()
        return measured_threshold(choice.score_N, ordinary_N, ratio) * count, count

    def next_threshold(self, before: float | None, measured_sum: float, num_ranked: float) -> float | None:
        """The running threshold after a step, from `measure` summed over micro-batches and ranks."""
        return running_threshold(before, measured_sum, num_ranked, self.threshold_decay)

    def describe(self) -> str:
        """In a few words, for tables."""
        if not self.scores:
            return "every token"
        joiner = {"intersection": " ∩ ", "union": " ∪ ", "sum": " + ", None: ""}[self.combine]
        by = joiner.join(score.name for score in self.scores)
        return f"keep {self.keep_ratio} by {by}, {self.policy} per {self.scope}"


@lru_cache(maxsize=16)
def _ids(ids: tuple[int, ...], device: torch.device) -> Tensor:
    """Token ids on the device, int64; copied once."""
    found = move(torch.tensor(ids, dtype=torch.int64, device="cpu"), device)
    assert found is not None, "a tensor was moved"
    return found


def _finite(*columns: Tensor | None) -> Tensor:
    """Where every number that is there is finite, bool [N]."""
    masks = [x.isfinite() for x in columns if x is not None]
    return torch.stack(masks).all(0)
