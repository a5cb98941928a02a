"""Which rows will be kept, guessed before all of them are scored."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megatron_slm.loss.variants import BAND


class ThresholdPredictor:
    """Expects the next micro-batch's scores to be spread as the last one's were.

    A wrong guess costs a row's logits once more, never a bit of the result. The last threshold alone predicts better
    than an average of older ones, which lags behind.
    """

    def __init__(self) -> None:
        self._bound: Tensor | None = None

    def likely(self, score_R: Tensor) -> Tensor | None:
        """Rows that will probably be kept, bool [R]; None (any) before the first micro-batch."""
        return None if self._bound is None else score_R >= self._bound

    def learn(self, score_N: Tensor, valid_N: Tensor, num_kept: int) -> None:
        """Remember a micro-batch: its threshold, less the band."""
        score_V = score_N[valid_N]
        wanted = min(score_V.numel(), num_kept + math.ceil(BAND * score_V.numel()))
        if wanted:
            self._bound = torch.topk(score_V, wanted, sorted=False).values.min()
