"""Data types shared by several packages."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Documents(NamedTuple):
    """Document boundaries in a micro-batch whose samples hold several documents, for attention within documents.

    The N = b * s positions of the micro-batch are numbered sample by sample; no document crosses a sample.
    """

    lengths: tuple[int, ...] | None
    """Number of tokens of each document, in order, summing to N; None where attention crosses documents."""

    cumulative: Tensor | None
    """Start of each document, then N: int32 [documents + 1]; None where `lengths` is None."""

    position_bs: Tensor | None
    """Positions that restart at 0 in every document, int64 [b, s]; None where they count through the sample."""

    def to(self, device: torch.device) -> Documents:
        """Return a copy on another device."""
        tensors = (None if x is None else x.to(device, non_blocking=True) for x in (self.cumulative, self.position_bs))
        return Documents(self.lengths, *tensors)


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

    source_b: Tensor | None = None
    """Index of the corpus each sample is from, int64 [b]; None for runs with a single corpus."""

    documents: Documents | None = None
    """Document boundaries; None where attention and positions cover whole samples."""

    def to(self, device: torch.device) -> MicroBatch:
        """Return a copy on another device."""
        return MicroBatch(*(None if x is None else x.to(device) for x in self))  # type: ignore[arg-type]


class TokenStatistics(NamedTuple):
    """Statistics of one model for each token of a micro-batch, in (sequence, position) order."""

    loss_N: Tensor
    """-log P(label), in nats, fp32 [N]; 0 where not valid."""

    entropy_N: Tensor | None = None
    """Entropy of the predicted distribution, in nats, fp32 [N]; None where unused."""

    def to(self, device: torch.device) -> TokenStatistics:
        """Return a copy on another device."""
        return TokenStatistics(self.loss_N.to(device), None if self.entropy_N is None else self.entropy_N.to(device))


class Selection(NamedTuple):
    """Kept tokens of a micro-batch and their weights."""

    kept_K: Tensor
    """Rows of the kept tokens, ascending, int64 [K]."""

    weight_K: Tensor | None = None
    """Factor of each kept loss, fp32 [K]; None means 1 for all."""
