"""Sums over tokens that a loss returns: added up on the device, reduced over all ranks once a step, read by name.

To add one: a field of `LossSums`, and its value under the same name where it is known (`loss_sums`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import zip_longest
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_slm.selection.ranking import Choice
from megatron_slm.types import MicroBatch, TokenStatistics

SCORE_QUANTILES = ("score_p05", "score_p25", "score_p50", "score_p75", "score_p95")
"""Fields of `LossSums`, in the order of `selection.policies.SCORE_LEVELS`."""


class SourceSums(NamedTuple):
    """One corpus' part of the sums; losses in nats."""

    kept_loss: float = 0.0
    kept_tokens: float = 0.0
    valid_loss: float = 0.0
    valid_tokens: float = 0.0


@dataclass(frozen=True, kw_only=True)
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
    excess_squares: float = 0.0
    """Squares of the valid tokens' excess losses, in nats squared."""
    divergence: float = 0.0
    """Kept tokens' divergences from the reference's distribution; 0 without distillation."""
    weighted_loss: float = 0.0
    """Kept losses, each times its weight: the gradient's loss, before its division."""
    divisor: float = 0.0
    """Divides the step's gradient: the kept tokens, or their expected number."""
    nonfinite_tokens: float = 0.0
    """Valid tokens with a loss or a score that is NaN or infinite; never kept."""
    nonfinite_losses: float = 0.0
    """Those of them with a non-finite loss under the model: its hidden states or output weight are not finite."""
    ranked_tokens: float = 0.0
    """Tokens that could be kept: valid, finite, and not of an id that is never kept."""
    score_p05: float = 0.0
    """This and the next four: a micro-batch's quantile of its ranked tokens' scores, times their number."""
    score_p25: float = 0.0
    score_p50: float = 0.0
    score_p75: float = 0.0
    score_p95: float = 0.0
    threshold: float = 0.0
    """Micro-batches' thresholds for the next step (`Selector.measure`), times `threshold_tokens`."""
    threshold_tokens: float = 0.0
    by_source: tuple[SourceSums, ...] = ()
    """The part of each of the run's corpora; empty where there is one corpus."""

    @property
    def nothing_finite(self) -> bool:
        """True where no token had finite numbers: the step has no gradient, rather than a gradient of zero."""
        return self.nonfinite_tokens > 0 and self.ranked_tokens == 0

    def __add__(self, other: LossSums) -> LossSums:
        totals = {name: getattr(self, name) + getattr(other, name) for name in _SCALARS}
        pairs = zip_longest(self.by_source, other.by_source, fillvalue=SourceSums())
        by_source = tuple(SourceSums(*(a + b for a, b in zip(*pair, strict=True))) for pair in pairs)
        return LossSums(**totals, by_source=by_source)


_SCALARS = tuple(f.name for f in fields(LossSums) if f.name != "by_source")


@dataclass(frozen=True)
class SumLayout:
    """Position of every field of `LossSums` in one fp64 vector, so that a step adds up and reduces all of them at once.

    Args:
        num_sources: corpora of the run.
    """

    num_sources: int = 1

    @cached_property
    def lengths(self) -> dict[str, int]:
        """Number of values of every field, in the order of the vector."""
        by_source = self.num_sources * len(SourceSums._fields) if self.num_sources > 1 else 0
        return {**dict.fromkeys(_SCALARS, 1), "by_source": by_source}

    @property
    def size(self) -> int:
        """Length of the vector."""
        return sum(self.lengths.values())

    def pack(self, sums: Mapping[str, Tensor]) -> Tensor:
        """Return the vector of the named sums, fp64 [size], detached; fields without one are 0.

        Args:
            sums: by field of `LossSums`; `by_source` as [num_sources, fields of `SourceSums`], or empty.
        """
        unknown = sums.keys() - self.lengths.keys()
        assert not unknown, f"LossSums has no {sorted(unknown)}"
        zeros = torch.zeros(self.size, dtype=torch.float64, device=next(iter(sums.values())).device)
        parts = [
            sums[name].double().reshape(length) if name in sums else zeros[:length]
            for name, length in self.lengths.items()
        ]
        return torch.cat(parts).detach()

    def unpack(self, vector: Tensor) -> LossSums:
        """Read a vector, in one transfer from the device."""
        parts = dict(zip(self.lengths, vector.cpu().split(list(self.lengths.values())), strict=True))
        rows = parts["by_source"].view(-1, len(SourceSums._fields)).tolist()
        return LossSums(
            **{name: float(parts[name]) for name in _SCALARS}, by_source=tuple(SourceSums(*row) for row in rows)
        )


EVALUATION = SumLayout()
"""Layout of the sums of held-out sets, which have no parts by corpus."""


def loss_sums(
    *,
    token_loss_N: Tensor,
    reference_loss_N: Tensor | None,
    choice: Choice,
    quantiles: Tensor,
    kept_K: Tensor,
    trained_loss_K: Tensor,
    divergence_K: Tensor | None,
    valid_N: Tensor,
    measured_threshold: tuple[Tensor, Tensor],
    source_b: Tensor | None,
    num_sources: int,
) -> dict[str, Tensor]:
    """Sum a micro-batch's losses and counts, by field of `LossSums`.

    Args:
        quantiles: of the whole micro-batch's scores (`score_quantiles`), of which other ranks may hold a part.
        trained_loss_K: losses of the kept tokens, before their weights.
        divergence_K: their divergences from the reference's distribution; None without distillation.
        measured_threshold: `threshold` and `threshold_tokens`, from `Selector.measure`.
        source_b: corpus of each sample.
    """
    finite_N = choice.finite_N
    loss_N = torch.where(finite_N, token_loss_N.double(), 0.0)
    reference_N = torch.zeros_like(loss_N)
    if reference_loss_N is not None:
        reference_N = torch.where(finite_N, reference_loss_N.double(), 0.0)
    excess_N = loss_N - reference_N
    trained_K = trained_loss_K.double()
    kept_N, num_ranked = choice.kept_N, choice.ranked_N.sum()
    threshold, threshold_tokens = measured_threshold
    return {
        "kept_loss": loss_N[kept_K].sum(),
        "kept_tokens": kept_N.sum(),
        "valid_loss": loss_N.sum(),
        "valid_tokens": finite_N.sum(),
        "reference_loss": reference_N.sum(),
        "kept_excess": excess_N[kept_K].sum(),
        "excess_squares": excess_N.square().sum(),
        "divergence": loss_N.new_zeros(()) if divergence_K is None else divergence_K.double().sum(),
        "weighted_loss": (trained_K if choice.weight_N is None else trained_K * choice.weight_N[kept_K]).sum(),
        "divisor": choice.divisor(),
        "nonfinite_tokens": (valid_N & ~finite_N).sum(),
        "nonfinite_losses": (valid_N & ~token_loss_N.isfinite()).sum(),
        "ranked_tokens": num_ranked,
        **dict(zip(SCORE_QUANTILES, quantiles * num_ranked, strict=True)),
        "threshold": threshold,
        "threshold_tokens": threshold_tokens,
        "by_source": _sums_by_source(loss_N, kept_N, finite_N, source_b, num_sources),
    }


def _sums_by_source(
    loss_N: Tensor, kept_N: Tensor, finite_N: Tensor, source_b: Tensor | None, num_sources: int
) -> Tensor:
    """The `SourceSums` of every corpus, fp64 [num_sources, fields]; empty where there is one corpus."""
    columns = {
        "kept_loss": loss_N * kept_N,
        "kept_tokens": kept_N.double(),
        "valid_loss": loss_N,
        "valid_tokens": finite_N.double(),
    }
    table = loss_N.new_zeros((num_sources if num_sources > 1 else 0, len(SourceSums._fields)))
    if num_sources > 1 and source_b is not None:
        columns_Nf = torch.stack([columns[name] for name in SourceSums._fields], dim=1)
        table.index_add_(0, source_b, columns_Nf.view(len(source_b), -1, len(SourceSums._fields)).sum(1))
    return table


def evaluation_sums(statistics: TokenStatistics, batch: MicroBatch) -> dict[str, Tensor]:
    """Sum a held-out micro-batch, every valid token kept: its losses (not finite where one is not) and its count."""
    total, count = statistics.loss_N.double().sum(), batch.valid_bs.sum()
    return {"kept_loss": total, "kept_tokens": count, "valid_loss": total, "valid_tokens": count}
