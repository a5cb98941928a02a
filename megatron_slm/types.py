"""Values that several packages hand to each other."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class MicroBatch(NamedTuple):
    """The tokens of one micro-batch on one data-parallel rank (b samples of s tokens)."""

    tokens_bs: Tensor
    """Model input, int64 [b, s]."""

    labels_bs: Tensor
    """The next token at every position, int64 [b, s]."""

    valid_bs: Tensor
    """True where the label counts, bool [b, s]: not padding and not masked by the user."""

    sample_b: Tensor
    """Each sample's number in the order of the run (or of the held-out set), int64 [b]; the same at any layout."""


class TokenStatistics(NamedTuple):
    """What one model says of each token of a micro-batch, in (sequence, position) order."""

    loss_N: Tensor
    """-log P(label), in nats, fp32 [N]; 0 where not valid."""

    entropy_N: Tensor | None = None
    """Entropy of the predicted distribution, in nats, fp32 [N]; None where nothing asks for it."""

    def to(self, device: torch.device) -> TokenStatistics:
        """The same on another device."""
        return TokenStatistics(self.loss_N.to(device), None if self.entropy_N is None else self.entropy_N.to(device))


class Selection(NamedTuple):
    """Which tokens of a micro-batch are trained on, and how much each of them counts."""

    kept_K: Tensor
    """Rows kept, ascending int64 [K]."""

    weight_K: Tensor | None = None
    """What each kept loss is multiplied by, fp32 [K]; None stands for ones."""
