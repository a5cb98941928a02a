"""Data types shared by several packages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, TypeAlias, overload

import torch
from torch import Tensor


@overload
def move(x: Tensor, device: torch.device) -> Tensor: ...
@overload
def move(x: Tensor | None, device: torch.device) -> Tensor | None: ...
def move(x: Tensor | None, device: torch.device) -> Tensor | None:
    """Copy a tensor to a device without waiting for it; None stays None.

    A copy to a GPU waits for all that the GPU was told before, unless it comes from pinned memory. Torch keeps such
    memory for further use, and not before the copy is over.
    """
    if x is None or x.device == device:
        return x
    if x.device.type == "cpu" and device.type == "cuda":
        x = x.pin_memory()
    return x.to(device, non_blocking=True)


class Pieces(NamedTuple):
    """Runs of queries held here, each within one document, and the keys of the document up to the last of them.

    Where sequences are cut over ranks. The keys are those of the whole micro-batch, N = b * s.
    """

    queries: tuple[int, ...]
    """Number of queries of each piece, in order; together all that are held here."""

    keys: tuple[tuple[int, int], ...]
    """First key of each piece and their number."""

    key_K: Tensor
    """Keys of all pieces, one after the other, int64 [K]."""

    cumulative_queries: Tensor
    """Start of each piece's queries, then their number: int32 [pieces + 1]."""

    cumulative_keys: Tensor
    """Start of each piece's keys in `key_K`, then their number: int32 [pieces + 1]."""

    def to(self, device: torch.device) -> Pieces:
        """Return a copy on another device."""
        return Pieces(self.queries, self.keys, *(move(x, device) for x in self[2:]))


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

    pieces: Pieces | None = None
    """Parts of the documents held here, where sequences are cut over ranks; `lengths` and `cumulative` are of the whole
    micro-batch all the same."""

    def to(self, device: torch.device) -> Documents:
        """Return a copy on another device."""
        pieces = None if self.pieces is None else self.pieces.to(device)
        return Documents(self.lengths, move(self.cumulative, device), move(self.position_bs, device), pieces)


class MicroBatch(NamedTuple):
    """The tokens of one micro-batch on one data-parallel rank (b samples of s tokens).

    Where sequences are cut over ranks, a rank's part of it has s / size positions of each sample.
    """

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

    columns: Mapping[str, Tensor] | None = None
    """Numbers of the labels from columns beside the corpus, by name, fp32 [b, s] each; None where none is read."""

    position_s: Tensor | None = None
    """Positions of the samples that are held here, int64 [s]; None where all are."""

    def to(self, device: torch.device) -> MicroBatch:
        """Return a copy on another device."""
        documents = None if self.documents is None else self.documents.to(device)
        columns = None if self.columns is None else {name: move(x, device) for name, x in self.columns.items()}
        held = [move(x, device) for x in self[:5]]
        return MicroBatch(*held, documents, columns, move(self.position_s, device))  # type: ignore[arg-type, call-arg]


def positions_of(batch: MicroBatch) -> Tensor:
    """Return the positions of the samples that are held here, int64 [s]."""
    if batch.position_s is not None:
        return batch.position_s
    return torch.arange(batch.labels_bs.shape[1], device=batch.labels_bs.device)


class DenseDistribution(NamedTuple):
    """A model's predicted distribution of each token, as what it is computed from: no table of N x V exists."""

    hidden_sbd: Tensor
    """Output of the final norm, [s, b, d], or this rank's [s / size, b, d] under sequence parallelism."""

    weight_Vd: Tensor
    """The output weight's token rows held here; the model's own, not a copy."""

    max_N: Tensor
    """Largest logit over the whole vocabulary, fp32 [N]."""

    sum_N: Tensor
    """Sum of exp(logit - max) over the whole vocabulary, fp32 [N]."""

    softcap: float | None = None
    """Of the logits; None for none."""


class SparseDistribution(NamedTuple):
    """A model's predicted distribution of each token, as probabilities of k token ids."""

    id_Nk: Tensor
    """Token ids, int64 [N, k]; distinct in a row, except for those of probability 0."""

    log_probability_Nk: Tensor
    """fp32 [N, k]; -infinity for a probability of 0."""

    log_rest_N: Tensor | None = None
    """Log of the other ids' probability together, fp32 [N]; None where the k ids have all of it."""

    entropy_N: Tensor | None = None
    """Entropy of the whole distribution, fp32 [N], where the k ids are a sample of it; else None."""


Distribution: TypeAlias = DenseDistribution | SparseDistribution


class TokenStatistics(NamedTuple):
    """Statistics of one model for each token of a micro-batch, in (sequence, position) order."""

    loss_N: Tensor
    """-log P(label), in nats, fp32 [N]; 0 where not valid."""

    entropy_N: Tensor | None = None
    """Entropy of the predicted distribution, in nats, fp32 [N]; None where unused."""

    top_entropy_N: Tensor | None = None
    """Entropy of the renormalized `TOP_LOGITS` most likely tokens, in nats, fp32 [N]; None where unused."""

    distribution: Distribution | None = None
    """The predicted distribution itself, of a reference that is distilled; else None."""

    def to(self, device: torch.device) -> TokenStatistics:
        """Return a copy on another device."""
        distribution = self.distribution
        if distribution is not None:
            moved = (move(x, device) if isinstance(x, Tensor) else x for x in distribution)
            distribution = type(distribution)(*moved)  # type: ignore[arg-type]
        return TokenStatistics(*(move(x, device) for x in self[:3]), distribution)  # type: ignore[arg-type, call-arg]


class Selection(NamedTuple):
    """Kept tokens of a micro-batch and their weights."""

    kept_K: Tensor
    """Rows of the kept tokens, ascending, int64 [K]."""

    weight_K: Tensor | None = None
    """Factor of each kept loss, fp32 [K]; None means 1 for all."""
