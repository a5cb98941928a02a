"""Prediction of the rows that will be kept, before all of them are scored."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_slm.loss.variants import BAND


class ThresholdPredictor:
    """Expects the next micro-batch's scores to be distributed as the last one's were.

    A wrong prediction costs computing a row's logits once more, never a bit of the result. The last threshold alone
    predicts better than an average of older ones, which lags behind.
    """

    def __init__(self) -> None:
        self._bound: Tensor | None = None

    def predict(self, score_R: Tensor) -> Tensor | None:
        """Return the rows that will probably be kept, bool [R]; None before the first micro-batch."""
        return None if self._bound is None else score_R >= self._bound

    def learn(self, score_N: Tensor, ranked_N: Tensor, num_kept: int) -> None:
        """Remember a micro-batch's threshold, less the band. Nothing waits for the device.

        Args:
            ranked_N: rows that could be kept.
        """
        num_ranked = ranked_N.sum()
        wanted = torch.minimum(num_ranked, num_kept + (BAND * num_ranked.double()).ceil().long())
        descending_N = score_N.masked_fill(~ranked_N, -torch.inf).sort(descending=True).values
        bound = descending_N.take((wanted - 1).clamp(min=0))
        before = torch.full_like(bound, -torch.inf) if self._bound is None else self._bound
        self._bound = torch.where(wanted > 0, bound, before)
