"""Prediction of the rows that will be kept, before all of them are scored."""

from __future__ import annotations

import math

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
        """Remember a micro-batch's threshold, less the band.

        Args:
            ranked_N: rows that could be kept.
        """
        score_V = score_N[ranked_N]
        wanted = min(score_V.numel(), num_kept + math.ceil(BAND * score_V.numel()))
        if wanted:
            self._bound = torch.topk(score_V, wanted, sorted=False).values.min()
