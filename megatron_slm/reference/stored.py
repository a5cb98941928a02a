"""The reference's statistics of a micro-batch, read from stores instead of computed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from megatron_slm.reference.manifest import StoredDistribution
from megatron_slm.reference.store import ScoreReader
from megatron_slm.types import MicroBatch, TokenStatistics

Combine = Literal["minimum", "mean", "difference"]


class StoredScores:
    """Statistics of one or several references, by sample number.

    Args:
        readers: the stores, in the order that sums are taken in.
        combine: combination of several references per token: `minimum` or `mean` of their losses (and entropies), or
            the first one's less the second one's.
    """

    def __init__(self, readers: Sequence[ScoreReader], combine: Combine) -> None:
        self.readers, self.combine = readers, combine

    @property
    def has_entropy(self) -> bool:
        """True where every store holds entropies, so that the statistics have them."""
        return all(reader.manifest.with_entropy for reader in self.readers)

    @property
    def distribution(self) -> StoredDistribution | None:
        """The only store's part of each token's distribution; None where it has none, and for several stores."""
        return self.readers[0].manifest.distribution if len(self.readers) == 1 else None

    def __call__(self, batch: MicroBatch, *, with_distribution: bool = False) -> TokenStatistics:
        """Read the statistics of a micro-batch on the CPU: fp32 [N], nats, 0 where not valid.

        Args:
            with_distribution: the one store has distributions, and they are needed.

        Raises:
            ScoreStoreError: a store has not the scores of these samples and tokens.
        """
        scores = [reader.read(batch) for reader in self.readers]
        entropies = [one.entropy_bs for one in scores if one.entropy_bs is not None]
        masked_N = ~batch.valid_bs.flatten()
        distribution = None
        if with_distribution and (probabilities := scores[0].probabilities) is not None:
            distribution = probabilities.distribution(scores[0].entropy_bs)
        return TokenStatistics(
            self._combined([one.loss_bs for one in scores]).masked_fill_(masked_N, 0.0),
            self._combined(entropies).masked_fill_(masked_N, 0.0) if self.has_entropy else None,
            distribution=distribution,
        )

    def _combined(self, parts_bs: list[Tensor]) -> Tensor:
        stacked = torch.stack([part_bs.flatten() for part_bs in parts_bs])
        if self.combine == "difference":
            return stacked[0] - stacked[1]
        return stacked.amin(0) if self.combine == "minimum" else stacked.mean(0)
