"""The sums that a loss returns and a step reduces over all ranks."""

from __future__ import annotations

from dataclasses import dataclass, fields
from itertools import zip_longest

import torch
from torch import Tensor

from megatron_slm.selection.policies import score_quantiles
from megatron_slm.selection.selector import Choice
from megatron_slm.types import MicroBatch, TokenStatistics

SOURCE_SUMS = ("kept_loss", "kept_tokens", "valid_loss", "valid_tokens")
"""What is summed for each corpus by itself."""


@dataclass(frozen=True)
class LossSums:
    """Sums over tokens, losses in nats; the quotients that are logged are taken once, over a whole step.

    Tokens whose losses or scores are not finite are in `nonfinite_tokens` and in nothing else.
    """

    kept_loss: float = 0.0
    kept_tokens: float = 0.0
    valid_loss: float = 0.0
    valid_tokens: float = 0.0
    reference_loss: float = 0.0
    kept_excess: float = 0.0
    weighted_loss: float = 0.0
    """Kept losses, each times its weight: what the gradient is of, before its division."""
    divisor: float = 0.0
    """What the step's gradient is divided by: the kept tokens, or what they are on average."""
    nonfinite_tokens: float = 0.0
    """Valid tokens with a loss or a score that is NaN or infinite; never kept."""
    nonfinite_losses: float = 0.0
    """Those of them whose loss under the model itself is: its hidden states or its output weight are not finite."""
    ranked_tokens: float = 0.0
    """Tokens that could be kept: valid, finite, and not of an id that is never kept."""
    score_p05: float = 0.0
    """This and the next four: a micro-batch's quantile of its ranked tokens' scores, times their number."""
    score_p25: float = 0.0
    score_p50: float = 0.0
    score_p75: float = 0.0
    score_p95: float = 0.0
    threshold: float = 0.0
    """What micro-batches say of the next step's threshold, times `threshold_tokens`."""
    threshold_tokens: float = 0.0
    by_source: tuple[float, ...] = ()
    """`SOURCE_SUMS` of each of the run's corpora, one corpus after the other; empty where there is one corpus."""

    @property
    def nothing_finite(self) -> bool:
        """Nothing could be kept, because no number was finite: the step has no gradient, not one of zero."""
        return self.nonfinite_tokens > 0 and self.ranked_tokens == 0

    @classmethod
    def of(cls, values: list[float]) -> LossSums:
        """From the values of its fields in order, those of `by_source` one after the other (see `num_sums`)."""
        names = [f.name for f in fields(cls)][:-1]
        scalars = dict(zip(names, values, strict=False))
        return cls(**scalars, by_source=tuple(values[len(names) :]))

    def __add__(self, other: LossSums) -> LossSums:
        pairs = zip_longest(self.by_source, other.by_source, fillvalue=0.0)
        sums = {f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)}
        return LossSums(**{**sums, "by_source": tuple(a + b for a, b in pairs)})


def num_sums(num_sources: int) -> int:
    """Length of a vector of `LossSums`' values: its scalars, and with several corpora those of each."""
    return len(fields(LossSums)) - 1 + (len(SOURCE_SUMS) * num_sources if num_sources > 1 else 0)


def loss_sums(
    token_loss_N: Tensor,
    reference_loss_N: Tensor | None,
    choice: Choice,
    kept_K: Tensor,
    valid_N: Tensor,
    measured_threshold: tuple[Tensor, Tensor],
    sources: tuple[Tensor | None, int],
) -> Tensor:
    """Sum a micro-batch's losses and counts, in the order of `LossSums`' fields; fp64."""
    finite_N = choice.finite_N
    loss_N = torch.where(finite_N, token_loss_N.double(), 0.0)
    reference_N = torch.zeros_like(loss_N)
    if reference_loss_N is not None:
        reference_N = torch.where(finite_N, reference_loss_N.double(), 0.0)
    kept_N, num_ranked = choice.kept_N, choice.ranked_N.sum()
    sums = [
        loss_N[kept_K].sum(),
        kept_N.sum(),
        loss_N.sum(),
        finite_N.sum(),
        reference_N.sum(),
        (loss_N - reference_N)[kept_K].sum(),
        (loss_N if choice.weight_N is None else loss_N * choice.weight_N)[kept_K].sum(),
        choice.divisor(),
        (valid_N & ~finite_N).sum(),
        (valid_N & ~token_loss_N.isfinite()).sum(),
        num_ranked,
        *(score_quantiles(choice.score_N, choice.ranked_N) * num_ranked),
        *measured_threshold,
    ]
    source_b, num_sources = sources
    if num_sources > 1:
        table = torch.zeros(num_sources, len(SOURCE_SUMS), dtype=torch.float64, device=loss_N.device)
        if source_b is not None:
            columns_Nf = torch.stack([loss_N * kept_N, kept_N.double(), loss_N, finite_N.double()], dim=1)
            table.index_add_(0, source_b, columns_Nf.view(len(source_b), -1, len(SOURCE_SUMS)).sum(1))
        sums += table.flatten().unbind()
    return torch.stack([x.double() for x in sums]).detach()


def evaluation_sums(statistics: TokenStatistics, batch: MicroBatch) -> Tensor:
    """The values of a held-out micro-batch's `LossSums`, fp64 [`num_sums(1)`]: its loss sum (not finite where a loss is
    not) and its count; the rest is 0."""
    count, total = batch.valid_bs.sum().double(), statistics.loss_N.double().sum()
    values = torch.zeros(num_sums(1), dtype=torch.float64, device=total.device)
    values[:4] = torch.stack([total, count, total, count])  # kept_loss, kept_tokens, valid_loss, valid_tokens
    return values
