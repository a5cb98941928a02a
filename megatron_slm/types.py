"""Values that several packages hand to each other."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class MicroBatch(NamedTuple):
    """The tokens of one micro-batch on one data-parallel rank (b samples of s tokens)."""

    tokens_bs: Tensor
    """Model input, int64 [b, s]."""

    labels_bs: Tensor
    """The next token at every position, int64 [b, s]."""

    valid_bs: Tensor
    """True where the label counts, bool [b, s]: not padding and not masked by the user."""
